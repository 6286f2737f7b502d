"""The units of `score`: the stage that scores the pairs of a unit, and the object with their scores.

The staging folder has, for each unit:

- `prepared/{unit}.parquet`: the pairs (`pair_units.PAIRS`);
- `units/{unit}.parquet`: the scores of these pairs in the same order, written by a scoring actor in one operation.

`arithmetic.json` has the arithmetic of the scores, for example the data type that `serving.scorer_dtype=auto` selected. The first scoring
actor writes it, and all other actors use it, also after a restart on another machine. Imports no Ray and no torch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import storage
from cluster.config import Config
from cluster.errors import typed_first_line
from generation import units
from generation.sources.row import DeadLetter
from serving.answer_units import LoadScorer
from serving.scorer_cache import LoadedScorer

ARITHMETIC = "arithmetic.json"
"""The file with the arithmetic of the scores, below the staging folder."""
SCORES = pa.schema([pa.field("logit", pa.float32())])
"""The scores of a unit: raw logits, null for a pair that the scorer cannot score."""
SCORED_COUNTS = pa.schema(
    [("unit", pa.string()), ("rows", pa.int64()), ("repeated", pa.int64()), ("dead_letters", pa.int64()), ("cost", pa.float64())]
)
"""The counts of a scored unit. `rows` are all its pairs, and `repeated` the pairs that repeat another pair of the unit."""


class ScoreWorker:
    """The scoring stage of the Ray Data plan: one unit name per row in, `SCORED_COUNTS` of each scored unit out.

    Ray Data builds one per actor. A unit is read and saved in threads while another one is scored.

    Args:
        staging: URI of the staging folder.
        config: The settings.
        load: Loads the scorer.
        gate: The `BudgetGate` of the run, a Ray actor: it admits no unit after SIGTERM.
    """

    def __init__(self, staging: str, config: Config, load: LoadScorer, gate: Any) -> None:
        self._staging, self._gate = staging, gate
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._scorer = self._thread.submit(load_with_arithmetic, staging, config, load).result()
        self._turn = asyncio.Lock()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        for unit in batch["unit"].to_pylist():
            counts = await asyncio.to_thread(units.read_counts, self._staging, unit) or await self._score_unit(unit)
            if counts is None:
                return
            yield pa.Table.from_pylist([counts], SCORED_COUNTS)

    async def _score_unit(self, unit: str) -> Any:
        """Score and save a unit; return its counts, or None if the run is stopping."""
        prepared = await asyncio.to_thread(units.read_unit, units.unit_uri(self._staging, "prepared", unit))
        async with self._turn:  # a unit that only waits is not started after SIGTERM
            if not await self._gate.acquire.remote(unit, 0.0):
                return None
            scored = await asyncio.get_running_loop().run_in_executor(self._thread, score_pairs, self._scorer.model, prepared)
        return await asyncio.to_thread(_save, self._staging, unit, prepared, *scored)


def load_with_arithmetic(staging: str, config: Config, load: LoadScorer) -> LoadedScorer:
    """Load the scorer with the arithmetic of the run. The first call in a run records the arithmetic of the scorer it loads."""
    loaded = load(config)
    record = storage.join(staging, ARITHMETIC)
    storage.create_json(record, {"dtype": loaded.model.dtype})
    dtype = storage.read_json(record)["dtype"]
    if dtype == loaded.model.dtype:
        return loaded
    return load(config.model_copy(update={"serving": config.serving.model_copy(update={"scorer_dtype": dtype})}))


def score_pairs(scorer: Any, prepared: pa.Table) -> tuple[np.ndarray, dict[int, str], int]:
    """Score the pairs of a unit, each different pair once.

    Args:
        scorer: A `Scorer`.
        prepared: The pairs, with the columns `instruction` and `response`.

    Returns:
        The raw logits, float32 (pairs,), NaN for a pair that cannot be scored; the reason for each of these, by position; and the number
        of pairs that repeat another one.
    """
    positions: dict[tuple[str, str], int] = {}
    columns = (prepared[name].to_pylist() for name in ("instruction", "response"))
    numbers = np.fromiter((positions.setdefault(pair, len(positions)) for pair in zip(*columns, strict=True)), np.int64, len(prepared))
    pairs = list(positions)
    logits, reasons = np.full(len(pairs), np.nan, np.float32), dict[int, str]()
    _score_range(scorer, pairs, 0, len(pairs), logits, reasons)
    reasons |= {int(each): "the score is not a finite number" for each in np.flatnonzero(~np.isfinite(logits)) if each not in reasons}
    logits[list(reasons)] = np.nan
    failed = {row: reasons[number] for row, number in enumerate(numbers.tolist()) if number in reasons}
    return logits[numbers], failed, len(prepared) - len(pairs)


def _score_range(scorer: Any, pairs: Sequence[tuple[str, str]], start: int, end: int, logits: np.ndarray, reasons: dict[int, str]) -> None:
    """Score `pairs[start:end]` into `logits` in one call. If it fails, score each half alone, down to the pair with the fault."""
    if start == end:
        return
    try:
        logits[start:end] = scorer.score(*map(list, zip(*pairs[start:end], strict=True)))
    except Exception as error:
        if end - start == 1:
            reasons[start] = f"the scorer failed ({typed_first_line(error)})"
            return
        middle = (start + end) // 2
        for part in ((start, middle), (middle, end)):
            _score_range(scorer, pairs, *part, logits, reasons)


def _save(staging: str, unit: str, prepared: pa.Table, logits: np.ndarray, failed: dict[int, str], repeated: int) -> dict[str, Any]:
    """Write the object of a scored unit, and return its counts."""
    rows = prepared.take(pa.array(sorted(failed), pa.int64())).to_pylist()
    letters = [
        DeadLetter(row["id"], "score", reason, json.dumps({name: row[name] for name in ("instruction", "response")})[:500]).to_json()
        for row, (_, reason) in zip(rows, sorted(failed.items()), strict=True)
    ]
    counts = {"unit": unit, "rows": len(prepared), "repeated": repeated, "dead_letters": len(failed), "cost": 0.0}
    scores = pa.table([pa.array(logits, pa.float32(), from_pandas=True)], schema=SCORES)
    units.write_unit(units.unit_uri(staging, "units", unit), units.with_metadata(scores, {"counts": counts, "letters": letters}))  # type: ignore[typeddict-item]
    return counts
