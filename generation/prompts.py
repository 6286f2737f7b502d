"""How an instruction becomes a prompt. Pure: no model, no Ray, no files.

A prompt is first a list of OpenAI-style messages, whatever its form; worked examples (shots) are earlier user and assistant
turns. The `chat` form gives the messages to the model's chat template, the `raw` form joins them to one text the model
continues. A server request takes the same road with the client's own messages; a text it is to continue, letter by letter, is
one message in the `verbatim` form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class Message(TypedDict):
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


class Shot(TypedDict):
    """A worked example: another instruction and one correct response to it."""

    instruction: str
    response: str


def messages(instruction: str, shots: Sequence[Shot] = (), system: str | None = None) -> list[Message]:
    """Return the turns of a prompt: the system text, each shot as a user and an assistant turn, the instruction."""
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    for shot in shots:
        turns.append({"role": "user", "content": shot["instruction"].strip()})
        turns.append({"role": "assistant", "content": shot["response"].strip()})
    return [*turns, {"role": "user", "content": instruction.strip()}]


def drop_first_shot(turns: Sequence[Message]) -> list[Message] | None:
    """Return the turns without their first user and assistant pair, or None where only the instruction is left."""
    start = 1 if turns and turns[0]["role"] == "system" else 0
    return [*turns[:start], *turns[start + 2 :]] if len(turns) - start >= 3 else None


def prompt_text(turns: Sequence[Message], form: str) -> str | None:
    """Return the text a model continues after the turns, None in the `chat` form, whose text the model's template makes."""
    if form == "verbatim":
        return "".join(turn["content"] for turn in turns)
    return raw_text(turns) if form == "raw" else None


def raw_text(turns: Sequence[Message]) -> str:
    """Return the turns as one text to continue, paragraphs apart.

    A response follows on the same line after a cue (`A:`), else on the next. No trailing space is left: tokenisers
    of language models put a word's space before it, so a prompt ending in a space asks for a word they rarely saw.
    """
    paragraphs = []
    awaiting = ""
    for turn in turns:
        text = turn["content"].strip()
        if turn["role"] == "assistant":
            paragraphs.append(_join(awaiting, text))
            awaiting = ""
        else:
            if awaiting:
                paragraphs.append(awaiting)
            awaiting = text
    if awaiting:
        paragraphs.append(_join(awaiting, ""))
    return "\n\n".join(paragraphs)


def _join(instruction: str, response: str) -> str:
    if not instruction:
        return response
    if instruction.endswith((":", ">", "=")):
        return f"{instruction} {response}".rstrip()
    return f"{instruction}\n{response}"
