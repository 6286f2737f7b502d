"""Build the prompt of an instruction. Pure: imports no model and no Ray, reads no files.

A prompt is a list of OpenAI-style messages. Its few-shot examples (shots) are earlier user and assistant turns. The form
decides how the messages become text:

- `chat`: the chat template of the model renders them;
- `raw`: they are joined to one text that the model continues;
- `verbatim`: their contents are the text, without any change. Requests to `/v1/completions` use this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str
    name: NotRequired[str]
    """Name of the participant, for chat templates that read it."""
    reasoning_content: NotRequired[str]
    """The reasoning of an earlier answer, for chat templates that read it."""


class Shot(TypedDict):
    """A few-shot example: another instruction with one correct response."""

    instruction: str
    response: str


def messages(instruction: str, shots: Sequence[Shot] = (), system: str | None = None) -> list[Message]:
    """Return the turns of a prompt: the system message, two turns for each shot, and the instruction as the last turn."""
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    for shot in shots:
        turns.append({"role": "user", "content": shot["instruction"].strip()})
        turns.append({"role": "assistant", "content": shot["response"].strip()})
    return [*turns, {"role": "user", "content": instruction.strip()}]


def drop_first_shot(turns: Sequence[Message]) -> list[Message] | None:
    """Return the turns without their first shot (a user and an assistant turn), or None if they have no shot."""
    start = 1 if turns and turns[0]["role"] == "system" else 0
    return [*turns[:start], *turns[start + 2 :]] if len(turns) - start >= 3 else None


def prompt_text(turns: Sequence[Message], form: str) -> str | None:
    """Return the text of a prompt in the `raw` or `verbatim` form; None in the `chat` form, which needs the chat template."""
    if form == "verbatim":
        return "".join(turn["content"] for turn in turns)
    return raw_text(turns) if form == "raw" else None


def raw_text(turns: Sequence[Message]) -> str:
    """Join the turns to one text that the model continues; a blank line separates the paragraphs.

    A response is on the line of its instruction if the instruction ends in a cue such as `A:`, else on the next line. The
    text never ends in a space. Tokenizers attach a space to the word after it, so after a trailing space the model would
    have to continue with a token that is rare in its training data.
    """
    paragraphs = []
    instruction = ""
    for turn in turns:
        text = turn["content"].strip()
        if turn["role"] == "assistant":
            paragraphs.append(_join(instruction, text))
            instruction = ""
        else:
            if instruction:
                paragraphs.append(instruction)
            instruction = text
    if instruction:
        paragraphs.append(_join(instruction, ""))
    return "\n\n".join(paragraphs)


def _join(instruction: str, response: str) -> str:
    if not instruction:
        return response
    if instruction.endswith((":", ">", "=")):
        return f"{instruction} {response}".rstrip()
    return f"{instruction}\n{response}"
