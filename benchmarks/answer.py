"""Compare candidates per second: `cappy answer` from the first unit to the last selected answer, and the same vLLM engine alone.

    python -m benchmarks.answer --json -

Both sides have the same train rows of the demo, the same prompts and decodings, in separate Ray actors. Start and stop of the engine
are not measured. `cappy answer` also scores each response with `cappy-minilm`, selects, and saves each unit. The sides alternate;
`ratio` is the ratio of the medians over the turns. `scoring_share` is the time to score all responses once on the same cores, divided
by the time of `cappy answer`. That `cappy serve` picks the same candidates is a test, `tests/serving/test_answer.py`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from benchmarks.generation import Clock, compare_with_engine, write_units
from cluster.config import Config, load
from generation import engines, units
from generation.prompt_units import PROMPTS
from serving import answer, answer_units
from serving.answer_rows import plan_decodings
from training.main_scorer import with_default_scorer


def through_answer(config: Config, rows: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Answer the rows in units; return seconds, candidates, tokens, and the seconds to score all responses once."""
    import ray

    prepared = pa.Table.from_pylist([{**row, "own": "{}", "position": number} for number, row in enumerate(rows)], PROMPTS)
    names = write_units(folder, "answers", prepared, config.generate.unit_rows)
    run: Any = SimpleNamespace(gate=ray.remote(num_cpus=0)(Clock).remote(), driver_node="DEFAULT")
    plan = answer.build_plan(
        str(folder), names, config, plan_decodings(config), engines.load_engine, answer_units.load_main_scorer, run, None
    )
    counts, end = [], 0.0
    for each in plan.iter_rows():
        counts.append(each)
        end = time.time()
    seconds = end - ray.get(run.gate.times.remote())[0]
    if sum(each["dead_letters"] for each in counts):
        raise SystemExit(f"{sum(each['dead_letters'] for each in counts)} rows became dead letters, so the sides are not comparable")
    pools = [row for name in names for row in units.read_unit(units.unit_uri(str(folder), "sampled", name)).to_pylist()]
    return {
        "seconds": seconds,
        "candidates": sum(each["candidates"] for each in counts),
        "tokens": sum(each["tokens"] for each in counts),
        "scoring": _scoring_seconds(config, pools),
    }


def _scoring_seconds(config: Config, pools: list[dict[str, Any]]) -> float:
    """Return the seconds to score the distinct responses of all rows, without anything beside it."""
    scorer = answer_units.load_main_scorer(config).model
    pairs = [(row["instruction"], response) for row in pools for response in {each["response"]: None for each in row["sampled"]}]
    start = time.time()
    scorer.score([each[0] for each in pairs], [each[1] for each in pairs])
    return time.time() - start


def main() -> int:
    # A workspace without a scorer, so that the scorer is that of the package.
    config = with_default_scorer(load("demo", {"workspace": f"{tempfile.gettempdir()}/cappy-benchmark-without-scorer"}), "answer")
    return compare_with_engine(__doc__, "answer", config, through_answer, scoring_share="scoring")


if __name__ == "__main__":
    sys.exit(main())
