"""The own columns of rows in published files: the columns of the source beside those of the result. Pure; imports no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

_OWN_PREFIX = "source_"
_TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64(), "string": pa.string(), "json": pa.string()}


def published_names(columns: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Return the published names of own columns. A name in `taken`, the columns of the result, gets the prefix `source_`."""
    taken = set(taken)
    names: dict[str, str] = {}
    for name in columns:
        published = name
        while published in taken:
            published = f"{_OWN_PREFIX}{published}"
        taken.add(published)
        names[name] = published
    return names


def fields(columns: Mapping[str, str], names: Mapping[str, str]) -> list[pa.Field]:
    """Return the published fields; `columns` has the types by name, see `prompt_units.ColumnTypes`."""
    return [pa.field(names[name], _TYPES[kind]) for name, kind in columns.items()]


def values(own: str, columns: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the published values of a row; `own` is the JSON of the own columns, or empty."""
    found = json.loads(own) if own else {}
    return {names[name]: _as_type(found.get(name), kind) for name, kind in columns.items()}


def _as_type(value: Any, kind: str) -> Any:
    if value is None:
        return None
    return json.dumps(value, ensure_ascii=False) if kind == "json" else float(value) if kind == "double" else value
