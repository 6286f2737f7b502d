"""Converters from public row formats to the columns of this project. Pure functions: they read no files; the module imports no Ray.

The columns are `instruction` and `references`. Optional ones are `answer_choices`, `dataset`, `template`, `split` (`train` or
`validation`) and `example`. All instructions made from one underlying example share the text in `example`.

A converter takes one raw row. It yields rows, and the reason for each part of the raw row that cannot be converted. It does not check
the rows: `row.row_error` reports a missing column. A raw row that cannot be converted raises `ValueError` with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from generation.sources import bigbench, chats, question_answer
from generation.sources.folders import split_of_word
from generation.sources.row import DeadLetter, dead_letter
from generation.sources.values import Cells, as_choices, as_text, as_texts, is_null, number_as_text, parse_cells

Row = dict[str, Any]
Converter = Callable[[Mapping[str, Any]], Iterable[Row | str]]

OPTIONAL_COLUMNS = frozenset({"dataset", "template", "split", "example", "answer_choices"})
CHATS = ("messages", "conversations")
_PROMPT = {"system", "system_prompt"}
# Columns that each converter reads. All other columns of a row are not used.
_COLUMNS: dict[str, frozenset[str]] = {
    "cappy": frozenset({"instruction", "references", "label_index", "task", *OPTIONAL_COLUMNS}),
    "p3": frozenset({"inputs_pretokenized", "targets_pretokenized", "idx", "is_correct", *OPTIONAL_COLUMNS}),
    "natural-instructions": frozenset({"Definition", "Positive Examples", "Instances"}),
    "bigbench": frozenset({"name", *bigbench.TASK_KEYS}),
    "alpaca": frozenset({*question_answer.COLUMNS, *OPTIONAL_COLUMNS}),
    "chat": frozenset({*CHATS, *_PROMPT, *OPTIONAL_COLUMNS}),
}


def detect_format(row: Any) -> str:
    """Return the name of the format of a row by its keys; `cappy`, the format of this project, if no other one matches."""
    if not isinstance(row, Mapping):
        return "cappy"
    keys = {name for name, value in row.items() if value is not None}
    if {"inputs_pretokenized", "targets_pretokenized"} <= keys:
        return "p3"
    if {"Definition", "Instances"} <= keys:
        return "natural-instructions"
    if any(name in keys for name in CHATS):
        return "chat"
    if "references" not in row and question_answer.find_pair(row):
        return "alpaca"
    return "bigbench" if "examples" in keys and "instruction" not in keys else "cappy"


def columns_of(format: str) -> frozenset[str]:
    """Return the columns that the converter of a format reads; those of all formats for `auto`."""
    return frozenset().union(*_COLUMNS.values()) if format == "auto" else _COLUMNS[format]


def unused_fields(row: Mapping[str, Any], format: str) -> set[str]:
    """Return the keys of a row whose values do not get into the converted rows."""
    name = detect_format(row) if format == "auto" else format
    used = question_answer.used_columns(row) | {*OPTIONAL_COLUMNS} if name == "alpaca" else _COLUMNS[name]
    if name == "cappy" and is_null(row.get("label_index")):
        used = used - {"task"}
    unused = {str(key) for key, value in row.items() if key not in used and value is not None}
    if name == "chat":
        unused |= {f"{key}, turns after the last answer" for key in CHATS if chats.has_turns_after_answer(row.get(key))}
    return unused


def convert_cappy(row: Mapping[str, Any]) -> Iterable[Row | str]:
    """Convert a row that has the columns of this project.

    A classification row can have `label_index` instead of `references`: the position of the right choice in `answer_choices`. Such a
    row can have its dataset in `task`. A text in a list column is a single item, and numbers become texts. Missing references are
    left out. A split with another name, e.g. `test` or `dev`, becomes `validation`.
    """
    found = dict(row)
    found["instruction"] = number_as_text(found.get("instruction"))
    references = number_as_text(found.get("references"))
    if isinstance(references, str):
        references = [references]
    if isinstance(references, list | tuple):
        found["references"] = [number_as_text(each) for each in references if not is_null(each)]
    if "answer_choices" in found:
        choices = as_choices(found["answer_choices"])
        found["answer_choices"] = [number_as_text(each) for each in choices] if isinstance(choices, list | tuple) else choices
    if is_null(references) and not is_null(found.get("label_index")):
        index, choices = found["label_index"], found.get("answer_choices")
        if not isinstance(index, int) or not isinstance(choices, list) or not 0 <= index < len(choices):
            count = len(choices) if isinstance(choices, list) else 0
            raise ValueError(f"`label_index` is {index!r}; it must be a position in the {count} `answer_choices`, counted from 0")
        found["references"] = [choices[index]]
        found["dataset"] = found.get("dataset") or found.get("task")
    if isinstance(found.get("split"), str):
        found["split"] = split_of_word(found["split"]) or found["split"]
    yield found


def convert_p3(row: Mapping[str, Any]) -> Iterable[Row | str]:
    """Convert a row of P3 or T0: `inputs_pretokenized`, `targets_pretokenized` and, if the dataset has them, `answer_choices`."""
    yield {
        **optional_columns(row),
        "instruction": as_text(row["inputs_pretokenized"], "inputs_pretokenized"),
        "references": as_texts(row["targets_pretokenized"], "targets_pretokenized"),
    }


def merge_choices(rows: Iterable[tuple[str, Any]], merged: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Merge the rows of P3's `_score_eval` datasets into one classification row per example.

    Those datasets have one row per choice, with `is_correct`. Consecutive rows with the same first number of `idx` and the same
    input are one example. Takes and yields `(location, row)`; a merged row has the location of its first row. `merged` counts the rows
    that are merged into another one.
    """
    group: list[Mapping[str, Any]] = []
    first_location = ""
    for location, row in rows:
        scored = isinstance(row, Mapping) and "is_correct" in row and "idx" in row and "targets_pretokenized" in row
        if group and not (scored and _example_of(row) == _example_of(group[0])):
            yield first_location, _merged(group)
            merged["rows"] += len(group) - 1
            group = []
        if scored:
            first_location = first_location if group else location
            group.append(row)
        else:
            yield location, row
    if group:
        yield first_location, _merged(group)
        merged["rows"] += len(group) - 1


