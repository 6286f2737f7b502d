"""Convert raw rows to pairs of an instruction and a response, with the other columns of the row. Pure functions; no Ray, no files.

`cappy score` reads its source with these converters. A row gives a pair for each of its responses:

- the columns that `--prompt` and `--response` name;
- a list of `candidates` with an instruction (regression sets, answers with their pool);
- a chat (`messages`, `conversations`): the last assistant turn is the response, the turns before it are the instruction;
- `chosen` and `rejected` with a prompt or as chats (TRL), and `query` with `documents` (sentence-transformers);
- `inputs_pretokenized` and `targets_pretokenized` (P3);
- a question and an answer in the column names of public datasets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from generation.sources import chats, formats, prompt_rows, question_answer
from generation.sources.row import DeadLetter, dead_letter, hash_text, is_encodable
from generation.sources.values import as_text, as_texts, is_null

_PREFERENCE = ("chosen", "rejected")
NAMES = "instruction/response, prompt/completion, question/answer, messages, conversations, chosen/rejected or query/documents"
"""Columns of pairs, for errors."""


@dataclass(frozen=True)
class Columns:
    """The columns with the texts of a pair. None finds them by the names of public datasets."""

    prompt: str | None = None
    response: str | None = None


FIND = Columns()
"""Finds both columns."""
PUBLISHED = Columns("instruction", "response")
"""The columns of folders that `generate`, `answer`, `score` and `push --pairs` publish."""


@dataclass(frozen=True)
class Pair:
    """An instruction and a response. The texts are valid Unicode, and the instruction is not blank."""

    instruction: str
    response: str
    own: str = ""
    """The other columns of the row, as the JSON of an object; see `prompt_rows.own_columns`."""

    @property
    def id(self) -> str:
        """Return 32 hex digits that hash the two texts and `own`. Equal rows have equal ids."""
        return hash_text(json.dumps([self.instruction, self.response, self.own], ensure_ascii=False), 16).hex()


def convert_row(location: str, raw: Any, columns: Columns = FIND) -> Iterator[Pair | DeadLetter]:
    """Yield the pairs of a raw row, and a dead letter for the row or for each response that cannot be scored.

    Args:
        location: Location of the raw row.
        raw: The raw row, or a dead letter, which is passed on.
        columns: The columns with the texts.
    """
    if isinstance(raw, DeadLetter):
        yield raw
        return
    if not isinstance(raw, Mapping):
        yield dead_letter(location, f"the row is a {type(raw).__name__}; it must be an object with a prompt and a response", raw)
        return
    try:
        found = list(_pairs(raw, columns))
    except ValueError as error:
        yield dead_letter(location, str(error), raw)
        return
    for number, (instruction, response, kept) in enumerate(found, 1):
        place = f"{location}#{number}" if len(found) > 1 else location
        reason = _text_error("instruction", instruction) or _text_error("response", response)
        if reason is None and not instruction.strip():
            reason = "the instruction is empty"
        yield dead_letter(place, reason, raw) if reason else Pair(instruction, response, prompt_rows.own_columns(kept, frozenset()))


def _text_error(name: str, text: str) -> str | None:
    return None if is_encodable(text) else f"the {name} holds a lone surrogate, which is not valid text"


def _pairs(raw: Mapping[str, Any], columns: Columns) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield instruction, response and the kept columns of each pair. Raises `ValueError` with the reason if the row has none."""
    instruction = columns.prompt or "instruction"
    if _is_pool(raw.get("candidates"), columns) and isinstance(raw.get(instruction), str):
        for candidate in raw["candidates"]:
            kept = _without(raw, "candidates", instruction, "response") | _without(candidate, "response")
            yield raw[instruction], _text(candidate, "response"), kept
    elif columns.prompt or columns.response:
        yield from _named_pairs(raw, columns)
    elif name := next((each for each in formats.CHATS if not is_null(raw.get(each))), None):
        before, response = chats.split_chat(chats.turns_of(raw[name], name), name)
        yield chats.render_turns([*formats.system_turns(raw), *before]), response, raw
    elif all(not is_null(raw.get(name)) for name in _PREFERENCE):
        yield from _preference_pairs(raw)
    elif isinstance(raw.get("documents"), list | tuple) and isinstance(raw.get("query"), str):
        for document in _all_texts(raw["documents"], "documents"):
            yield raw["query"], document, _without(raw, "query", "documents", "scores")
    elif not is_null(raw.get("inputs_pretokenized")):
        for target in _responses(raw, "targets_pretokenized"):
            yield _text(raw, "inputs_pretokenized"), target, _without(raw, "inputs_pretokenized", "targets_pretokenized")
    else:
        yield from _question_pairs(raw)


