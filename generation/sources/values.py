"""Convert values of raw rows to texts and lists of texts, and parse lists in CSV cells. Pure functions; the module imports no Ray.

A JSON string is a text, even if it holds JSON. Only a CSV file must write a list as text, so only CSV cells are parsed (`Cells`).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

# Columns that hold lists or objects in one of the formats.
_LIST_COLUMNS = frozenset(
    {"references", "answer_choices", "choices", "options", "targets_pretokenized", "answers", "outputs", "messages", "conversations"}
    | {"history", "Definition", "Positive Examples", "Instances", "examples", "idx"}
)
# Columns that hold a text or the turns of a chat.
_TURN_COLUMNS = frozenset({"prompt", "completion"})
# Columns that mostly hold one text: a list of texts in such a cell is ambiguous.
_TEXT_COLUMNS = frozenset({"output", "answer", "response", "completion", "target", "targets", "solution"})
_CALLS = frozenset({"array", "str_", "list", "tuple"})
_STRING = r"""[rRuU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_STRINGS = re.compile(_STRING, re.DOTALL)
_APART = re.compile(rf"{_STRING}(?:\s+{_STRING})*", re.DOTALL)
_MAYBE_ADJACENT = re.compile(r"""['"]\s*[rRuU]?['"]""")


class Cells(dict[str, Any]):
    """A row of a CSV file. Its values are texts, and a text may be the notation of a list."""


def is_null(value: Any) -> bool:
    """Return whether a value is missing: None or NaN."""
    return value is None or (isinstance(value, float) and value != value)


def number_as_text(value: Any) -> Any:
    """Return a number as text. Other values, also booleans and missing values, are unchanged."""
    return str(value) if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and not is_null(value) else value


def as_text(value: Any, name: str) -> str | None:
    """Return a text or a number as text, and None for a missing value. Raises `ValueError` for other values of the column `name`."""
    if is_null(value):
        return None
    value = number_as_text(value)
    if isinstance(value, str):
        return value
    raise ValueError(f"`{name}` is a {type(value).__name__}; it must be text")


def as_texts(value: Any, name: str) -> list[str] | None:
    """Return the texts of an answer column without missing ones, or None if the column is missing.

    An answer is a text, a number, a list of these, a list of objects with `text`, or an object with `text` (SQuAD) or with `value`
    and `aliases` (TriviaQA). Raises `ValueError` for other values.
    """
    if is_null(value):
        return None
    if isinstance(value, Mapping):
        if "text" in value:
            return as_texts(value["text"], f"{name}.text")
        if "value" in value:
            return [*(as_texts(value["value"], f"{name}.value") or []), *(as_texts(value.get("aliases"), f"{name}.aliases") or [])]
        raise ValueError(
            f"`{name}` is an object with {', '.join(map(str, value)) or 'no key'}; it must be text, a list of texts or have `text`"
        )
    if isinstance(value, list | tuple):
        each = [item["text"] if isinstance(item, Mapping) and "text" in item else item for item in value]
        return [text for item in each if (text := as_text(item, name)) is not None]
    text = as_text(value, name)
    return None if text is None else [text]


def as_choices(value: Any) -> Any:
    """Return the choices of a column as a list; a text has them separated by `|||`, as in PromptSource. Other values are unchanged."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str) and "|||" in value[0]:
        return [choice for text in value[0].split("|||") if (choice := text.strip())]
    return value


def parse_cells(row: Cells) -> dict[str, Any]:
    """Return a CSV row with the lists in its cells parsed. Raises `ValueError` for a cell that is neither clearly a list nor a text."""
    parsed: dict[str, Any] = dict(row)
    for name, cell in row.items():
        if not isinstance(cell, str) or not cell.strip().startswith(("[", "(", "{", "array(")):
            continue
        if name in _LIST_COLUMNS or (name in _TURN_COLUMNS and _is_list_of(dict, cell, name)):
            parsed[name] = parse_cell(cell, name)
        elif name in _TEXT_COLUMNS and _is_list_of(str, cell, name):
            raise ValueError(
                f"`{name}` is {_short(cell)}, which can be a list of answers or one text; name the column `references` for a list, "
                f"or use JSON lines for a text"
            )
    return parsed


def _is_list_of(kind: type, cell: str, name: str) -> bool:
    try:
        value = parse_cell(cell, name)
    except ValueError:
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(each, kind) for each in value)


def parse_cell(cell: str, name: str) -> Any:
    """Return the list or object that a cell writes in JSON, Python or numpy notation, else the cell itself.

    Raises `ValueError` for a cell in brackets that is in none of these notations: it can be a list or a text.
    """
    text = cell.strip()
    if (text[0], text[-1]) not in {("[", "]"), ("(", ")"), ("{", "}"), ("a", ")")}:
        return cell
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = _evaluate(ast.parse(text, mode="eval").body, text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    if isinstance(value, list) or (isinstance(value, dict) and text[0] == "{"):
        return value
    if text[0] == "[":
        raise ValueError(f'`{name}` is {_short(cell)}, which is not clearly a list or a text; write a JSON list, e.g. ["yes", "no"]')
    return cell


def _evaluate(node: ast.expr, source: str) -> Any:
    """Return the value of a literal: texts, numbers, nulls, lists, objects and arrays. Raises `ValueError` for anything else."""
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        if len(node.elts) == 1 and (texts := _adjacent_texts(node.elts[0], source)):
            return texts
        if isinstance(node, ast.Tuple | ast.Set) and not all(isinstance(each, ast.Constant) for each in node.elts):
            raise ValueError("not a list of texts")
        return [_single(each, source) for each in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {
            key.value: _single(value, source) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)
        }
    if isinstance(node, ast.Call) and node.args:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if function in _CALLS:
            return _single(node.args[0], source)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value  # type: ignore[operator]
    if isinstance(node, ast.Name) and node.id in ("nan", "null", "None"):
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    raise ValueError("not a literal")


def _single(node: ast.expr, source: str) -> Any:
    """Return the value of an element. Raises `ValueError` for adjacent texts beside a comma: Python would join them without a sign."""
    if _adjacent_texts(node, source):
        raise ValueError("texts without a comma between them")
    return _evaluate(node, source)


def _adjacent_texts(node: ast.expr, source: str) -> list[str]:
    """Return the texts of `'a' 'b'`: numpy writes an array of texts without commas. Empty for a single text and other nodes."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or not _MAYBE_ADJACENT.search(source):
        return []
    segment = ast.get_source_segment(source, node) or ""
    texts = _STRINGS.findall(segment)
    if len(texts) < 2:
        return []
    if not _APART.fullmatch(segment):
        raise ValueError("texts without a space between them")
    return [ast.literal_eval(text) for text in texts]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