def _example_of(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the key of the example of a `_score_eval` row: the first number of `idx`, and the input."""
    idx = row["idx"]
    return idx[0] if isinstance(idx, list | tuple) and idx else idx, row.get("inputs_pretokenized")


def _merged(group: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return one P3 row for the rows of an example, one of each choice."""
    choices = [row["targets_pretokenized"] for row in group]
    correct = [row["targets_pretokenized"] for row in group if row["is_correct"] not in (None, False, "False", "false", "0")]
    return {**group[0], "targets_pretokenized": correct, "answer_choices": choices}


def convert_natural_instructions(row: Mapping[str, Any]) -> Iterable[Row | str]:
    """Convert a Super-NaturalInstructions task: a row per instance, made of the definition of the task and the input.

    Positive examples become train rows.
    """
    definition = "\n".join(as_texts(row["Definition"], "Definition") or []).strip()
    instances = []
    for split, name in (("train", "Positive Examples"), (None, "Instances")):
        found = row.get(name) or []
        if not isinstance(found, list):
            raise ValueError(f"`{name}` is a {type(found).__name__}; it must be a list")
        instances += [(split, name, instance) for instance in found]
    for split, name, instance in instances:
        try:
            if not isinstance(instance, Mapping):
                raise ValueError(f"an item of `{name}` is a {type(instance).__name__}; it must have `input` and `output`")
            text = as_text(instance.get("input"), "input")
            references = as_texts(instance.get("output"), "output")
            if text is None or not references:
                raise ValueError(f"an item of `{name}` has no {'`input`' if text is None else '`output`'}")
        except ValueError as error:
            yield str(error)
            continue
        yield {
            "instruction": f"Definition: {definition}\n\nNow complete the following example -\nInput: {text.strip()}\nOutput: ",
            "references": references,
            "split": split,
            "example": text.strip() or None,
        }


def convert_bigbench(row: Mapping[str, Any]) -> Iterable[Row | str]:
    """Convert a BIG-bench JSON task: first the examples with a target, then multiple-choice examples as classification rows."""
    if not isinstance(row.get("examples"), list) or not all(isinstance(each, Mapping) for each in row["examples"]):
        raise ValueError("`examples` must be a list of objects with `input` and `target` or `target_scores`")
    dataset = row.get("name") if isinstance(row.get("name"), str) else None
    converted = [bigbench.render_example("", row, example) for example in row["examples"]]
    for example in sorted(converted, key=lambda each: isinstance(each, str) or "answer_choices" in each):
        if isinstance(example, str):
            yield example
        else:
            yield {"dataset": dataset, **{key: value for key, value in example.items() if key != "subtask"}}


def convert_alpaca(row: Mapping[str, Any]) -> Iterable[Row | str]:
    """Convert a row of a question and its answer, in the style of Alpaca, FLAN, Dolly, Orca, SQuAD and others."""
    yield {**optional_columns(row), **question_answer.convert(row)}


def convert_chat(row: Mapping[str, Any]) -> Iterable[Row | str]:
    """Convert a chat of OpenAI or ShareGPT: the last assistant turn is the reference, all turns before it are the instruction."""
    name = next((name for name in CHATS if row.get(name) is not None), CHATS[0])
    before, answer = chats.split_chat(chats.turns_of(row.get(name), name), name)
    yield {**optional_columns(row), "instruction": chats.render_turns([*system_turns(row), *before]), "references": [answer]}


def system_turns(row: Mapping[str, Any]) -> list[chats.Turn]:
    """Return the system prompt in the columns beside a chat as turns."""
    return [("system", text) for key in sorted(_PROMPT) if (text := as_text(row.get(key), key)) and text.strip()]


def optional_columns(row: Mapping[str, Any]) -> Row:
    """Return the optional columns of this project that a row of another format has."""
    found = {name: row[name] for name in sorted(OPTIONAL_COLUMNS) if row.get(name) is not None}
    if "answer_choices" in found:
        # P3 gives generation rows an empty list.
        found["answer_choices"] = as_choices(found["answer_choices"]) or None
    if isinstance(found.get("split"), str):
        # Public datasets use this name with other meanings too. The rows of a test split must not become train rows.
        found["split"] = split_of_word(found["split"])
    return {name: value for name, value in found.items() if (isinstance(value, str) and value) or name == "answer_choices"}


CONVERTERS: dict[str, Converter] = {
    "cappy": convert_cappy,
    "p3": convert_p3,
    "natural-instructions": convert_natural_instructions,
    "bigbench": convert_bigbench,
    "alpaca": convert_alpaca,
    "chat": convert_chat,
}


def parse_lists(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Parse the lists in rows of CSV files; a row with a cell that is not clearly a list or a text becomes a dead letter."""
    for location, row in rows:
        try:
            yield location, parse_cells(row) if isinstance(row, Cells) else row
        except ValueError as error:
            yield location, dead_letter(location, str(error), row)


def convert_row(location: str, raw: Any, format: str) -> Iterator[tuple[str, Row] | tuple[str, DeadLetter]]:
    """Yield `(location, row)` for each row that a raw row converts to, and a dead letter for each part that cannot be converted.

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
    number = 0
    try:
        for number, row in enumerate(CONVERTERS[name](raw), 1):
            part = f"{location}#{number}" if name in ("natural-instructions", "bigbench") else location
            if isinstance(row, str):
                yield part, dead_letter(part, f"{row} (format {name})", raw)
            else:
                yield part, row
        if not number:
            yield location, dead_letter(location, f"the task has no example (format {name})", raw)
    except KeyError as error:
        yield location, dead_letter(location, f"format {name} needs {error}; the row has {', '.join(map(str, raw)) or 'no key'}", raw)
    except ValueError as error:
        yield location, dead_letter(location, f"{error} (format {name})", raw)
