"""Read the source of `cappy export`: any published folder of Parquet files with prompts and responses, as flat candidate tables.

A row of a source has one response (the pairs of a set, scores, answers), or a list of `candidates` (a regression set, answers with
their pool). Imports no Ray. Only `open_source` reads files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import artifacts, storage
from cluster.errors import UsageError

CANDIDATES = "candidates"
"""The column with the pool of a row, a list of structs."""
FLAT = pa.schema([("prompt", pa.large_string()), ("response", pa.large_string()), ("value", pa.float64()), ("source", pa.string())])
"""A candidate: `value` is null without a value, `source` is null unless the set is a regression set."""


@dataclass(frozen=True)
class Source:
    """A published folder with Parquet files."""

    uri: str
    manifest: Mapping[str, Any]
    files: Mapping[str, Any]
    """The manifest's entries of the Parquet files, by name, sorted."""

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits, in order of first appearance."""
        return list(dict.fromkeys(map(split_of, self.files)))


@dataclass(frozen=True)
class Columns:
    """The columns of a source that an export reads."""

    prompt: str
    response: str
    value: str | None
    """The column or field of a candidate that ranks the responses; None if the source has none."""
    pool: bool
    """Whether the rows have a list of candidates."""
    sourced: bool
    """Whether the rows have a text column `source`, as the pairs of a set."""
    single: bool
    """Whether the rows have a response beside the list, which is read if the list is empty."""

    def names(self) -> list[str]:
        """Return the columns of the table to read."""
        own = [self.response, *([self.value] if self.value else []), *(["source"] if self.sourced else [])] if self.single else []
        return list(dict.fromkeys([self.prompt, *([CANDIDATES] if self.pool else []), *own]))


def open_source(uri: str) -> Source:
    """Open the source. Raises `CappyError` if nothing is published there, and `UsageError` if it has no Parquet file."""
    uri = storage.check_uri(uri, "SRC")
    manifest = artifacts.read_any_manifest(uri, "SRC")
    files = {name: entry for name, entry in sorted(manifest["files"].items()) if name.endswith(".parquet")}
    if not files:
        raise UsageError(f"SRC={uri} holds a {manifest['kind']} without Parquet files; give a regression set, answers or scores")
    return Source(uri, manifest, files)


def split_of(name: str) -> str:
    """Return the split of a file: `validation` or `test` if this is its folder below `data/`, else `train`."""
    folders = name.split("/")[:-1]
    return folders[1] if folders[:1] == ["data"] and folders[1:2] in (["validation"], ["test"]) else "train"


def find_columns(
    uri: str, schema: pa.Schema, *, prompt: str, response: str, value: str | None, needs_value: bool, selected: bool = False
) -> Columns:
    """Return the columns to read.

    `value` None selects `label` of the candidates of a regression set, else `score`, else `label`. With `selected`, a response beside
    the list of candidates is read instead of the list: the selected answer. Raises `UsageError` that lists the columns of the source
    if one is missing or of another type.
    """
    outer = {field.name: field.type for field in schema}
    kind = outer.get(CANDIDATES, pa.null())
    pool = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)
    inner = {field.name: field.type for field in kind.value_type} if pool else {}
    answered = response in outer and _is_text(outer[response])
    if pool and (response not in inner or (selected and answered)):
        pool, inner = False, {}
    fields = inner if pool else outer
    there = ", ".join(outer) + (f"; of a candidate: {', '.join(inner)}" if pool else "")
    _check_column(uri, "--prompt", prompt, outer, _is_text, "text", there)
    _check_column(uri, "--response", response, fields, _is_text, "text", there)
    if value is not None:
        _check_column(uri, "--by", value, fields, _is_number, "number", there)
    else:
        likely = ("label", "score") if "source" in fields else ("score", "label")
        value = next((name for name in likely if name in fields and _is_number(fields[name])), None)
        if value is None and needs_value:
            raise UsageError(
                f"SRC={uri} has no scores: no column score or label with numbers; it has {there}; "
                f"name another column with --by, or add scores first"
            )
    single = not pool or (answered and (value is None or (value in outer and _is_number(outer[value]))))
    sourced = not pool and "source" in outer and "label" in outer and _is_text(outer["source"])
    return Columns(prompt, response, value, pool, sourced, single)


def flatten(table: pa.Table, columns: Columns) -> pa.Table:
    """Return the candidates of a table as a table of `FLAT`, in order; the candidates of lists come before single responses."""
    table = table.combine_chunks()
    parts = []
    if columns.pool:
        lists = _whole(table[CANDIDATES])
        flat = lists.flatten()
        parents = pc.list_parent_indices(lists)
        parts.append(_flat_table(_whole(table[columns.prompt]).take(parents), flat, columns))
        table = table.filter(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0))
    if columns.single and table.num_rows:
        rows = pa.StructArray.from_arrays([_whole(table[name]) for name in table.column_names], table.column_names)
        parts.append(_flat_table(_whole(table[columns.prompt]), rows, columns))
    return pa.concat_tables(parts) if parts else FLAT.empty_table()


def _flat_table(prompts: pa.Array, rows: pa.StructArray, columns: Columns) -> pa.Table:
    names = [field.name for field in rows.type]
    value = rows.field(columns.value).cast(pa.float64()) if columns.value in names else pa.nulls(len(rows), pa.float64())
    known = "source" in names and "label" in names and _is_text(rows.type.field("source").type)
    source = rows.field("source").cast(pa.string()) if known else pa.nulls(len(rows), pa.string())
    text = pa.large_string()
    return pa.table([prompts.cast(text), rows.field(columns.response).cast(text), value, source], schema=FLAT)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array."""
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _check_column(uri: str, option: str, name: str, columns: Mapping[str, pa.DataType], fits: Any, kind: str, there: str) -> None:
    if name not in columns:
        raise UsageError(f"{option}={name}: SRC={uri} has no such column; it has {there}")
    if not fits(columns[name]):
        raise UsageError(f"{option}={name}: this column of SRC={uri} is {columns[name]}, not a {kind}; it has {there}")


def _is_text(kind: pa.DataType) -> bool:
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(text) or pa.types.is_large_string(text))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
