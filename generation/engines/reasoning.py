"""Remove the reasoning (`<think>...</think>`) that a model writes into its response. Pure: no model, no Ray."""

from __future__ import annotations

import re

# (opening, closing) marks: DeepSeek-R1, Qwen and most others; Magistral; Kimi; Seed; Gemma and others.
_MARKS = (
    *((rf"<{name}>", rf"</{name}>") for name in ("think", "thinking", "thought", "thoughts", "reason", "reasoning", "seed:think")),
    (r"\[THINK\]", r"\[/THINK\]"),
    ("◁think▷", "◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
)
_LEADING = tuple((re.compile(rf"\s*{start}", re.IGNORECASE), re.compile(end, re.IGNORECASE)) for start, end in _MARKS)
# Ordinary texts do not have the marks of `think`, so a complete block is removed anywhere.
_BLOCK = re.compile(r"<think>.*?</think>", re.IGNORECASE | re.DOTALL)
_FIRST_MARK = re.compile(r"</?think>", re.IGNORECASE)


def strip_reasoning(text: str) -> str:
    """Return a response without its reasoning.

    Removes blocks of reasoning at the start, and complete `<think>` blocks anywhere. A block at the start without an end is the whole
    response: the model had no tokens left for an answer, so the result is empty. Text before a `</think>` without a `<think>` is also
    reasoning: some chat templates put the opening mark into the prompt. A text without marks is returned unchanged.
    """
    if "<" not in text and "[" not in text and "◁" not in text:
        return text
    rest = text
    while (after := _after_leading_block(rest)) is not None:
        rest = after
    first = _FIRST_MARK.search(rest)
    if first and first.group().startswith("</"):
        rest = rest[first.end() :]
    return _BLOCK.sub("", rest)


def _after_leading_block(text: str) -> str | None:
    """Return the text after the block of reasoning at its start, or None if it starts with none."""
    for start, end in _LEADING:
        opened = start.match(text)
        if opened:
            closed = end.search(text, opened.end())
            return text[closed.end() :] if closed else ""
    return None
