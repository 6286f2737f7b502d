"""Convert chats to instructions: OpenAI's `messages`, ShareGPT's `conversations`, and turns before a question. Pure functions; no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Turn = tuple[str, str]
_SYSTEM = ("system", "developer")
_ROLES = {
    "human": "user",
    "user": "user",
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bard", "bing", "claude"), "assistant"),
}


def turns_of(value: Any, name: str) -> list[Mapping[str, Any]]:
    """Return the turns of a chat. Raises `ValueError` if the column `name` is not a list of objects."""
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"`{name}` must be a list of turns with `role` and `content`, or with `from` and `value`")
    return list(value)


def split_chat(turns: Sequence[Mapping[str, Any]], name: str) -> tuple[list[Turn], str]:
    """Return the turns before the last assistant turn, and the text of that turn.

    Raises `ValueError` for a chat without an assistant turn.
    """
    last = max((number for number, turn in enumerate(turns) if _role(turn) == "assistant"), default=None)
    if last is None:
        raise ValueError(f"`{name}` has no assistant turn")
    return read_turns(turns[:last]), _content(turns[last])


def has_turns_after_answer(value: Any) -> bool:
    """Return whether the last turn of a chat is not of the assistant."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[-1], Mapping) and _role(value[-1]) != "assistant"


def read_turns(turns: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """Return `(role, text)` of each turn; the roles of ShareGPT become user and assistant."""
    return [(_role(turn), _content(turn)) for turn in turns]


def read_history(value: Any) -> list[Turn]:
    """Return the turns of a `history` column: `[question, answer]` pairs, or turns. Raises `ValueError` for other values."""
    if not value:
        return []
    if isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value):
        return read_turns(value)
    pairs = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise ValueError("`history` must be a list of [question, answer] pairs or of turns")
    return [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]


def render_turns(turns: Iterable[Turn]) -> str:
    """Return turns as one text: system texts first; in a chat of several turns each starts with its role."""
    turns = list(turns)
    system = [text for role, text in turns if role in _SYSTEM]
    dialogue = [(role, text) for role, text in turns if role not in _SYSTEM]
    # A single question stays unchanged.
    texts = [text for _, text in dialogue] if len(dialogue) == 1 else [f"{role.capitalize()}: {text}" for role, text in dialogue]
    return "\n\n".join([*system, *texts])


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role") or turn.get("from"))
    return _ROLES.get(role.lower(), role)


def _content(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn: its content, or its text parts joined. Raises `ValueError` for other content."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise ValueError(f"the content of the {_role(turn)} turn is not text")
    return content.strip()
