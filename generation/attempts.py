"""Attempts of units that ended with their process: recorded in the store, and the rows to blame found by sampling them alone.

A sampling process can end at any time: a row makes its engine crash, or the machine kills it. Its units are then sampled again.
A unit whose sampling ended `sampler.max_attempts` times is sampled row by row, without other units in the engine. A row becomes a
dead letter after two processes ended while it was the only row in the engine. Before its second try, the process must have
answered another row. If such a row is answered later, then its processes were killed at random; each of them raises the number
that rejects a row by one.

Records are below `{staging}/attempts/{unit}`. A process writes a record before it starts and deletes it afterwards; so a record
that is left belongs to a process that ended:

- `batch-*`: the unit was sampled as a whole;
- `single-*`: it was sampled row by row, and the engine had answered nothing yet;
- `row-{id}-*`: only this row was sampled.

`answer-{id}.json` has the result of a row that was sampled alone, so that it is not sampled again. Records of processes that ended
while they loaded the engine are below `{staging}/attempts/load`. Imports no Ray.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any

from cluster import storage
from cluster.config import SamplerConfig
from cluster.errors import CappyError
from generation.sampler import Sampled, Sampler, known_result

# Processes that end while they sample a row alone, before the row is rejected.
_MAX_ENDED = 2
# Processes in succession that may end without an answer to any row; then the engine is at fault, not a row.
_MAX_UNANSWERED = 5
# Sampled before the second try of a row if its unit has no other row that was answered.
_PROBE: dict[str, Any] = {"id": "probe", "instruction": "Say hello.", "shots": [], "answer_choices": None}


@contextmanager
def record_load(staging: str, config: SamplerConfig) -> Iterator[None]:
    """Keep a record while the block loads the engine. It is left in the store if the process ends in the block.

    Raises `CappyError` if several processes in succession ended while they loaded the engine.
    """
    folder = storage.join(staging, "attempts", "load")
    ended = list(storage.list_files(folder))
    # The other replicas can be loading now.
    if len(ended) >= _MAX_UNANSWERED + config.replicas - 1:
        storage.delete_files(folder, ended)
        raise CappyError(
            f"sampler.model={config.model}: {_MAX_UNANSWERED} processes in succession ended without an error while they loaded the "
            f"engine; their memory may not suffice, and their logs are in the logs of Ray; fix sampler.engine and run the command again"
        )
    record = storage.join(folder, f"{uuid.uuid4().hex}.json")
    storage.write_json(record, {})
    try:
        yield
    finally:
        storage.delete(record)
    storage.delete_files(folder, ended)


class EngineAccess:
    """Access of the units of a process to its engine: several units share it, or one unit has it alone."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._sharing = self._waiting = 0
        self._alone = False

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Use the engine together with other units; wait while a unit has it alone or waits for that."""
        async with self._changed:
            await self._changed.wait_for(lambda: not (self._alone or self._waiting))
            self._sharing += 1
        try:
            yield
        finally:
            async with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Use the engine without other units; wait until it is free."""
        async with self._changed:
            self._waiting += 1
            try:
                await self._changed.wait_for(lambda: not (self._alone or self._sharing))
                self._alone = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            async with self._changed:
                self._alone = False
                self._changed.notify_all()


class UnitAttempts:
    """The recorded attempts of one unit."""

    def __init__(self, staging: str, unit: str) -> None:
        """Read the names of the records."""
        self._folder = storage.join(staging, "attempts", unit)
        self._unit = unit
        names = [name.removesuffix(".json") for name in storage.list_files(self._folder)]
        self.batches = sum(name.startswith("batch-") for name in names)
        """Processes that ended while the unit was sampled as a whole."""
        self.unanswered = [name for name in names if name.startswith("single-")]
        """Processes in succession that ended before they answered a row of the unit."""
        self.ended_by = Counter(name.removeprefix("row-").rpartition("-")[0] for name in names if name.startswith("row-"))
        """Processes that ended while they sampled a row alone, by the id of the row."""
        self._answered = {name.removeprefix("answer-") for name in names if name.startswith("answer-")}

    @asynccontextmanager
    async def record(self, name: str) -> AsyncIterator[str]:
        """Keep a record during the block. It is left in the store if the process ends in the block."""
        uri = storage.join(self._folder, f"{name}-{uuid.uuid4().hex}.json")
        await asyncio.to_thread(storage.write_json, uri, {})
        try:
            yield uri
        finally:
            await asyncio.to_thread(storage.delete, uri)

    async def sample_singly(self, sampler: Sampler, rows: Sequence[dict[str, Any]]) -> list[Sampled]:
        """Sample the rows of the unit one after the other; return their results in the order of the rows.

        Raises `CappyError` if several processes in succession ended without an answer to any row.
        """
        if len(self.unanswered) >= _MAX_UNANSWERED:
            # The next run can have another engine, so it starts with a count of 0.
            await asyncio.to_thread(self._forget_unanswered)
            raise CappyError(
                f"sampler.model={sampler.config.model}: the sampling engine ended {_MAX_UNANSWERED} times in succession without an answer "
                f"to any row of {self._unit}; its log is in the logs of Ray; fix sampler.engine and run the same command again to resume"
            )
        limit = _MAX_ENDED + sum(self.ended_by[row_id] for row_id in self._answered)
        rejected: Sampled = ([], f"the sampling engine ended {limit} times while it sampled this row alone", 0.0)
        results = {row["id"]: rejected for row in rows if self.ended_by[row["id"]] >= limit and row["id"] not in self._answered}
        for row in rows:
            if (known := known_result(row)) is not None:
                results[row["id"]] = known
            elif row["id"] in self._answered:
                results[row["id"]] = await asyncio.to_thread(self._read_answer, row["id"])
        answered = False
        async with self.record("single") as process:
            # First the rows without an ended process, so that they can answer before the others.
            for row in sorted(rows, key=lambda row: self.ended_by[row["id"]]):
                if row["id"] in results:
                    continue
                if not answered and (self.ended_by[row["id"]] or self.unanswered):
                    sampled = (each for each in rows if known_result(each) is None)
                    probe = next((each for each in sampled if results.get(each["id"], ([], None, 0.0))[0]), _PROBE)
                    answered = bool((await sampler.sample_row(probe))[0])
                    if answered:
                        await self._note_answer(process)
                # Without an answer before the second try, the engine could be at fault: a process that ends is not the row's.
                blamed = answered or not self.ended_by[row["id"]]
                async with self.record(f"row-{row['id']}") if blamed else nullcontext():
                    results[row["id"]] = await sampler.sample_row(row)
                await asyncio.to_thread(storage.write_json, self._answer_uri(row["id"]), list(results[row["id"]]))
                if not answered and results[row["id"]][0]:
                    answered = True
                    await self._note_answer(process)
        return [results[row["id"]] for row in rows]

    async def _note_answer(self, process: str) -> None:
        """Delete the records of processes without an answer, because this process has one."""
        await asyncio.to_thread(storage.delete, process)
        await asyncio.to_thread(self._forget_unanswered)

    def _forget_unanswered(self) -> None:
        storage.delete_files(self._folder, [f"{name}.json" for name in self.unanswered])
        self.unanswered = []

    def _answer_uri(self, row_id: str) -> str:
        return storage.join(self._folder, f"answer-{row_id}.json")

    def _read_answer(self, row_id: str) -> Sampled:
        candidates, error, cost = json.loads(storage.read_bytes(self._answer_uri(row_id)))
        return candidates, error, cost
