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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.config import Config, load
from cluster.progress import log
from cluster.runtime import ray_session
from generation import engines, few_shot, generate, units
from generation.sampler import Sampler
from generation.schema import PREPARED

Measure = Callable[[Config, list[dict[str, Any]], Path], dict[str, float]]


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

    def times(self) -> tuple[float, float]:
        """Return the times at which the first unit entered and the last one left, in seconds since 1970."""
        return self._start, self._end


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


def write_units(folder: Path, split: str, rows: pa.Table, size: int) -> list[str]:
    """Write prepared rows as units of `size` rows below a staging folder; return the names of the units."""
    names = [f"{split}-{number:06d}" for number in range(-(-len(rows) // size))]
    for number, name in enumerate(names):
        units.write_unit(units.unit_uri(str(folder), "prepared", name), rows.slice(number * size, size))
    return names


def through_pipeline(config: Config, rows: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Sample, label and save the rows as units; return seconds, candidates, tokens and pairs."""
    import ray

    names = write_units(folder, "train", pa.Table.from_pylist(rows, PREPARED), config.generate.unit_rows)
    gate = ray.remote(num_cpus=0)(Clock).remote()
    results = list(generate.build_plan(str(folder), names, config, engines.load_engine, gate).iter_rows())
    pairs = sum(len(row) for name in names for row in units.read_unit(units.unit_uri(str(folder), "units", name))["candidates"].to_pylist())
    totals = {key: sum(result[key] for result in results) for key in ("candidates", "tokens")}
    start, end = ray.get(gate.times.remote())
    return {"seconds": end - start, "pairs": pairs, **totals}


def directly(config: Config, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sample the rows concurrently with the engine without the pipeline; return seconds, candidates and tokens."""
    import ray

    actor = ray.remote(num_cpus=1)(Direct).remote(config.sampler, config.seed)
    result = dict(ray.get(actor.sample_all.remote(rows)))
    ray.kill(actor)
    return result


def compare_with_engine(
    description: str | None,
    name: str,
    config: Config,
    measure: Measure,
    **also: str,
) -> int:
    """Parse the arguments, measure a pipeline and the engine alone in turns, and print the ratio of their candidates per second.

    Args:
        description: The documentation of the benchmark; its first line is the help.
        name: The name of the pipeline.
        config: The settings. The rows are train rows of its source.
        measure: Runs the pipeline on the rows, with a folder; returns `seconds`, `candidates`, `tokens` and other measurements.
        also: Further figures by name: each is the median of this measurement per second of the pipeline.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    train = [each[1] for each in few_shot.prepare_rows(config) if isinstance(each, tuple) and each[0] == "train"]
    rows = train[:: max(1, len(train) // options.rows)][: options.rows]
    turns: dict[str, list[dict[str, float]]] = {name: [], "direct": []}
    with ray_session(), tempfile.TemporaryDirectory(prefix="cappy-benchmark-") as folder:
        for turn in range(options.turns):
            turns[name].append(measure(config, rows, Path(folder, str(turn))))
            turns["direct"].append(directly(config, rows))
            said = ", ".join(f"{side} {each[-1]['candidates'] / each[-1]['seconds']:.1f} candidates/s" for side, each in turns.items())
            log(f"turn {turn + 1} of {options.turns}: {said}")

    def median(side: str, key: str) -> float:
        return statistics.median(each[key] / each["seconds"] for each in turns[side])

    ours, theirs = median(name, "candidates"), median("direct", "candidates")
    result = {
        "ratio": round(ours / theirs, 3),
        "candidates_per_second": round(ours, 2),
        "tokens_per_second": round(median(name, "tokens"), 1),
        **{figure: round(median(name, key), 3) for figure, key in also.items()},
        "direct_candidates_per_second": round(theirs, 2),
        "direct_tokens_per_second": round(median("direct", "tokens"), 1),
        "rows": len(rows),
        "turns": options.turns,
        "unit_rows": config.generate.unit_rows,
    }
    print(
        f"{len(rows)} instructions, {options.turns} turns each: {name} {ours:.1f} candidates/s, engine alone {theirs:.1f}; "
        f"ratio {result['ratio']}" + "".join(f"; {figure} {result[figure]}" for figure in also)
    )
    if options.json:
        print(json.dumps(result))
    return 0


def main() -> int:
    return compare_with_engine(__doc__, "pipeline", load("demo"), through_pipeline, pairs_per_second="pairs")


if __name__ == "__main__":
    sys.exit(main())
