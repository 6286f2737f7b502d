"""Compare candidates per second: `cappy answer` from the first unit to the last selected answer, and the same vLLM engine alone.

    python -m benchmarks.answer --json -

Both sides have the same train rows of the demo, the same prompts and decodings, in separate Ray actors. Start and stop of the engine
are not measured. `cappy answer` also scores each response with `cappy-minilm`, selects, and saves each unit. The sides alternate;
`ratio` is the ratio of the medians over the turns. `scoring_share` is the time to score all responses once on the same cores, divided
by the time of `cappy answer`. That `cappy serve` picks the same candidates is a test, `tests/serving/test_answer.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from benchmarks.generation import Clock, directly
from cluster.config import Config, load
from cluster.progress import log
from cluster.runtime import ray_session
from generation import engines, few_shot, units
from generation.prompt_units import PROMPTS
from serving import answer, answer_units
from serving.answer_rows import plan_decodings
from serving.main_scorer import with_default_scorer


def through_answer(config: Config, rows: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Answer the rows in units; return seconds, candidates, tokens, and the seconds to score all responses once."""
    import ray

    names, size = [], config.generate.unit_rows
    for number, start in enumerate(range(0, len(rows), size)):
        names.append(f"answers-{number:06d}")
        part = [{**row, "own": "{}", "position": start + index} for index, row in enumerate(rows[start : start + size])]
        units.write_unit(units.unit_uri(str(folder), "prepared", names[-1]), pa.Table.from_pylist(part, PROMPTS))
    run: Any = SimpleNamespace(gate=ray.remote(num_cpus=0)(Clock).remote(), driver_node="DEFAULT")
    plan = answer.build_plan(
        str(folder), names, config, plan_decodings(config), engines.load_engine, answer_units.load_main_scorer, run, None
    )
    counts, end = [], 0.0
    for each in plan.iter_rows():
        counts.append(each)
        end = time.time()
    seconds = end - ray.get(run.gate.started_at.remote())
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    config = with_default_scorer(load("demo", {"workspace": tempfile.gettempdir() + "/cappy-benchmark-none"}), "answer")
    train = [each[1] for each in few_shot.prepare_rows(config) if isinstance(each, tuple) and each[0] == "train"]
    rows = train[:: max(1, len(train) // options.rows)][: options.rows]
    turns: dict[str, list[dict[str, float]]] = {"answer": [], "direct": []}
    with ray_session(), tempfile.TemporaryDirectory(prefix="cappy-benchmark-") as folder:
        for turn in range(options.turns):
            turns["answer"].append(through_answer(config, rows, Path(folder, str(turn))))
            turns["direct"].append(directly(config, rows))
            said = ", ".join(f"{name} {each[-1]['candidates'] / each[-1]['seconds']:.1f} candidates/s" for name, each in turns.items())
            log(f"turn {turn + 1} of {options.turns}: {said}")

    def median(name: str, key: str) -> float:
        return statistics.median(each[key] / each["seconds"] for each in turns[name])

    ours, theirs = median("answer", "candidates"), median("direct", "candidates")
    result = {
        "ratio": round(ours / theirs, 3),
        "candidates_per_second": round(ours, 2),
        "tokens_per_second": round(median("answer", "tokens"), 1),
        "direct_candidates_per_second": round(theirs, 2),
        "direct_tokens_per_second": round(median("direct", "tokens"), 1),
        "scoring_share": round(median("answer", "scoring"), 3),
        "rows": len(rows),
        "turns": options.turns,
        "unit_rows": config.generate.unit_rows,
    }
    print(
        f"{len(rows)} instructions, {options.turns} turns each: cappy answer {ours:.1f} candidates/s, engine alone {theirs:.1f}; "
        f"ratio {result['ratio']}; scoring takes {result['scoring_share']:.1%} of the time on its own"
    )
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