def _is_pool(value: Any, columns: Columns) -> bool:
    """Return whether a value is a list of candidates with responses."""
    return columns.response in (None, "response") and _are_objects(value, "response")


def _named_pairs(raw: Mapping[str, Any], columns: Columns) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the pair in the named columns, as they are. A column that is not named is found by its usual names."""
    known = question_answer.find_pair(raw)
    prompt = columns.prompt or (known[0] if known else question_answer.find_question(raw))
    response = columns.response or (known[1] if known else "response")
    _check_column("prompt", columns.prompt, prompt, raw)
    _check_column("response", columns.response, response, raw)
    assert prompt is not None
    yield _text(raw, prompt), _text(raw, response), _without(raw, prompt, response)


def _check_column(option: str, given: str | None, name: str | None, raw: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a row has no column `name`. `given` is the value of the option, or None if the column was searched."""
    if name is None or name not in raw:
        reason = f"--{option}={given}: the row has no such column" if given else f"no column has the {option}; name one with --{option}"
        raise ValueError(f"{reason}; it has {', '.join(map(str, raw)) or 'no key'}")


def _preference_pairs(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the chosen and the rejected response of a row; `preference` is the column of the response."""
    question = question_answer.find_question(raw)
    for name in _PREFERENCE:
        kept = _without(raw, *_PREFERENCE, *([question] if question else [])) | {"preference": name}
        if question is None:
            before, response = chats.split_chat(chats.turns_of(raw[name], name), name)
            yield chats.render_turns(before), response, kept
            continue
        value = raw[name]
        is_chat = isinstance(value, list | tuple)
        response = chats.split_chat(chats.turns_of(value, name), name)[1] if is_chat else _text(raw, name)
        yield question_answer.render_question(raw, question), response, kept


def _question_pairs(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the pairs of a question and its answers, with the context columns of the row in the instruction.

    All columns are kept, except a question and an answer that are scored as they are.
    """
    plain = all(not is_null(raw.get(name)) for name in ("instruction", "response"))
    pair = ("instruction", "response") if plain else question_answer.find_pair(raw)
    if pair is None:
        raise ValueError(
            f"the row has no columns of a pair; it has {', '.join(map(str, raw)) or 'no key'}; give {NAMES}, "
            f"or name the columns with --prompt and --response"
        )
    question, answer = pair
    if is_null(raw[question]):
        raise ValueError(f"`{question}` is missing")
    alone = isinstance(raw[question], str) and not (question_answer.question_columns(question) - {question}) & raw.keys()
    used = [*([question] if alone else []), *([answer] if isinstance(raw[answer], str) else [])]
    instruction = raw[question] if alone else question_answer.render_question(raw, question)
    for response in _responses(raw, answer):
        yield instruction, response, _without(raw, *used)


def _responses(raw: Mapping[str, Any], name: str) -> list[str]:
    value = raw.get(name)
    if _are_objects(value, "role", "from"):
        return [chats.split_chat(value, name)[1]]
    return _all_texts(value, name)


def _all_texts(value: Any, name: str) -> list[str]:
    texts = as_texts(value, name)
    if not texts:
        raise ValueError(f"`{name}` is {'missing' if texts is None else 'empty'}")
    return texts


def _text(raw: Mapping[str, Any], name: str) -> str:
    text = as_text(raw.get(name), name)
    if text is None:
        raise ValueError(f"`{name}` is missing")
    return text


def _without(raw: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


def _are_objects(value: Any, *keys: str) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Return whether a value is a list of objects that each have one of the keys, and is not empty."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(each, Mapping) and any(key in each for key in keys) for each in value)
