"""Units of work: sample and save one unit on a sampling actor, within the dollar budget of the run.

A unit is a group of prepared rows. Its result is one Parquet object with the labelled rows; the metadata of the object has
the counts and the dead letters. The object is written in one operation, so a partial object never exists. A unit whose
object exists is never sampled again, neither by a resumed run nor by an actor that gets the unit from Ray a second time.
`generation.attempts` handles units whose sampling ends the process.

Imports no Ray: `generation.generate` starts the actors.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import Config, DecodingConfig, SamplerConfig
from cluster.errors import CappyError
from generation import engines, labels
from generation.attempts import EngineAccess, UnitAttempts, record_load
from generation.budget import Budget
from generation.sampler import LoadLLM, Sampler, append_results
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
        ("empty", pa.int64()),
        ("missing", pa.int64()),
        ("reused", pa.int64()),
        ("reused_tokens", pa.int64()),
        ("incomplete", pa.int64()),
    ]
)
"""The counts of a finished unit, one row; see `UnitCounts`."""

# Interval between two requests for the budget of a unit, in seconds.
_RETRY_S = 0.5


class UnitCounts(TypedDict):
    """The counts of a finished unit, in its object and in the output of `UnitWorker`."""

    unit: str
    rows: int
    """Instructions, dead letters included."""
    candidates: int
    """Sampled candidates, reused ones included."""
    tokens: int
    """Tokens of these candidates."""
    cost: float
    """Dollars."""
    dead_letters: int
    """Instructions that could not be sampled."""
    empty: NotRequired[int]
    """Sampled candidates without text. Units of older versions do not have it."""
    missing: NotRequired[int]
    """Candidates that the decodings of sampled instructions did not give, because a content filter stopped them."""
    reused: NotRequired[int]
    """Candidates from earlier sets (`generate.reuse`, `generate.extend`)."""
    reused_tokens: NotRequired[int]
    """Tokens of these candidates."""
    incomplete: NotRequired[int]
    """Dead letters whose rows are in the set, with the candidates from earlier sets alone."""


class UnitMetadata(TypedDict):
    """The metadata of the object of a finished unit, as JSON."""

    counts: UnitCounts
    letters: list[str]
    """Dead letters, each a line of JSON."""


def count_drawn(counts: Mapping[str, Any]) -> dict[str, int]:
    """Return the candidates and tokens of a unit without the reused ones, to measure rates. Units of older versions reused none."""
    return {
        "candidates": counts["candidates"] - (counts.get("reused") or 0),
        "tokens": counts["tokens"] - (counts.get("reused_tokens") or 0),
    }


class BudgetGate:
    """Admission of units within the dollar budget of a run; `generate` runs it as a Ray actor.

    A unit may start only while the run is not stopping, and only if the units in progress cannot exceed the cost limit
    together with it. `ceiling` and `spent` are in dollars; see `Budget`.
    """

    def __init__(self, ceiling: float | None = None, spent: float = 0.0) -> None:
        self._budget = Budget(ceiling, spent)
        self._closed = self._exhausted = False
        self._first_admitted: float | None = None

    def close(self) -> None:
        """Admit no further units, because the run is stopping."""
        self._closed = True

    def acquire(self, unit: str, max_cost: float) -> bool | None:
        """Reserve `max_cost` dollars for a unit; return whether it may start.

        None means "retry later": the budget does not suffice now, but units in progress can release a part of their reservations.
        """
        if self._closed or self._exhausted:
            return False
        if self._budget.reserve(unit, max_cost):
            self._first_admitted = self._first_admitted or time.monotonic()
            return True
        if self._budget.reserved:
            return None
        self._exhausted = True
        return False

    def release(self, unit: str, cost: float) -> None:
        """Settle the actual cost of a finished unit, in dollars. A second call for the same unit has no effect."""
        if self._budget.is_reserved(unit):
            self._budget.settle(unit, cost)

    def seconds_of_work(self) -> float:
        """Return the seconds since the first unit was admitted, which is after its actor loaded the model; 0 without a unit."""
        return time.monotonic() - self._first_admitted if self._first_admitted else 0.0

    def is_open(self) -> bool:
        """Return whether units can still be admitted."""
        return not (self._closed or self._exhausted)

    def exhausted(self) -> bool:
        """Return whether a unit was refused because of the cost limit."""
        return self._exhausted


class UnitWorker:
    """The sampling stage of a Ray Data plan: one unit name per row in, the `COUNTS` of each sampled unit out.

    Ray Data builds one per actor. Several calls run concurrently in an actor, so the engine stays busy during the last
    tokens of a unit. Reading, labelling and saving run in threads, outside the event loop of the engine.
    """

    def __init__(
        self,
        staging: str,
        config: Config,
        load: LoadLLM,
        gate: Any,
        limits: Mapping[str, int] | None = None,
        rounds: Sequence[Sequence[DecodingConfig]] | None = None,
        results: UnitResults | None = None,
    ) -> None:
        """Load the LLM and prepare for the results, which are labelled rows by default. `limits` and `rounds` are for `Sampler`."""
        self.staging, self.config, self.gate = staging, config, gate
        self.results = results or LABELLED
        self.access = EngineAccess()
        self.limited = engines.cost_limit(config.sampler) is not None
        with ThreadPoolExecutor(1) as pool:
            warm = pool.submit(self.results.warm_up, config)  # while the engine loads
            with record_load(staging, config.sampler):
                self.sampler = Sampler(config.sampler, config.seed, load, limits, rounds)
            warm.result()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        for unit in batch["unit"].to_pylist():
            counts = await asyncio.to_thread(read_counts, self.staging, unit, self.results.folder) or await self._sample_unit(unit)
            if counts is None:
                return
            # Also for a unit that was finished before: an actor lost between `save_unit` and `release` left its reservation.
            await self.gate.release.remote(unit, counts["cost"])
            yield pa.Table.from_pylist([counts], COUNTS)

    async def _sample_unit(self, unit: str) -> UnitCounts | None:
        """Sample and save a unit; return its counts, or None if the gate does not admit it."""
        prepared = await asyncio.to_thread(read_unit, unit_uri(self.staging, "prepared", unit))
        max_cost = await asyncio.to_thread(self.sampler.max_cost, prepared.to_pylist()) if self.limited else 0.0
        while (admitted := await self.gate.acquire.remote(unit, max_cost)) is None:
            await asyncio.sleep(_RETRY_S)
        if not admitted:
            return None
        reservation = await asyncio.to_thread(write_reservation, self.staging, unit, max_cost) if max_cost else None
        sampled = await self._sample_prepared(unit, prepared)
        counts = await asyncio.to_thread(self.results.save, self.staging, unit, sampled, self.config)
        if reservation:
            await asyncio.to_thread(storage.delete, reservation)
        return counts

    async def _sample_prepared(self, unit: str, prepared: pa.Table) -> pa.Table:
        """Return the output of the sampler for a unit: as a whole, or row by row if its sampling ended the process several times."""
        attempts = await asyncio.to_thread(UnitAttempts, self.staging, unit)
        if attempts.batches < self.config.sampler.max_attempts:
            async with self.access.shared(), attempts.record("batch"):
                return await anext(self.sampler(prepared))
        async with self.access.alone():
            return append_results(prepared, await attempts.sample_singly(self.sampler, prepared.to_pylist()))


def unit_uri(staging: str, folder: str, unit: str) -> str:
    """Return the URI of the object of a unit; `folder` is `prepared` before sampling and `units` afterwards."""
    return storage.join(staging, folder, f"{unit}.parquet")


def read_unit(uri: str) -> pa.Table:
    """Read the object of a unit and verify its page checksums. Raises `FileNotFoundError`, `OSError` or `pa.ArrowInvalid`."""
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), page_checksum_verification=True)


def write_unit(uri: str, table: pa.Table) -> None:
    """Write the object of a unit, with page checksums, in one operation."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(uri, sink.getvalue())


