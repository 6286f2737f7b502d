"""Convert rows of a question and its answer, in the column names of public datasets. Pure functions; the module imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generation.sources import chats
from generation.sources.values import as_text, as_texts, is_null

PAIRS = (
    ("instruction", "output"),  # Alpaca
    ("inputs", "targets"),  # FLAN
    ("prompt", "completion"),  # TRL
    ("question", "answer"),
    ("instruction", "response"),  # Dolly
    ("prompt", "response"),
    ("question", "answers"),  # SQuAD
    ("question", "response"),  # Orca
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("query", "answers"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("input", "output"),
    ("input", "target"),
)
"""Columns of an instruction and its correct answer, in search order."""
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "inputs", "input")
"""Question columns, in search order, for rows without an answer column."""
_BEFORE = ("system", "system_prompt", "definition")
_AFTER = ("input", "context", "passage")
_CHOICES = ("choices", "options")
COLUMNS = frozenset({name for pair in PAIRS for name in pair} | {*_BEFORE, *_AFTER, *_CHOICES, "history"})
"""Columns of a question-and-answer row, without the optional columns of this project."""


def find_pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the columns of the question and of the answer of a row, or None; a pair without missing values is preferred."""
    pairs = [pair for pair in PAIRS if pair[0] in row and pair[1] in row]
    full = (pair for pair in pairs if not is_null(row[pair[0]]) and not is_null(row[pair[1]]))
    return next(full, pairs[0] if pairs else None)


def used_columns(row: Mapping[str, Any]) -> set[str]:
    """Return the columns that `convert` reads of a row."""
    return {*(find_pair(row) or ()), *question_columns("history")}


def convert(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `instruction` and `references` of a row.

    The instruction is made of the system prompt, the turns of `history`, the question, and the input or context. Raises `ValueError`
    for a row without such columns, for a value that is not text, and for an answer that is not the text of one of the row's choices.
    """
    pair = find_pair(row)
    if pair is None:
        raise ValueError(f"the row has no answer column; give one of {', '.join(' with '.join(pair) for pair in PAIRS)}")
    question, answer = pair
    instruction = render_question(row, question)
    references = _references(row[answer], answer)
    _check_choices(row, answer, references or [])
    return {"instruction": instruction, "references": references}


def find_question(row: Mapping[str, Any]) -> str | None:
    """Return the question column of a row without an answer column; None if it has none."""
    return next((name for name in QUESTIONS if not is_null(row.get(name))), None)


def question_columns(question: str) -> set[str]:
    """Return the columns that `render_question` reads."""
    return {question, *_BEFORE, *_AFTER, "history"}


def render_question(row: Mapping[str, Any], question: str) -> str:
    """Return the instruction of a row whose question is in the column `question`. Raises `ValueError` for a value that is not text."""
    system = [text for name in _BEFORE if name != question and (text := _optional_text(row.get(name), name))]
    given = [text for name in _AFTER if name != question and (text := _optional_text(row.get(name), name))]
    history = chats.read_history(row.get("history"))
    if isinstance(row[question], list):
        turns = chats.read_turns(chats.turns_of(row[question], question))
    else:
        turns = [("user", as_text(row[question], question) or "")]
    *before, (role, text) = turns or [("user", "")]
    if text.strip() and given:
        text = "\n\n".join([text.rstrip(), *given])
    turns = [*(("system", each) for each in system), *history, *before, (role, text)]
    return chats.render_turns(turns) if text.strip() else text


def _optional_text(value: Any, name: str) -> str | None:
    """Return a text, a number as text, or the lines of a list of these; None if the column is missing or blank."""
    if isinstance(value, list | tuple):
        value = "\n".join(text for each in value if (text := as_text(each, name)) is not None)
    text = as_text(value, name)
    return text if text and text.strip() else None


def _references(value: Any, name: str) -> list[str] | None:
    if isinstance(value, list) and value and all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in value):
        if len(value) > 1:
            raise ValueError(f"`{name}` has {len(value)} turns; one is supported")
        return [text for _, text in chats.read_turns(value)]
    return as_texts(value, name)


def _check_choices(row: Mapping[str, Any], answer: str, references: list[str]) -> None:
    """Raise `ValueError` for an answer that is not one of the row's choices: it can be a letter, or a number from 0 or from 1."""
    for name in _CHOICES:
        choices = row.get(name)
        texts = as_texts(choices.get("text") if isinstance(choices, Mapping) else choices, name)
        other = [text for text in references if texts and text not in texts]
        if other:
            raise ValueError(f"`{answer}` is {other[0]!r}, which is not in `{name}`; give the text of the choice")
