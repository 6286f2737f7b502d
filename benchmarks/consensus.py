"""Compare the time of the consensus of a pool with a loop over `rouge_score`.

    python -m benchmarks.consensus --json -

A pool has 16 draws: prefixes of the references of one dataset, of which some repeat, as an LLM's samples do. The texts are those of
BIG-bench tasks, or of `--data`. The baseline calls `rouge_score` once for each ordered pair of draws in the same process. Both use one
thread and alternate in blocks of pools. The time of the consensus includes splitting the texts into words. A first pass compiles the code
and fills its cache of word stems; it is reported as `cold_ms`. `selection_ms` is the time of all signals and of a fitted ranker over them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.pairs import DATA_HELP, Row, read_rows
from cluster.config import LabelConfig
from training.consensus import consensus
from training.selection import VARIANTS, Pool, Selection, Variant

DRAWS = 16
_BLOCK = 10


def make_pools(rows: Sequence[Row], count: int, seed: int) -> list[list[str]]:
    """Return `count` pools of `DRAWS` non-empty responses made of references of one dataset."""
    by_dataset: dict[str, list[Row]] = {}
    for row in rows:
        by_dataset.setdefault(row["dataset"], []).append(row)
    draw = random.Random(seed)
    pools = []
    for _ in range(count):
        same = draw.choice(list(by_dataset.values()))
        texts = [draw.choice(draw.choice(same)["references"]).split(" ") for _ in range(DRAWS * 3 // 4)]
        distinct = [" ".join(words[: draw.randint(1, len(words))]) or "a" for words in texts]
        pools.append([draw.choice(distinct) for _ in range(DRAWS)])
    return pools


def naive_consensus(responses: Sequence[str], scorer: RougeScorer) -> np.ndarray:
    """Return the mean Rouge-L of each response with the others, with one call of `rouge_score` for each ordered pair."""
    return np.array(
        [
            np.mean([scorer.score(other, response)["rougeL"].fmeasure for at, other in enumerate(responses) if at != number])
            for number, response in enumerate(responses)
        ]
    )


def compare(pools: list[list[str]]) -> dict[str, Any]:
    """Return the milliseconds of a pool by each way, their ratio, and the largest difference of the values."""
    baseline = RougeScorer(["rougeL"], use_stemmer=True)
    ranker = Selection(tuple(Variant(names, (1.0,) * len(names), (1.0,) * len(names)) for names in VARIANTS))
    seconds = dict.fromkeys(("cold", "ours", "unicode", "selection", "baseline"), 0.0)
    difference = 0.0

    def timed(name: str, work: Callable[[list[str]], np.ndarray], part: Sequence[list[str]]) -> list[np.ndarray]:
        start = time.process_time()
        results = [work(pool) for pool in part]
        seconds[name] += time.process_time() - start
        return results

    def ranked(pool: list[str]) -> np.ndarray:
        return ranker.rank(Pool(pool, [0.01 * len(text) for text in pool], [-1.0 * len(text) for text in pool], [len(pool)] * len(pool)))

    timed("cold", consensus, pools)
    consensus(pools[0], LabelConfig(mode="unicode"))
    for begin in range(0, len(pools), _BLOCK):
        part = pools[begin : begin + _BLOCK]
        ours = timed("ours", consensus, part)
        timed("unicode", lambda pool: consensus(pool, LabelConfig(mode="unicode")), part)
        timed("selection", ranked, part)
        theirs = timed("baseline", lambda pool: naive_consensus(pool, baseline), part)
        # Equal responses without words agree here, and have Rouge-L 0 in `rouge_score`.
        worded = [all(any(character.isascii() and character.isalnum() for character in text) for text in pool) for pool in part]
        compared = [float(abs(one - other).max()) for one, other, kept in zip(ours, theirs, worded, strict=True) if kept]
        difference = max(difference, *compared, 0.0)
    milliseconds = {name: round(1000 * spent / len(pools), 3) for name, spent in seconds.items()}
    return {
        "speedup": round(seconds["baseline"] / seconds["ours"], 1),
        "pools": len(pools),
        "draws": DRAWS,
        "ms": milliseconds.pop("ours"),
        **{f"{name}_ms": value for name, value in milliseconds.items()},
        "largest_difference": difference,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pools", type=int, default=300)
    parser.add_argument("--seed", type=int, default=20261129)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    result = compare(make_pools(read_rows(options.data), options.pools, options.seed))
    print(
        f"{result['pools']} pools of {DRAWS}: consensus {result['ms']:.2f} ms, rouge_score {result['baseline_ms']:.1f} ms a pool "
        f"({result['speedup']}x), unicode mode {result['unicode_ms']:.2f} ms, all signals and a ranker {result['selection_ms']:.2f} ms; "
        f"largest difference {result['largest_difference']:.1e}"
    )
    if options.json:
        print(json.dumps(result))
    return 0 if result["ms"] < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