def read_counts(staging: str, unit: str, folder: str = "units") -> UnitCounts | None:
    """Return the counts of a unit, or None if `folder` has no object of it."""
    try:
        return unit_metadata(read_unit(unit_uri(staging, folder, unit)))["counts"]
    except FileNotFoundError:
        return None


def write_reservation(staging: str, unit: str, max_cost: float) -> str:
    """Record that a unit with a maximum cost of `max_cost` dollars started; return the URI of the record.

    The worker deletes the record after it has saved the unit. A record that is left belongs to an interrupted attempt.
    """
    uri = storage.join(staging, "promises", f"{unit}-{uuid.uuid4().hex}.json")
    storage.write_json(uri, {"unit": unit, "dollars": max_cost})
    return uri


def dollars_spent(staging: str, names: Sequence[str], folder: str = "units") -> float:
    """Return the cost of the sampled units `names` in `folder` plus the maximum cost of all interrupted attempts, in dollars."""
    reservations = storage.join(staging, "promises")
    with ThreadPoolExecutor(16) as pool:
        costs = [float(counts["cost"]) for counts in pool.map(partial(read_counts, staging, folder=folder), names) if counts]
        lost = pool.map(storage.read_json, [storage.join(reservations, name) for name in storage.list_files(reservations)])
        return sum(costs) + sum(float(each["dollars"]) for each in lost)


def unit_metadata(table: pa.Table) -> UnitMetadata:
    """Return the metadata of the object of a finished unit."""
    found: UnitMetadata = json.loads(table.schema.metadata[_METADATA])
    return found


def with_metadata(table: pa.Table, metadata: UnitMetadata) -> pa.Table:
    """Return the table of a unit with its counts and dead letters, which `unit_metadata` reads."""
    return table.replace_schema_metadata({_METADATA: json.dumps(metadata).encode()})


