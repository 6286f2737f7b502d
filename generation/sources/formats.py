"""From a raw row of a public format to rows in our own columns. Pure functions: no files.

Our columns are `instruction`, `references` and, where known, `answer_choices`, `dataset`, `template`, `split` (`train` or
`validation`) and `example` (a text that all instructions made of the same underlying example share).
A converter takes one raw row and yields any number of such rows; what is missing is left for `row.fault` to name. A raw row
it can make nothing of raises `ValueError` with the reason.
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

# Columns an instruction and its right answer stand in, in the order they are looked for.
_PAIRS = (("instruction", "output"), ("inputs", "targets"), ("prompt", "completion"), ("question", "answer"))
_KNOWN = ("dataset", "template", "split", "example", "answer_choices")


def detect_format(row: Any) -> str:
    """Return the name of a row's format by its keys; `cappy`, our own, where no other fits."""
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
    """Our own columns. A CSV cell holds a list as JSON; a single reference may stand as it is."""
    yield {**row, **{name: _listed(row[name]) for name in ("references", "answer_choices") if name in row}}


def _listed(value: Any) -> Any:
    """A list written as JSON, or one text, as a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return [value]


def convert_p3(row: Mapping[str, Any]) -> Iterable[Row]:
    """P3 and T0: `inputs_pretokenized` and `targets_pretokenized`, with `answer_choices` where the set has them."""
    yield {**_known(row), "instruction": row["inputs_pretokenized"], "references": _texts(row["targets_pretokenized"])}


def merge_choices(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Merge the rows of P3's `_score_eval` sets, one a choice with `is_correct`, to one classification row an example.

    Rows are of one example while they follow each other with the same `idx` (its first number) and input.
    """
    group: list[Mapping[str, Any]] = []
    place = ""
    for where, row in rows:
        scored = isinstance(row, Mapping) and "is_correct" in row and "idx" in row and "targets_pretokenized" in row
        if group and not (scored and _example_of(row) == _example_of(group[0])):
            yield place, _merged(group)
            group = []
        if scored:
            place = place if group else where
            group.append(row)
        else:
            yield where, row
    if group:
        yield place, _merged(group)


def _example_of(row: Mapping[str, Any]) -> tuple[Any, Any]:
    idx = row["idx"]
    return idx[0] if isinstance(idx, list | tuple) and idx else idx, row.get("inputs_pretokenized")


def _merged(group: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    choices = [row["targets_pretokenized"] for row in group]
    right = [row["targets_pretokenized"] for row in group if row["is_correct"]]
    return {**group[0], "targets_pretokenized": right, "answer_choices": choices}


def convert_natural_instructions(row: Mapping[str, Any]) -> Iterable[Row]:
    """A Super-NaturalInstructions task: each instance is its definition and its input; positive examples are train rows."""
    definition = "\n".join(_texts(row["Definition"])).strip()
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
                "references": _texts(instance.get("output")),
                "split": split,
                "example": text or None,
            }


def convert_bigbench(row: Mapping[str, Any]) -> Iterable[Row]:
    """A BIG-bench JSON task: its examples with a target, then its multiple-choice ones as classification rows."""
    if not isinstance(row.get("examples"), list) or not all(isinstance(each, Mapping) for each in row["examples"]):
        raise ValueError("`examples` must be a list of objects with `input` and `target` or `target_scores`")
    dataset = row.get("name") if isinstance(row.get("name"), str) else None
    for example in [*bigbench.render_examples("", dict(row)), *bigbench.render_choices("", dict(row))]:
        yield {"dataset": dataset, **{key: value for key, value in example.items() if key != "subtask"}}


def convert_alpaca(row: Mapping[str, Any]) -> Iterable[Row]:
    """Alpaca and FLAN styles: a column with the question, perhaps one with its input, and one with the answer."""
    for prompt, answer in _PAIRS:
        if prompt in row and answer in row:
            question, given = row[prompt], row.get("input")
            if isinstance(question, str) and isinstance(given, str) and given.strip():
                question = f"{question.rstrip()}\n\n{given}"
            yield {**_known(row), "instruction": question, "references": _texts(row[answer])}
            return
    raise ValueError(f"no column of an answer is there; one of {', '.join(' with '.join(pair) for pair in _PAIRS)} is needed")


def convert_chat(row: Mapping[str, Any]) -> Iterable[Row]:
    """OpenAI's chat rows: the last assistant turn is the reference, the turns before it are the instruction."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("`messages` must be a list of turns with `role` and `content`")
    last = max((number for number, turn in enumerate(turns) if turn.get("role") == "assistant"), default=None)
    if last is None:
        raise ValueError("`messages` has no assistant turn")
    before = [(str(turn.get("role")), _content(turn)) for turn in turns[:last]]
    system = [text for role, text in before if role in ("system", "developer")]
    spoken = [(role, text) for role, text in before if role not in ("system", "developer")]
    # One question stands as it is; in a conversation each turn says whose it is.
    said = [text for _, text in spoken] if len(spoken) == 1 else [f"{role.capitalize()}: {text}" for role, text in spoken]
    yield {**_known(row), "instruction": "\n\n".join([*system, *said]), "references": _texts(_content(turns[last]))}


def _content(turn: Mapping[str, Any]) -> str:
    """A turn's text: its content, or that of its text parts."""
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"the content of the {turn.get('role')} turn is no text")
    return content.strip()


def _known(row: Mapping[str, Any]) -> Row:
    """What of our own columns a row of another format has beside its own."""
    known = {name: row[name] for name in _KNOWN if row.get(name) is not None}
    if "answer_choices" in known:
        known["answer_choices"] = _listed(known["answer_choices"])
    # Public sets use these names for other things too, e.g. `split: test`.
    if known.get("split") not in SPLITS:
        known.pop("split", None)
    return {name: value for name, value in known.items() if isinstance(value, str) or name == "answer_choices"}


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


CONVERTERS: dict[str, Converter] = {
    "cappy": convert_cappy,
    "p3": convert_p3,
    "natural-instructions": convert_natural_instructions,
    "bigbench": convert_bigbench,
    "alpaca": convert_alpaca,
    "chat": convert_chat,
}


def convert_row(where: str, raw: Any, format: str) -> Iterator[tuple[str, Row] | tuple[str, DeadLetter]]:
    """Yield `(place, row in our columns)` for what a raw row holds, or a dead letter; `format` may be `auto`."""
    if isinstance(raw, DeadLetter):
        yield where, raw
        return
    name = detect_format(raw) if format == "auto" else format
    if not isinstance(raw, Mapping):
        yield where, dead_letter(where, f"the row is a {type(raw).__name__}; it must be an object with `instruction` and `references`", raw)
        return
    try:
        for number, row in enumerate(CONVERTERS[name](raw), 1):
            yield (f"{where}#{number}" if name in ("natural-instructions", "bigbench") else where), row
    except KeyError as error:
        yield where, dead_letter(where, f"format {name} needs {error}; the row has {', '.join(map(str, raw)) or 'no key'}", raw)
    except ValueError as error:
        yield where, dead_letter(where, f"{error} (format {name})", raw)
