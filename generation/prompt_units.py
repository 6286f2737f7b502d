"""Prepared units of prompts: read a source as prompts, and write its rows as units of `generate.unit_rows`, for `cappy answer`.

The rows are those of `generate` from the same source, with three differences. References are optional. The other columns of a row are
kept. Rows are left out neither by `decontaminate` nor because an instruction is in both splits. Imports no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

from cluster import storage
from cluster.config import Config
from cluster.lease import Lease
from cluster.progress import Bar, log
from generation.few_shot import Pools, prompt_columns
from generation.prepared_units import UnitWriter, describe_source, write_rows
from generation.schema import PREPARED
from generation.sources.merge import merge_rows
from generation.sources.notes import Notes
from generation.sources.reader import row_reader
from generation.sources.row import DeadLetter, Instruction
from generation.token_limits import ReferenceLengths

SPLIT = "answers"
"""The split in the names of units and shards."""

PROMPTS = pa.schema(
    [
        *(PREPARED.field(name) for name in PREPARED.names if name != "mismatched"),
        pa.field("own", pa.string(), nullable=False),  # `Instruction.own`
        pa.field("position", pa.int64(), nullable=False),  # of the row in the source
    ]
)
"""A prepared row of `cappy answer`."""


class PreparedPrompts(TypedDict):
    """The counts of the prepared units; `_staging/prepared.json` has them as JSON."""

    units: dict[str, int]
    """Number of units, by split; there is one split, `SPLIT`."""
    counts: dict[str, int]
    """Number of rows, by split."""
    rows: int
    """Number of rows."""
    sampled_rows: int
    """Number of rows to sample: the rows without answer choices."""
    dead_letters: int
    """Number of rows of the source that cannot be used."""
    merged: int
    """Number of repeated rows that were merged into an equal row."""
    columns: dict[str, str]
    """Types of the other columns of the rows, by name; see `ColumnTypes`."""
    max_tokens: NotRequired[dict[str, int]]
    """Largest length of a candidate by dataset, in tokens; only with `sampler.max_tokens_from: references`."""


class ColumnTypes:
    """The types of the other columns of the rows: `bool`, `int64`, `double` or `string`, and `json` for all other values."""

    def __init__(self) -> None:
        self._types: dict[str, str] = {}

    def add(self, own: str) -> None:
        """Add the columns of a row, the JSON of an object."""
        for name, value in (json.loads(own) if own else {}).items():
            if value is not None:
                kind = _type_of(value)
                self._types[name] = _common_type(self._types.get(name, kind), kind)
            else:
                self._types.setdefault(name, "null")

    def types(self) -> dict[str, str]:
        """Return the type of each column, in the order of the names; a column without any value is a string."""
        return {name: "string" if kind == "null" else kind for name, kind in sorted(self._types.items())}


def prepare(staging: str, config: Config, run_lease: Lease) -> PreparedPrompts:
    """Write the prepared units, unless an earlier attempt wrote them; return their counts."""
    record = storage.join(staging, "prepared.json")
    if storage.exists(record):
        earlier: PreparedPrompts = storage.read_json(record)
        return earlier
    writer = UnitWriter(staging, PROMPTS, (SPLIT,), config.generate.unit_rows, run_lease)
    columns, lengths = ColumnTypes(), ReferenceLengths()
    sampled = merged = 0

    def count_merged(count: int) -> None:
        nonlocal merged
        merged = count

    def counted_rows() -> Iterator[tuple[str, dict[str, Any]] | DeadLetter]:
        nonlocal sampled
        for each in _prepare_rows(config, lengths, count_merged):
            if isinstance(each, DeadLetter):
                yield each
            else:
                sampled += each["answer_choices"] is None
                columns.add(each["own"])
                yield SPLIT, each

    bar = Bar(f"reading {describe_source(config)}", None, "instructions")
    failed = write_rows(staging, writer, counted_rows(), bar, run_lease)
    result: PreparedPrompts = {
        "units": writer.units,
        "counts": writer.counts,
        "rows": sum(writer.counts.values()),
        "sampled_rows": sampled,
        "dead_letters": failed,
        "merged": merged,
        "columns": columns.types(),
    }
    if config.sampler.max_tokens_from == "references":
        result["max_tokens"] = lengths.limits()
    if merged:
        log(f"{merged:,} rows that repeat another row in all columns were merged")
    run_lease.check()
    storage.write_json(record, dict(result))
    return result


def _prepare_rows(config: Config, lengths: ReferenceLengths, count_merged: Callable[[int], None]) -> Iterator[dict[str, Any] | DeadLetter]:
    """Yield the rows with the columns of `PROMPTS` and the dead letters, in the order of the source."""
    notes, prompt = Notes(), config.sampler.prompt
    with merge_rows(row_reader(config.source, config.seed, notes, as_prompts=True)()) as rows:
        count_merged(rows.merged + notes.merged)
        examples = (row for row in rows if isinstance(row, Instruction) and row.references) if prompt.shots else ()
        pools = Pools(examples, config.seed)
        position = 0
        for row in rows:
            if isinstance(row, DeadLetter):
                yield row
                continue
            if row.references:
                lengths.add(row)
            shots = pools.shots(row, prompt.shots, prompt.shots_by)
            yield {**prompt_columns(row, shots), "own": row.own, "position": position}
            position += 1


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {float: "double", str: "string"}.get(type(value), "json")


def _common_type(first: str, second: str) -> str:
    """Return the type of a column with values of two types."""
    if first == second or first == "null":
        return second
    return "double" if {first, second} == {"int64", "double"} else "json"
