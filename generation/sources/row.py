"""The checked instruction row, the dead letter of a rejected row, and hashes of texts. Reads no files; imports no Ray."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from generation.schema import SPLITS

OWN = "cappy:own"
"""Key of a converted row with its other columns, as the JSON of an object; see `sources.prompt_rows`."""


@dataclass(frozen=True)
class DeadLetter:
    """A rejected row with the reason."""

    where: str
    """File and line, or the row's id."""
    stage: str
    """`read`, `sample` or `label`."""
    reason: str
    row: str
    """The row as JSON, cut to 500 characters."""

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False)


@dataclass(frozen=True)
class Instruction:
    """A checked row. No text in `references` is blank; it is empty only if the source was read as prompts."""

    dataset: str
    template: str | None
    split: str
    instruction: str
    references: tuple[str, ...]
    answer_choices: tuple[str, ...] | None = None
    part: str = ""
    """Name of the source of the row: the part of a mixture, or the only source."""
    split_by_hash: bool = False
    """Whether the hash of the example chose the split; otherwise the row of the source has it."""
    also_right: tuple[str, ...] = ()
    """References of other rows with the same instruction, of any dataset, template, split and choices."""
    id_has_choices: bool = False
    """Whether the id includes the choices, because an earlier row differs in its choices only."""
    own: str = ""
    """The other columns of the row as a JSON object, if the source was read as prompts; see `sources.prompt_rows`."""

    @property
    def id(self) -> str:
        """Return 32 hex digits that hash dataset, template, instruction, references and `own`. They do not depend on the split."""
        identity: list[Any] = [self.dataset, self.template, self.instruction, self.references]
        if self.id_has_choices:
            identity.append(self.answer_choices)
        if self.own:
            identity.append({"own": self.own})
        return hash_text(json.dumps(identity, ensure_ascii=False), 16).hex()


def row_error(row: Any, needs_references: bool = True) -> str | None:
    """Return the first problem of a row in this project's columns, or None if the row is valid.

    The problem is one line with the field and the type or value found in it. Without `needs_references`, `references` may be missing
    or an empty list.
    """
    if not isinstance(row, Mapping):
        return f"the row is a {type(row).__name__}; it must be an object with `instruction` and `references`"
    for name in ("instruction", "dataset", "template", "split", "example"):
        value = row.get(name)
        if value is None and name == "instruction":
            found = [str(key) for key, each in row.items() if each is not None and key != OWN]
            return f"`{name}` is missing; the row has {', '.join(found) or 'no key'}"
        if value is not None and not isinstance(value, str):
            return f"`{name}` is a {type(value).__name__}; it must be text"
        if value is not None and not value.strip():
            return f"`{name}` is empty"
        if value is not None and not is_encodable(value):
            return f"`{name}` holds a lone surrogate, which is not valid text"
    if row.get("split") is not None and row["split"] not in SPLITS:
        return f"`split` is {row['split']!r}; it must be train or validation"
    references, choices = row.get("references"), row.get("answer_choices")
    if not needs_references:
        references = references or None
    return (
        _list_error("references", references, needs_references)
        or _list_error("answer_choices", choices, False)
        or _choice_error(references, choices)
    )


def _list_error(name: str, values: Any, required: bool) -> str | None:
    """Return the first problem of a list of texts, or None."""
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
        if not is_encodable(value):
            return f"`{name}` holds a lone surrogate, which is not valid text"
    return None


def _choice_error(references: Any, choices: Any) -> str | None:
    """Return the problem of a classification row with one choice, or with a reference that is not a choice."""
    if choices is None:
        return None
    texts = {choice.strip() for choice in choices}
    if len(texts) < 2:
        return f"`answer_choices` has one choice, {choices[0]!r}; a classification row needs two"
    other = [text for text in references or () if text.strip() not in texts]
    return f"`references` holds {other[0]!r}, which is not in `answer_choices`" if other else None


def is_encodable(text: str) -> bool:
    """Return whether UTF-8 can encode a text. A lone surrogate is half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def dead_letter(location: str, reason: str, row: Any) -> DeadLetter:
    """Return the dead letter of a row that was rejected while reading, with stage `read`.

    The reason becomes one line of at most 1,000 characters, and all texts can be encoded as UTF-8.
    """
    try:
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=True, default=str, skipkeys=True)
    except (RecursionError, ValueError):
        text = f"a {type(row).__name__} that cannot be written as JSON"
    line = " ".join(reason.splitlines())[:1000]
    return DeadLetter(where=encodable(location), stage="read", reason=encodable(line), row=encodable(text[:500]))


def encodable(text: str) -> str:
    """Return a text with each lone surrogate escaped, e.g. `\\ud800`, so that it can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def fold_text(text: str) -> str:
    """Return a text in NFKC without case, its white space collapsed: equal for two spellings of the same instruction."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash_text(text: str, size: int) -> bytes:
    """Return the BLAKE2b hash of a text, `size` bytes long. Lone surrogates are allowed."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def hash_to_unit_interval(text: str) -> float:
    """Return a number in [0, 1) that is a function of the text alone, uniform over texts."""
    return int.from_bytes(hash_text(text, 7), "big") / 2**56
