"""Prepared units of pairs: read files as pairs of an instruction and a response, and write them as units, for `cappy score`.

Every pair of the source becomes a row, also a repeated one. Memory holds one unit. Imports no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from cluster import artifacts, storage
from cluster.errors import CappyError, UsageError
from cluster.lease import Lease
from cluster.progress import Bar
from cluster.redaction import redact_text
from generation.prepared_units import PreparedUnits, UnitWriter, write_rows
from generation.prompt_units import ColumnTypes
from generation.sources import files, folders, formats, pair_rows, reader
from generation.sources.pair_rows import Columns, Pair
from generation.sources.row import DeadLetter

SPLIT = "scores"
"""The split in the names of units and shards."""

PAIRS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # `Pair.id`
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("own", pa.string(), nullable=False),  # `Pair.own`
    ]
)
"""A prepared row of `cappy score`. The row `number` of unit `unit` has the position `unit * unit_rows + number`."""


class PreparedPairs(PreparedUnits):
    """The counts of the prepared units; `_staging/prepared.json` has them as JSON."""

    columns: dict[str, str]
    """Types of the other columns of the rows, by name; see `ColumnTypes`."""


def prepare(staging: str, source: str, columns: Columns, unit_rows: int, run_lease: Lease) -> PreparedPairs:
    """Write the prepared units, unless an earlier attempt wrote them; return their counts.

    Args:
        staging: URI of the staging folder.
        source: The files; see `read_pairs`.
        columns: The columns with the texts.
        unit_rows: Rows of a unit.
        run_lease: Checked before each write.
    """
    record = storage.join(staging, "prepared.json")
    if storage.exists(record):
        earlier: PreparedPairs = storage.read_json(record)
        return earlier
    writer = UnitWriter(staging, PAIRS, (SPLIT,), unit_rows, run_lease)
    types = ColumnTypes()
    rows = _prepare_rows(source, columns, types)
    failed = write_rows(staging, writer, rows, Bar(f"reading {redact_text(source)}", None, "pairs"), run_lease)
    result: PreparedPairs = {
        "units": writer.units,
        "counts": writer.counts,
        "rows": sum(writer.counts.values()),
        "dead_letters": failed,
        "columns": types.types(),
    }
    run_lease.check()
    storage.write_json(record, dict(result))
    return result


def _prepare_rows(source: str, columns: Columns, types: ColumnTypes) -> Iterator[tuple[str, dict[str, Any]] | DeadLetter]:
    """Yield each pair as a split and a row of `PAIRS`, and the dead letters. Add the own columns of the rows to `types`."""
    for each in read_pairs(source, columns):
        if isinstance(each, DeadLetter):
            yield each
        else:
            types.add(each.own)
            yield SPLIT, {"id": each.id, "instruction": each.instruction, "response": each.response, "own": each.own}


def read_pairs(source: str, columns: Columns = pair_rows.FIND) -> Iterator[Pair | DeadLetter]:
    """Yield the pairs of a source in order, and a dead letter for each row that cannot be scored.

    `source` is a file, a folder or a glob, local or s3://. Of a published folder the files in its manifest are read.

    Raises `UsageError` if there is no data file, or if no row can be scored, and `CappyError` if a published file is damaged.
    """
    first: DeadLetter | None = None
    usable = False
    for where, raw, named in _raw_rows(source, columns):
        for each in pair_rows.convert_row(where, raw, named):
            usable |= isinstance(each, Pair)
            first = first or (each if isinstance(each, DeadLetter) else None)
            yield each
    if not usable:
        reason = f"the first error: {first.reason} at {first.where}" if first else "the source has no rows"
        raise UsageError(f"SRC={source}: no row can be scored; each needs a prompt and a response: {pair_rows.NAMES}; {reason}")


def find_files(source: str) -> tuple[list[folders.DataFile], Mapping[str, Any] | None]:
    """Return the data files of a source, and the manifest if the source is a published folder.

    Raises `UsageError` if there is no data file.
    """
    if storage.split_glob(source)[1] or not storage.exists(storage.join(source, artifacts.MANIFEST)):
        return folders.find(source, "SRC").files, None
    manifest = artifacts.read_any_manifest(source, "SRC")
    names = [name for name in sorted(manifest["files"]) if name.startswith("data/") and folders.file_format(name)[0]]
    if not names:
        kind = artifacts.with_article(manifest["kind"])
        raise UsageError(f"SRC={source} holds {kind} without pairs; give a regression set, answers, scores or an export")
    return [folders.DataFile(artifacts.file_uri(source, name, manifest["files"][name]), name) for name in names], manifest


def _raw_rows(source: str, columns: Columns) -> Iterator[tuple[str, Any, Columns]]:
    """Yield the location of each raw row, the row, and the columns with its texts."""
    found, manifest = find_files(source)
    # A published instruction has its context already.
    if manifest is not None and manifest["kind"] != "export" and columns == pair_rows.FIND:
        columns = pair_rows.PUBLISHED
    for file in found:
        if manifest is not None:
            name = file.dataset  # `find_files` names the rows of a published file after it
            _verify(source, name, manifest["files"])
        for where, raw in formats.parse_lists(files.read_rows(file.uri)):
            yield (*reader.with_columns(file.columns, (where, raw)), columns)


def _verify(source: str, name: str, entries: Mapping[str, Any]) -> None:
    """Raise `CappyError` if a published file differs from its entry in the manifest."""
    problems = artifacts.verify(source, {"files": {name: entries[name]}})
    if problems:
        raise CappyError(f"SRC={source}: {problems[0]}; copy or make it again")
