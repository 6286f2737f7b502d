"""A unit of work on a sampling actor: from its prepared rows to one saved object that holds its labelled rows.

A unit's object is written at once, so it is there whole or not at all, and a unit whose object is there is never sampled
again: not by a run that goes on, nor by an actor to which Ray gives a unit a second time after a node was lost. Its metadata
carries its counts and its dead letters.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import Config
from generation import annotate
from generation.instructions import DeadLetter
from generation.sampler import LoadLLM, Sampler
from generation.schema import DATASET

_METADATA = b"cappy.unit"

COUNTS = pa.schema(
    [("unit", pa.string()), ("rows", pa.int64()), ("candidates", pa.int64()), ("tokens", pa.int64()), ("dead_letters", pa.int64())]
)
"""A finished unit: its instructions, sampled candidates, their tokens, and the instructions left out."""


class Gate:
    """Whether a unit may still start: closed when the run is to stop, so that only the units in flight end. A Ray actor."""

    def __init__(self) -> None:
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def open(self) -> bool:
        return not self._closed


class UnitWorker:
    """Takes names of units and yields the `COUNTS` of each it finished. Ray Data builds one per actor.

    Several calls run at once in an actor, so that one unit's tail does not leave the engine idle; all that is not the engine's
    work (reading, labelling, saving) happens in threads beside it.
    """

    def __init__(self, staging: str, config: Config, load: LoadLLM, gate: Any) -> None:
        self.staging, self.gate = staging, gate
        self.config = config
        self.sampler = Sampler(config.sampler, config.seed, load)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        for unit in batch["unit"].to_pylist():
            if not await self.gate.open.remote():
                return
            done = await asyncio.to_thread(finished, self.staging, unit) or await self._work(unit)
            yield pa.Table.from_pylist([done], COUNTS)

    async def _work(self, unit: str) -> dict[str, Any]:
        prepared = await asyncio.to_thread(read, place(self.staging, "prepared", unit))
        async for sampled in self.sampler(prepared):
            return await asyncio.to_thread(save, self.staging, unit, sampled, self.config)
        raise AssertionError("a sampler yields one table for each it is given")


def place(staging: str, folder: str, unit: str) -> str:
    """Where a unit stands: `prepared` before sampling, `units` when it is done."""
    return storage.join(staging, folder, f"{unit}.parquet")


def read(uri: str) -> pa.Table:
    """Return the rows of a unit's object."""
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), page_checksum_verification=True)


def write(uri: str, table: pa.Table) -> None:
    """Write a unit's object."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(uri, sink.getvalue())


def finished(staging: str, unit: str) -> dict[str, Any] | None:
    """Return the counts of a unit that is done already, else None."""
    uri = place(staging, "units", unit)
    return metadata(read(uri))["counts"] if storage.exists(uri) else None


def metadata(table: pa.Table) -> dict[str, Any]:
    """Return what a finished unit carries beside its rows: `counts` (see `COUNTS`) and `letters` (JSON lines)."""
    return dict(json.loads(table.schema.metadata[_METADATA]))


def save(staging: str, unit: str, sampled: pa.Table, config: Config) -> dict[str, Any]:
    """Label a sampled unit, save it as one object and return its counts."""
    rows, letters = label(sampled.to_pylist(), config)
    drawn = [candidate for row in rows for candidate in row["candidates"] if candidate["source"] == "sampled"]
    counts = {
        "unit": unit,
        "rows": len(sampled),
        "candidates": len(drawn),
        "tokens": sum(candidate["tokens"] for candidate in drawn),
        "dead_letters": len(letters),
    }
    beside = json.dumps({"counts": counts, "letters": letters}).encode()
    write(place(staging, "units", unit), pa.Table.from_pylist(rows, DATASET).replace_schema_metadata({_METADATA: beside}))
    return counts


def label(rows: Sequence[dict[str, Any]], config: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a sampled unit with their candidates labelled (columns of `schema.DATASET`), and its dead letters."""
    good, done, letters = [], [], []
    for row in rows:
        plain = {name: row[name] for name in DATASET.names if name != "candidates"}
        if row["error"] is not None:
            text = json.dumps(plain, ensure_ascii=False)[:500]
            letters.append(DeadLetter(where=row["id"], stage="sample", reason=row["error"], row=text).to_json())
        else:
            good.append(row)
            done.append(plain)
    candidates = annotate.assemble(good, config.generate.label, config.sampler.model)
    return [{**plain, "candidates": each} for plain, each in zip(done, candidates, strict=True)], letters