def count_unit(unit: str, sampled: pa.Table, letters: int, pool_size: int) -> UnitCounts:
    """Return the counts of a sampled unit.

    Args:
        unit: name of the unit.
        sampled: the output of `Sampler`.
        letters: number of its dead letters.
        pool_size: candidates that the decodings give for a row; `draw` of a row takes precedence.
    """
    rows = sampled.to_pylist()
    reused = [candidate for row in rows for candidate in row.get("reused") or ()]
    pool = [*reused, *(candidate for row in rows for candidate in row["sampled"])]
    sizes = [pool_size if row.get("draw") is None else sum(row["draw"]) for row in rows]
    return {
        "unit": unit,
        "rows": len(sampled),
        "candidates": len(pool),
        "tokens": sum(candidate["tokens"] for candidate in pool),
        "cost": sum(sampled["cost"].to_pylist()),
        "dead_letters": letters,
        "empty": sum(not candidate["response"] for candidate in pool),
        "missing": sum(max(0, size - len(row["sampled"])) for row, size in zip(rows, sizes, strict=True) if row["sampled"]),
        "reused": len(reused),
        "reused_tokens": sum(candidate["tokens"] for candidate in reused),
    }


def save_unit(staging: str, unit: str, sampled: pa.Table, config: Config) -> UnitCounts:
    """Label the rows of a sampled unit, save them as one object, and return the counts of the unit.

    `sampled` is the output of `Sampler`. With `generate.max_per_bin`, units of the train split lose the samples above it.
    """
    rows, letters = label_rows(sampled.to_pylist(), config)
    if config.generate.max_per_bin is not None and unit.startswith("train-"):
        limit = config.generate.max_per_bin
        rows = [{**row, "candidates": labels.limit_per_bin(row["candidates"], limit, config.seed, row["id"])} for row in rows]
    counts = count_unit(unit, sampled, len(letters), sum(decoding.n for decoding in config.sampler.decodings))
    counts["incomplete"] = len(rows) + len(letters) - len(sampled)
    metadata: UnitMetadata = {"counts": counts, "letters": letters}
    write_unit(unit_uri(staging, "units", unit), with_metadata(pa.Table.from_pylist(rows, DATASET), metadata))
    return counts


def label_rows(rows: Sequence[dict[str, Any]], config: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """Label the candidates of sampled rows.

    Returns the rows without an error, with the columns of `schema.DATASET`, and the dead letters of the others as JSON. These are rows
    that were not sampled, and rows for which the label function of a user fails. A dead letter with candidates of an earlier set is
    among the rows too, with these candidates.
    """
    letters = [_dead_letter(row, "sample", row["error"]) for row in rows if row["error"] is not None]
    good = [_with_pool(row, config.sampler) for row in rows if row["error"] is None or row.get("reused")]
    label, model = config.generate.label, config.sampler.model
    try:
        candidates = labels.assemble_candidates(good, label, model)
    except CappyError:  # one row may be the cause, so label each alone
        candidates, labelled = [], []
        for row in good:
            try:
                candidates += labels.assemble_candidates([row], label, model)
                labelled.append(row)
            except CappyError as error:
                if row["error"] is None:
                    letters.append(_dead_letter(row, "label", str(error)))
                kept = {**row, "sampled": [each for each in row["sampled"] if each.get("label") is not None]}
                if kept["sampled"]:
                    candidates += labels.assemble_candidates([kept], label, model)
                    labelled.append(kept)
        good = labelled
    return [{**_plain(row), "candidates": each} for row, each in zip(good, candidates, strict=True)], letters


def _with_pool(row: dict[str, Any], sampler: SamplerConfig) -> dict[str, Any]:
    """Return a row with the candidates of earlier sets among `sampled`.

    The decodings of the config are in their order, and the candidates of other decodings and LLMs are last.
    """
    if not row.get("reused"):
        return row
    order = {decoding.name: number for number, decoding in enumerate(sampler.decodings)}

    def position(candidate: Mapping[str, Any]) -> int:
        own = (candidate.get("model") or sampler.model) == sampler.model
        return order.get(candidate["decoding"], len(order)) if own else len(order)

    return {**row, "sampled": sorted([*row["reused"], *row["sampled"]], key=position)}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in DATASET.names if name != "candidates"}


def _dead_letter(row: dict[str, Any], stage: str, reason: str) -> str:
    return DeadLetter(where=row["id"], stage=stage, reason=reason, row=json.dumps(_plain(row), ensure_ascii=False)[:500]).to_json()


@dataclass(frozen=True)
class UnitResults:
    """The results of `UnitWorker`: their folder, and how the sampled rows of a unit become one."""

    folder: str
    """Folder of the objects, below the staging folder."""
    save: Callable[[str, str, pa.Table, Config], UnitCounts]
    """Saves the object of a unit: staging folder, name, output of `Sampler`, config; returns the counts."""
    warm_up: Callable[[Config], None] = lambda config: None
    """Prepares a process, while its engine loads."""


LABELLED = UnitResults("units", save_unit, lambda config: labels.warm_up(config.generate.label))
"""The rows of a regression set: candidates with labels."""
