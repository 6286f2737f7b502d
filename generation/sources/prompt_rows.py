"""Convert raw rows of prompts: references are optional, and the other columns of a row are kept. Pure functions; no Ray, no files.

`cappy answer` reads its source with these converters. A row without an answer is a row of one of these kinds:

- the columns of this project without `references`;
- a question column (`instruction`, `prompt`, `question`, ...) with the system prompt, the history and the context beside it;
- a chat whose last turn is not of the assistant: all its turns are the instruction;
- `inputs_pretokenized` alone.

Rows with an answer, and whole task files, are converted as in `sources.formats`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from generation.sources import chats, formats, question_answer
from generation.sources.row import OWN, DeadLetter, dead_letter, encodable
from generation.sources.values import as_text, as_texts, is_null

_TASK_FILES = ("natural-instructions", "bigbench")


def convert_row(location: str, raw: Any, format: str) -> Iterator[tuple[str, formats.Row] | tuple[str, DeadLetter]]:
    """Yield `(location, row)` for each prompt of a raw row, and a dead letter for each part that cannot be converted.

    The arguments are those of `formats.convert_row`.
    """
    name = _detect_format(raw) if format == "auto" else format
    if not isinstance(raw, Mapping) or name in _TASK_FILES:
        yield from formats.convert_row(location, raw, name)
        return
    try:
        row, used = _convert(raw, name)
    except KeyError as error:
        yield location, dead_letter(location, f"format {name} needs {error}; the row has {', '.join(map(str, raw)) or 'no key'}", raw)
    except ValueError as error:
        yield location, dead_letter(location, f"{error} (format {name})", raw)
    else:
        yield location, {**row, OWN: own_columns(raw, used)}


def own_columns(raw: Mapping[str, Any], used: frozenset[str] | set[str]) -> str:
    """Return the columns of a row that are not `used`, as JSON with sorted keys; the empty text without any.

    Values without a notation in JSON, for example images, are left out. NaN and infinity become null.
    """
    kept = {str(name): plain for name, value in raw.items() if name not in used and (plain := _plain(value)) is not _LEFT_OUT}
    return encodable(json.dumps(kept, ensure_ascii=False, sort_keys=True)) if kept else ""


def _detect_format(raw: Any) -> str:
    """Return the format of a row by its keys, also for a row without an answer."""
    found = formats.detect_format(raw)
    if found != "cappy" or not isinstance(raw, Mapping) or not is_null(raw.get("references")):
        return found
    if not is_null(raw.get("inputs_pretokenized")):
        return "p3"
    question = question_answer.find_question(raw)
    return found if question is None or not is_null(raw.get("label_index")) else "alpaca"


def _convert(raw: Mapping[str, Any], name: str) -> tuple[formats.Row, frozenset[str] | set[str]]:
    """Return the converted row and the names of the columns that it has in another form."""
    optional = formats.optional_columns(raw)
    if name == "p3":
        references = as_texts(raw.get("targets_pretokenized"), "targets_pretokenized")
        text = as_text(raw["inputs_pretokenized"], "inputs_pretokenized")
        return {**optional, "instruction": text, "references": references}, formats.columns_of(name)
    if name == "chat":
        column = next((each for each in formats.CHATS if raw.get(each) is not None), formats.CHATS[0])
        turns = chats.turns_of(raw.get(column), column)
        if turns and chats.has_turns_after_answer(turns):
            instruction = chats.render_turns([*formats.system_turns(raw), *chats.read_turns(turns)])
            return {**optional, "instruction": instruction, "references": None}, formats.columns_of(name)
    if name == "alpaca" and question_answer.find_pair(raw) is None:
        question = question_answer.find_question(raw)
        if question is None:
            raise ValueError(f"the row has no question column; give one of {', '.join(question_answer.QUESTIONS)}")
        row = {**optional, "instruction": question_answer.render_question(raw, question), "references": None}
        return row, question_answer.question_columns(question) | formats.OPTIONAL_COLUMNS
    used = question_answer.used_columns(raw) | formats.OPTIONAL_COLUMNS if name == "alpaca" else formats.columns_of(name)
    if name == "cappy" and is_null(raw.get("label_index")):
        used = used - {"task"}
    (found,) = formats.CONVERTERS[name](raw)
    assert isinstance(found, dict)  # these converters give one row or raise
    return found, used


_LEFT_OUT = object()


def _plain(value: Any) -> Any:
    """Return a value as JSON values, or `_LEFT_OUT` for bytes."""
    if isinstance(value, bytes | bytearray | memoryview):
        return _LEFT_OUT
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain for name, each in value.items() if (plain := _plain(each)) is not _LEFT_OUT}
    if isinstance(value, list | tuple):
        return [plain for each in value if (plain := _plain(each)) is not _LEFT_OUT]
    return str(value)
