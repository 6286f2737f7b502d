"""Compare candidates per second: the whole generate pipeline, and the same vLLM engine called directly with all prompts.

    python -m benchmarks.generation --json -

Each side has a separate Ray actor and uses the train rows, prompts and decodings of the demo. Start and stop of the engine are not
measured. The pipeline is measured from the start of its first unit until its last unit is labelled and saved. The sides alternate;
`ratio` is the ratio of the medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.config import Config, load
from cluster.progress import log
from cluster.runtime import ray_session
from generation import engines, few_shot, generate, units
from generation.sampler import Sampler
from generation.schema import PREPARED


class Clock(units.BudgetGate):
    """A gate that records when its first unit entered and its last unit left. A unit leaves after it is saved."""

    def __init__(self) -> None:
        super().__init__()
        self._start, self._end = 0.0, 0.0

    def acquire(self, unit: str, most: float) -> bool | None:
        self._start = self._start or time.time()
        return super().acquire(unit, most)

    def release(self, unit: str, cost: float) -> None:
        self._end = time.time()
        super().release(unit, cost)

    def seconds(self) -> float:
        return self._end - self._start

    def started_at(self) -> float:
        """Return the time at which the first unit entered, in seconds since 1970."""
        return self._start


class Direct(Sampler):
    """The engine without the pipeline."""

    async def sample_all(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Sample all rows concurrently; return seconds, candidates and tokens."""
        start = time.time()
        async for sampled in self(pa.Table.from_pylist(rows, PREPARED)):
            pools = sampled["sampled"].to_pylist()
        seconds = time.time() - start
        drawn = [each for pool in pools for each in pool]
        return {"seconds": seconds, "candidates": len(drawn), "tokens": sum(each["tokens"] for each in drawn)}


def through_pipeline(config: Config, rows: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Sample, label and save the rows as units; return seconds, candidates, tokens and pairs."""
    import ray

    names = []
    for number, start in enumerate(range(0, len(rows), config.generate.unit_rows)):
        names.append(f"train-{number:06d}")
        table = pa.Table.from_pylist(rows[start : start + config.generate.unit_rows], PREPARED)
        units.write_unit(units.unit_uri(str(folder), "prepared", names[-1]), table)
    gate = ray.remote(num_cpus=0)(Clock).remote()
    results = list(generate.build_plan(str(folder), names, config, engines.load_engine, gate).iter_rows())
    pairs = sum(len(row) for name in names for row in units.read_unit(units.unit_uri(str(folder), "units", name))["candidates"].to_pylist())
    totals = {key: sum(result[key] for result in results) for key in ("candidates", "tokens")}
    return {"seconds": ray.get(gate.seconds.remote()), "pairs": pairs, **totals}


def directly(config: Config, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sample the rows concurrently with the engine without the pipeline; return seconds, candidates and tokens."""
    import ray

    actor = ray.remote(num_cpus=1)(Direct).remote(config.sampler, config.seed)
    result = dict(ray.get(actor.sample_all.remote(rows)))
    ray.kill(actor)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    config = load("demo")
    train = [each[1] for each in few_shot.prepare_rows(config) if isinstance(each, tuple) and each[0] == "train"]
    rows = train[:: max(1, len(train) // options.rows)][: options.rows]
    turns: dict[str, list[dict[str, float]]] = {"pipeline": [], "direct": []}
    with ray_session(), tempfile.TemporaryDirectory(prefix="cappy-benchmark-") as folder:
        for turn in range(options.turns):
            turns["pipeline"].append(through_pipeline(config, rows, Path(folder, str(turn))))
            turns["direct"].append(directly(config, rows))
            said = ", ".join(f"{name} {each[-1]['candidates'] / each[-1]['seconds']:.1f} candidates/s" for name, each in turns.items())
            log(f"turn {turn + 1} of {options.turns}: {said}")

    def median(name: str, key: str) -> float:
        return statistics.median(each[key] / each["seconds"] for each in turns[name])

    ours, theirs = median("pipeline", "candidates"), median("direct", "candidates")
    result = {
        "ratio": round(ours / theirs, 3),
        "candidates_per_second": round(ours, 2),
        "tokens_per_second": round(median("pipeline", "tokens"), 1),
        "pairs_per_second": round(median("pipeline", "pairs"), 2),
        "direct_candidates_per_second": round(theirs, 2),
        "direct_tokens_per_second": round(median("direct", "tokens"), 1),
        "rows": len(rows),
        "turns": options.turns,
        "unit_rows": config.generate.unit_rows,
    }
    print(
        f"{len(rows)} instructions, {options.turns} turns each: pipeline {ours:.1f} candidates/s, engine alone {theirs:.1f}; "
        f"ratio {result['ratio']}"
    )
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
