"""What a usable instruction row is, and what becomes of one that is not. Pure: no files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from generation.schema import SPLITS


@dataclass(frozen=True)
class DeadLetter:
    """A row that was left out."""

    where: str
    """File and line, or the row's id."""
    stage: str
    """`read` or `sample`."""
    reason: str
    row: str
    """The row as JSON, cut to 500 characters."""

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False)


@dataclass(frozen=True)
class Instruction:
    """A checked row: `references` has at least one text, none blank."""

    dataset: str
    template: str | None
    split: str
    instruction: str
    references: tuple[str, ...]
    answer_choices: tuple[str, ...] | None = None
    part: str = ""
    """The part of a mixture, or the source, that the row is from."""

    @property
    def id(self) -> str:
        """32 hex digits that change with the text or its place in a dataset, not with the split."""
        return hash_text(json.dumps([self.dataset, self.template, self.instruction, self.references], ensure_ascii=False), 16).hex()


def row_error(row: Any) -> str | None:
    """What is wrong with a row in our own columns, as one line that names the field and what it holds, or None."""
    if not isinstance(row, Mapping):
        return f"the row is a {type(row).__name__}; it must be an object with `instruction` and `references`"
    for name in ("instruction", "dataset", "template", "split", "example"):
        value = row.get(name)
        if value is None and name == "instruction":
            return f"`{name}` is missing; the row has {', '.join(map(str, row)) or 'no key'}"
        if value is not None and not isinstance(value, str):
            return f"`{name}` is a {type(value).__name__}; it must be text"
        if value is not None and not value.strip():
            return f"`{name}` is empty"
        if value is not None and not _encodes(value):
            return f"`{name}` holds a lone surrogate, which is no text"
    if row.get("split") is not None and row["split"] not in SPLITS:
        return f"`split` is {row['split']!r}; it must be train or validation"
    return _list_fault("references", row.get("references"), True) or _list_fault("answer_choices", row.get("answer_choices"), False)


def _list_fault(name: str, values: Any, required: bool) -> str | None:
    if values is None:
        return f"`{name}` is missing; give the correct responses as a list of texts" if required else None
    if not isinstance(values, list | tuple):
        return f"`{name}` is a {type(values).__name__}; it must be a list of texts"
    if not values:
        return f"`{name}` is empty; at least one text is needed"
    for value in values:
        if not isinstance(value, str):
            return f"`{name}` holds a {type(value).__name__}; each must be text"
        if not value.strip():
            return f"`{name}` holds an empty text"
        if not _encodes(value):
            return f"`{name}` holds a lone surrogate, which is no text"
    return None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def dead_letter(where: str, reason: str, row: Any) -> DeadLetter:
    """Return the dead letter of a row that could not be read."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=True, default=str)
    return DeadLetter(where=where, stage="read", reason=reason, row=text[:500])


def hash_text(text: str, size: int) -> bytes:
    """`size` bytes that change with the text, the same in every process; lone surrogates are allowed."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def hash_to_unit_interval(text: str) -> float:
    """A number in [0, 1) drawn by a text: the same text, the same number."""
    return int.from_bytes(hash_text(text, 7), "big") / 2**56
