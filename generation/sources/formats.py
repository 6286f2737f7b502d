"""Converters from public row formats to the columns of this project. Pure functions: they read no files; the module imports no Ray.

The columns are `instruction` and `references`. Optional ones are `answer_choices`, `dataset`, `template`, `split` (`train` or
`validation`) and `example`. All instructions made from one underlying example share the text in `example`.

A converter takes one raw row and yields any number of rows. It does not check them: `row.row_error` reports a missing column.
A raw row that cannot be converted raises `ValueError` with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from generation.schema import SPLITS
from generation.sources import bigbench
from generation.sources.row import DeadLetter, dead_letter

Row = dict[str, Any]
Converter = Callable[[Mapping[str, Any]], Iterable[Row]]

# Columns of an instruction and its correct answer, in search order.
_PAIRS = (("instruction", "output"), ("inputs", "targets"), ("prompt", "completion"), ("question", "answer"))
_OPTIONAL_COLUMNS = ("dataset", "template", "split", "example", "answer_choices")


def detect_format(row: Any) -> str:
    """Return the name of the format of a row by its keys; `cappy`, the format of this project, if no other one matches."""
    keys = set(row) if isinstance(row, Mapping) else set()
    if {"inputs_pretokenized", "targets_pretokenized"} <= keys:
        return "p3"
    if {"Definition", "Instances"} <= keys:
        return "natural-instructions"
    if "messages" in keys:
        return "chat"
    if "examples" in keys and "instruction" not in keys:
        return "bigbench"
    if "references" not in keys and any({prompt, answer} <= keys for prompt, answer in _PAIRS):
        return "alpaca"
    return "cappy"


def convert_cappy(row: Mapping[str, Any]) -> Iterable[Row]:
    """Convert a row that has the columns of this project. A text in a list column is a JSON list (in a CSV cell) or a single item."""
    yield {**row, **{name: _parse_list(row[name]) for name in ("references", "answer_choices") if name in row}}


def _parse_list(value: Any) -> Any:
    """Return a list for a JSON list or a single text, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return [value]


def convert_p3(row: Mapping[str, Any]) -> Iterable[Row]:
    """Convert a row of P3 or T0: `inputs_pretokenized`, `targets_pretokenized` and, if the dataset has them, `answer_choices`."""
    yield {**_optional_columns(row), "instruction": row["inputs_pretokenized"], "references": _as_list(row["targets_pretokenized"])}


