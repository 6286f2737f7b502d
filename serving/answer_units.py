"""The units of `answer`: the object of a sampled unit, and the stage that scores a unit and selects its answers.

The staging folder has, for each unit and round:

- `prepared/{unit}.parquet`: the rows before sampling;
- `sampled/{unit}.parquet`: the rows with their candidates, written by a sampling actor in one operation;
- `units/{unit}.parquet`: the answered rows, written by a scoring actor in one operation.

With early stopping, a row that needs more candidates goes into the unit of the next round, `{unit}.{round}`. The scoring actor writes
that unit below `prepared` before the object of this round. So a unit that is in `prepared` and not in `units` is unfinished, and an object
below `sampled` is never sampled again. Imports no Ray and no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import pyarrow as pa

from cluster import storage
from cluster.config import Config, DecodingConfig
from cluster.errors import typed_first_line
from generation import units
from generation.units import UnitCounts, UnitResults
from serving.answer_rows import ANSWERED, OPEN, Answers, Scores, build_selector
from serving.scorer_cache import LoadedScorer

ANSWERED_COUNTS = pa.schema([*units.COUNTS, ("open", pa.int64()), ("next", pa.string())])
"""The counts of a unit after scoring. `rows` are the answered rows and dead letters, `open` the rows that need another round, and
`next` is the unit of these rows, or null."""

LoadScorer = Callable[[Config], LoadedScorer]


class AnswerCounts(TypedDict):
    """The additional counts of an answered unit."""

    open: int
    next: str | None


def load_main_scorer(config: Config) -> LoadedScorer:
    """Load the main scorer for the thread that calls it. Raises `CappyError` if it cannot be loaded."""
    import torch

    from serving.scorer_cache import load_if_changed

    if not torch.cuda.is_available():
        torch.set_num_threads(config.answer.scorer_threads)  # applies to the calling thread only
    return load_if_changed(config.scorer_uri, "scorer_path", None, config.serving.scorer_dtype, config.scorer)


def save_sampled(staging: str, unit: str, sampled: pa.Table, config: Config) -> UnitCounts:
    """Save the output of `Sampler` for a unit as one object; return the counts of the unit."""
    counts = units.count_unit(unit, sampled, sum(error is not None for error in sampled["error"].to_pylist()), 0)
    table = units.with_metadata(sampled, {"counts": counts, "letters": []})
    units.write_unit(units.unit_uri(staging, "sampled", unit), table)
    return counts


SAMPLED_UNITS = UnitResults("sampled", save_sampled)
"""The results of the sampling stage of `answer`."""


def first_round(unit: str) -> str:
    """Return the name of the first unit of the rows of a unit."""
    return unit.partition(".")[0]


def round_of(unit: str) -> int:
    """Return the number of the round of a unit, from 0."""
    return int(unit.partition(".")[2] or 0)


def pending_units(staging: str) -> list[str]:
    """Return the names of the unfinished units, in order."""
    prepared, finished = (_names(staging, folder) for folder in ("prepared", "units"))
    return sorted(prepared - finished, key=lambda unit: (first_round(unit), round_of(unit)))


def sampled_units(staging: str) -> list[str]:
    """Return the names of the units that are sampled, in order."""
    return sorted(_names(staging, "sampled"))


def finished_units(staging: str) -> dict[str, list[str]]:
    """Return the finished units by the unit of the first round, each in the order of the rounds."""
    found: dict[str, list[str]] = {}
    for unit in sorted(_names(staging, "units"), key=lambda unit: (first_round(unit), round_of(unit))):
        found.setdefault(first_round(unit), []).append(unit)
    return found


def _names(staging: str, folder: str) -> set[str]:
    names = storage.list_files(storage.join(staging, folder))
    return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}


class AnswerWorker:
    """The scoring stage of the Ray Data plan: counts of sampled units in, `ANSWERED_COUNTS` out.

    Ray Data builds one per actor. A unit is read and saved in threads while another one is scored.

    Args:
        staging: URI of the staging folder.
        config: The settings.
        rounds: The decodings of each round; see `answer_rows.plan_decodings`.
        load: Loads the scorer; None if no score is used.
        feed: The `UnitFeed` of a run with early stopping, a Ray actor; None without.
    """

    def __init__(
        self, staging: str, config: Config, rounds: Sequence[Sequence[DecodingConfig]], load: LoadScorer | None, feed: Any = None
    ) -> None:
        self._staging, self._feed = staging, feed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._scorer = self._thread.submit(load, config).result() if load else None
        selection, weight = (self._scorer.selection, self._scorer.logprob_weight) if self._scorer else (None, None)
        self._answers = Answers(config, rounds, build_selector(config, selection, weight))

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        for unit in batch["unit"].to_pylist():
            counts = await asyncio.to_thread(_read_counts, self._staging, unit) or await self._answer_unit(unit)
            if self._feed is not None:
                await self._feed.finish.remote(unit, counts["next"])
            yield pa.Table.from_pylist([counts], ANSWERED_COUNTS)

    async def _answer_unit(self, unit: str) -> dict[str, Any]:
        sampled = await asyncio.to_thread(units.read_unit, units.unit_uri(self._staging, "sampled", unit))
        rows = sampled.to_pylist()
        pending = [self._answers.responses_to_score(row) for row in rows]
        scored = await asyncio.get_running_loop().run_in_executor(self._thread, self._score, rows, pending)
        return await asyncio.to_thread(self._save, unit, units.unit_metadata(sampled)["counts"], rows, scored)

    def _score(self, rows: Sequence[dict[str, Any]], pending: Sequence[Sequence[str]]) -> list[Scores]:
        """Score the given responses of all rows in one call; if that fails, each row alone."""
        instructions = [row["instruction"] for row, responses in zip(rows, pending, strict=True) for _ in responses]
        responses = [response for each in pending for response in each]
        if not responses:
            return [Scores({}) for _ in rows]
        assert self._scorer is not None
        try:
            scores = iter(self._scorer.model.score(instructions, responses).tolist())
            return [Scores({response: next(scores) for response in each}) for each in pending]
        except Exception as error:
            if len(rows) == 1:
                return [Scores({}, typed_first_line(error))]
            return [self._score([row], [each])[0] for row, each in zip(rows, pending, strict=True)]

    def _save(self, unit: str, sampled: UnitCounts, rows: Sequence[dict[str, Any]], scored: Sequence[Scores]) -> dict[str, Any]:
        """Write the rows of the next round, then the answered rows of this one; return the counts of the unit."""
        answered: list[dict[str, Any]] = []
        letters: list[str] = []
        open_rows: list[dict[str, Any]] = []
        for row, scores in zip(rows, scored, strict=True):
            answer, letter = self._answers.finish_or_continue(row, scores)
            if answer is not None:
                answered.append(answer)
            elif letter is not None:
                letters.append(letter.to_json())
            else:
                open_rows.append(self._answers.next_round(row, scores))
        following = f"{first_round(unit)}.{round_of(unit) + 1}" if open_rows else None
        if following:
            units.write_unit(units.unit_uri(self._staging, "prepared", following), pa.Table.from_pylist(open_rows, OPEN))
        finished = len(answered) + len(letters)
        more: AnswerCounts = {"open": len(open_rows), "next": following}
        counts = {**sampled, "rows": finished, "dead_letters": len(letters), **more}
        table = units.with_metadata(pa.Table.from_pylist(answered, ANSWERED), {"counts": counts, "letters": letters})  # type: ignore[typeddict-item]
        units.write_unit(units.unit_uri(self._staging, "units", unit), table)
        return counts


def _read_counts(staging: str, unit: str) -> dict[str, Any] | None:
    """Return the counts of a unit that is answered, else None."""
    found = units.read_counts(staging, unit)
    return None if found is None else dict(found)


class UnitFeed:
    """The units of a run with early stopping, in order; it runs as a Ray actor on the node of the driver.

    Units are only appended. So a task that reads them again from the start gets the same units.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = list(dict.fromkeys(names))
        self._finished: set[str] = set()

    def finish(self, unit: str, following: str | None) -> None:
        """Note that a unit is finished, and append the unit of its next round. A second call for a unit has no effect."""
        self._finished.add(unit)
        if following is not None and following not in self._names:
            self._names.append(following)

    def get(self, index: int) -> tuple[str | None, bool]:
        """Return the unit at a position, None if there is none yet; and whether all units are finished."""
        name = self._names[index] if index < len(self._names) else None
        return name, self._finished.issuperset(self._names)
