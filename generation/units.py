"""A unit of work on a sampling actor: from its prepared rows to one saved object that holds its labelled rows.

A unit's object is written at once, so it is there whole or not at all, and a unit whose object is there is never sampled
again: not by a run that goes on, nor by an actor to which Ray gives a unit a second time after a node was lost. Its metadata
carries its counts and its dead letters.
"""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import Config
from generation import engines, labels
from generation.budget import Budget
from generation.sampler import LoadLLM, Sampler
from generation.schema import DATASET
from generation.sources.row import DeadLetter

_METADATA = b"cappy.unit"

COUNTS = pa.schema(
    [
        ("unit", pa.string()),
        ("rows", pa.int64()),
        ("candidates", pa.int64()),
        ("tokens", pa.int64()),
        ("cost", pa.float64()),
        ("dead_letters", pa.int64()),
    ]
)
"""A finished unit: its instructions, sampled candidates, their tokens, dollars spent, and the instructions left out."""

# Seconds between two looks at whether the units in flight left room below the ceiling.
_RETRY_S = 0.5


class BudgetGate:
    """Whether a unit may start: not once the run is to stop, and not while what is in flight could pass the money ceiling.

    A Ray actor. `ceiling` and `spent` are in dollars; see `Budget`.
    """

    def __init__(self, ceiling: float | None = None, spent: float = 0.0) -> None:
        self._budget = Budget(ceiling, spent)
        self._closed = self._exhausted = False

    def close(self) -> None:
        """Let no further unit start."""
        self._closed = True

    def acquire(self, unit: str, most: float) -> bool | None:
        """Whether a unit that can cost `most` dollars may start; None when it should ask again, as others may leave room."""
        if self._closed or self._exhausted:
            return False
        if self._budget.reserve(unit, most):
            return True
        if self._budget.reserved:
            return None
        self._exhausted = True
        return False

    def release(self, unit: str, cost: float) -> None:
        """Count what a finished unit did cost; one that has left already is known."""
        if self._budget.is_reserved(unit):
            self._budget.settle(unit, cost)

    def exhausted(self) -> bool:
        """Whether a unit was refused for the ceiling's sake."""
        return self._exhausted


class UnitWorker:
    """Takes names of units and yields the `COUNTS` of each it finished. Ray Data builds one per actor.

    Several calls run at once in an actor, so that one unit's tail does not leave the engine idle; all that is not the engine's
    work (reading, labelling, saving) happens in threads beside it.
    """

    def __init__(self, staging: str, config: Config, load: LoadLLM, gate: Any) -> None:
        self.staging, self.config, self.gate = staging, config, gate
        self.limited = engines.cost_limit(config.sampler) is not None
        with ThreadPoolExecutor(1) as beside:  # while the engine loads
            warm = beside.submit(labels.warm_up, config.generate.label)
            self.sampler = Sampler(config.sampler, config.seed, load)
            warm.result()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        for unit in batch["unit"].to_pylist():
            done = await asyncio.to_thread(read_counts, self.staging, unit) or await self._work(unit)
            if done is None:
                return
            # Also for a unit found done: an actor lost between saving and leaving would hold its promise for ever.
            await self.gate.release.remote(unit, done["cost"])
            yield pa.Table.from_pylist([done], COUNTS)

    async def _work(self, unit: str) -> dict[str, Any] | None:
        """Return the counts of a unit once it is saved, or None where the gate is closed."""
        prepared = await asyncio.to_thread(read_unit, unit_uri(self.staging, "prepared", unit))
        most = await asyncio.to_thread(self.sampler.max_cost, prepared.to_pylist()) if self.limited else 0.0
        while (enter := await self.gate.acquire.remote(unit, most)) is None:
            await asyncio.sleep(_RETRY_S)
        if not enter:
            return None
        promise = await asyncio.to_thread(write_reservation, self.staging, unit, most) if most else None
        async for sampled in self.sampler(prepared):
            done = await asyncio.to_thread(save_unit, self.staging, unit, sampled, self.config)
        if promise:
            await asyncio.to_thread(storage.delete, promise)
        return done


def unit_uri(staging: str, folder: str, unit: str) -> str:
    """Where a unit stands: `prepared` before sampling, `units` when it is done."""
    return storage.join(staging, folder, f"{unit}.parquet")


def read_unit(uri: str) -> pa.Table:
    """Return the rows of a unit's object."""
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), page_checksum_verification=True)


def write_unit(uri: str, table: pa.Table) -> None:
    """Write a unit's object."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(uri, sink.getvalue())


def read_counts(staging: str, unit: str) -> dict[str, Any] | None:
    """Return the counts of a unit that is done already, else None."""
    try:
        return dict(unit_metadata(read_unit(unit_uri(staging, "units", unit)))["counts"])
    except FileNotFoundError:
        return None


def write_reservation(staging: str, unit: str, most: float) -> str:
    """Write down that a unit is begun that can cost `most` dollars, and return where: it is deleted once the unit is saved."""
    place = storage.join(staging, "promises", f"{unit}-{uuid.uuid4().hex}.json")
    storage.write_json(place, {"unit": unit, "dollars": most})
    return place


def dollars_spent(staging: str, names: Sequence[str]) -> float:
    """Return the dollars that finished units cost, and the most that those lost under way can have cost."""
    promises = storage.join(staging, "promises")
    with ThreadPoolExecutor(16) as pool:
        costs = [float(counts["cost"]) for counts in pool.map(partial(read_counts, staging), names) if counts]
        lost = pool.map(storage.read_json, [storage.join(promises, name) for name in storage.list_files(promises)])
        return sum(costs) + sum(float(each["dollars"]) for each in lost)


def unit_metadata(table: pa.Table) -> dict[str, Any]:
    """Return what a finished unit carries beside its rows: `counts` (see `COUNTS`) and `letters` (JSON lines)."""
    return dict(json.loads(table.schema.metadata[_METADATA]))


def save_unit(staging: str, unit: str, sampled: pa.Table, config: Config) -> dict[str, Any]:
    """Label a sampled unit, save it as one object and return its counts."""
    rows, letters = label_rows(sampled.to_pylist(), config)
    if config.generate.max_per_bin is not None and unit.startswith("train-"):
        most = config.generate.max_per_bin
        rows = [{**row, "candidates": labels.limit_per_bin(row["candidates"], most, config.seed, row["id"])} for row in rows]
    drawn = [candidate for pool in sampled["sampled"].to_pylist() for candidate in pool]
    counts = {
        "unit": unit,
        "rows": len(sampled),
        "candidates": len(drawn),
        "tokens": sum(candidate["tokens"] for candidate in drawn),
        "cost": sum(sampled["cost"].to_pylist()),
        "dead_letters": len(letters),
    }
    beside = json.dumps({"counts": counts, "letters": letters}).encode()
    write_unit(unit_uri(staging, "units", unit), pa.Table.from_pylist(rows, DATASET).replace_schema_metadata({_METADATA: beside}))
    return counts


def label_rows(rows: Sequence[dict[str, Any]], config: Config) -> tuple[list[dict[str, Any]], list[str]]:
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
    candidates = labels.assemble_candidates(good, config.generate.label, config.sampler.model)
    return [{**plain, "candidates": each} for plain, each in zip(done, candidates, strict=True)], letters