def merge_choices(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Merge the rows of P3's `_score_eval` datasets into one classification row per example.

    Those datasets have one row per choice, with `is_correct`. Consecutive rows with the same first number of `idx` and the same
    input are one example. Takes and yields `(location, row)`; a merged row has the location of its first row.
    """
    group: list[Mapping[str, Any]] = []
    first_location = ""
    for location, row in rows:
        scored = isinstance(row, Mapping) and "is_correct" in row and "idx" in row and "targets_pretokenized" in row
        if group and not (scored and _example_of(row) == _example_of(group[0])):
            yield first_location, _merged(group)
            group = []
        if scored:
            first_location = first_location if group else location
            group.append(row)
        else:
            yield location, row
    if group:
        yield first_location, _merged(group)


def _example_of(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the key of the example of a `_score_eval` row: the first number of `idx`, and the input."""
    idx = row["idx"]
    return idx[0] if isinstance(idx, list | tuple) and idx else idx, row.get("inputs_pretokenized")


def _merged(group: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return one P3 row for the rows of an example, one of each choice."""
    choices = [row["targets_pretokenized"] for row in group]
    correct = [row["targets_pretokenized"] for row in group if row["is_correct"]]
    return {**group[0], "targets_pretokenized": correct, "answer_choices": choices}


def convert_natural_instructions(row: Mapping[str, Any]) -> Iterable[Row]:
    """Convert a Super-NaturalInstructions task: a row per instance, made of the definition of the task and the input.

    Positive examples become train rows.
    """
    definition = "\n".join(_as_list(row["Definition"])).strip()
    for split, name in (("train", "Positive Examples"), (None, "Instances")):
        instances = row.get(name) or []
        if not isinstance(instances, list):
            raise ValueError(f"`{name}` is a {type(instances).__name__}; it must be a list")
        for instance in instances:
            if not isinstance(instance, Mapping) or not isinstance(instance.get("input"), str):
                yield {"instruction": None, "references": None}
                continue
            text = instance["input"].strip()
            yield {
                "instruction": f"Definition: {definition}\n\nNow complete the following example -\nInput: {text}\nOutput: ",
                "references": _as_list(instance.get("output")),
                "split": split,
                "example": text or None,
            }


def convert_bigbench(row: Mapping[str, Any]) -> Iterable[Row]:
    """Convert a BIG-bench JSON task: first the examples with a target, then multiple-choice examples as classification rows."""
    if not isinstance(row.get("examples"), list) or not all(isinstance(each, Mapping) for each in row["examples"]):
        raise ValueError("`examples` must be a list of objects with `input` and `target` or `target_scores`")
    dataset = row.get("name") if isinstance(row.get("name"), str) else None
    for example in [*bigbench.render_examples("", dict(row)), *bigbench.render_choices("", dict(row))]:
        yield {"dataset": dataset, **{key: value for key, value in example.items() if key != "subtask"}}


def convert_alpaca(row: Mapping[str, Any]) -> Iterable[Row]:
    """Convert a row in the style of Alpaca or FLAN: a question column, an optional `input` column and an answer column."""
    for prompt, answer in _PAIRS:
        if prompt in row and answer in row:
            question, given = row[prompt], row.get("input")
            if isinstance(question, str) and isinstance(given, str) and given.strip():
                question = f"{question.rstrip()}\n\n{given}"
            yield {**_optional_columns(row), "instruction": question, "references": _as_list(row[answer])}
            return
    raise ValueError(f"the row has no answer column; give one of {', '.join(' with '.join(pair) for pair in _PAIRS)}")


def convert_chat(row: Mapping[str, Any]) -> Iterable[Row]:
    """Convert a chat row of OpenAI: the last assistant turn is the reference, all turns before it are the instruction."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("`messages` must be a list of turns with `role` and `content`")
    last = max((number for number, turn in enumerate(turns) if turn.get("role") == "assistant"), default=None)
    if last is None:
        raise ValueError("`messages` has no assistant turn")
    before = [(str(turn.get("role")), _content(turn)) for turn in turns[:last]]
    system = [text for role, text in before if role in ("system", "developer")]
    dialogue = [(role, text) for role, text in before if role not in ("system", "developer")]
    # A single question stays unchanged; in a conversation each turn starts with its role.
    texts = [text for _, text in dialogue] if len(dialogue) == 1 else [f"{role.capitalize()}: {text}" for role, text in dialogue]
    yield {**_optional_columns(row), "instruction": "\n\n".join([*system, *texts]), "references": _as_list(_content(turns[last]))}


def _content(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn: its content, or its text parts joined. Raises `ValueError` for other content."""
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"the content of the {turn.get('role')} turn is not text")
    return content.strip()


def _optional_columns(row: Mapping[str, Any]) -> Row:
    """Return the optional columns of this project that a row of another format has."""
    found = {name: row[name] for name in _OPTIONAL_COLUMNS if row.get(name) is not None}
    if "answer_choices" in found:
        found["answer_choices"] = _parse_list(found["answer_choices"])
    # Public datasets use these names with other meanings too, e.g. `split: test`.
    if found.get("split") not in SPLITS:
        found.pop("split", None)
    return {name: value for name, value in found.items() if isinstance(value, str) or name == "answer_choices"}


def _as_list(value: Any) -> Any:
    """Return a single text as a list of one, and any other value unchanged."""
    return [value] if isinstance(value, str) else value


CONVERTERS: dict[str, Converter] = {
    "cappy": convert_cappy,
    "p3": convert_p3,
    "natural-instructions": convert_natural_instructions,
    "bigbench": convert_bigbench,
    "alpaca": convert_alpaca,
    "chat": convert_chat,
}


def convert_row(location: str, raw: Any, format: str) -> Iterator[tuple[str, Row] | tuple[str, DeadLetter]]:
    """Yield `(location, row)` for each row that a raw row converts to, or one dead letter.

    Args:
        location: location of the raw row.
        raw: the raw row, or a dead letter, which is passed on.
        format: name of the format, or `auto` to detect it.
    """
    if isinstance(raw, DeadLetter):
        yield location, raw
        return
    name = detect_format(raw) if format == "auto" else format
    if not isinstance(raw, Mapping):
        yield (
            location,
            dead_letter(location, f"the row is a {type(raw).__name__}; it must be an object with `instruction` and `references`", raw),
        )
        return
    try:
        for number, row in enumerate(CONVERTERS[name](raw), 1):
            yield (f"{location}#{number}" if name in ("natural-instructions", "bigbench") else location), row
    except KeyError as error:
        yield location, dead_letter(location, f"format {name} needs {error}; the row has {', '.join(map(str, raw)) or 'no key'}", raw)
    except ValueError as error:
        yield location, dead_letter(location, f"{error} (format {name})", raw)
