"""Compare this project's Rouge-L with `rouge_score`: labels per second, and equality of every bit.

    python -m benchmarks.rouge --json -

The texts are rows of BIG-bench tasks, or of `--data`. A third of the responses each are: a prefix of the row's reference, a reference
of another row of the same dataset, the start of the instruction. So overlaps of all sizes occur.

The baseline is `rouge_score.RougeScorer(["rougeL"], use_stemmer=True)` on the same pairs in the same process. Both use one thread and
alternate every 10,000 pairs; seconds are CPU seconds. Before that, this project's code runs once over all texts, which compiles it and
fills its cache of word stems. That run is reported as `cold`. The cache holds words, never texts or labels. The input of this
project's code is Arrow columns, the baseline's is Python strings; `from_python` includes the conversion of strings to columns.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.pairs import DATA_HELP, Row, read_rows
from cluster.progress import Bar
from generation.labels import TEXTS, rouge_l_batch

TURN = 10_000

Pairs = list[tuple[str, list[str]]]


def real_pairs(rows: Sequence[Row], count: int, seed: int) -> Pairs:
    """Return `count` (response, references) pairs made of the texts of rows."""
    by_dataset: dict[str, list[Row]] = {}
    for row in rows:
        by_dataset.setdefault(row["dataset"], []).append(row)
    draw = random.Random(seed)
    pairs = []
    for number in range(count):
        row = draw.choice(rows)
        if number % 3 == 0:
            words = row["references"][0].split(" ")
            response = " ".join(words[: draw.randint(1, len(words))])
        elif number % 3 == 1:
            response = draw.choice(draw.choice(by_dataset[row["dataset"]])["references"])
        else:
            response = row["instruction"][: draw.randint(1, 400)]
        pairs.append((response, row["references"]))
    return pairs


def compare(pairs: Pairs) -> dict[str, Any]:
    """Return the pairs per second of both sides, their ratio, and the number of labels that differ in any bit."""
    baseline = RougeScorer(["rougeL"], use_stemmer=True)
    seconds = dict.fromkeys(("cold", "ours", "from_python", "unicode", "baseline"), 0.0)
    mismatches = nonzero = 0

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[name] += time.process_time() - start
        return result

    def from_python(part: Pairs) -> np.ndarray:
        return rouge_l_batch(*columns(part))

    def scored(part: Pairs) -> list[float]:
        return [baseline.score_multi(right, said)["rougeL"].fmeasure for said, right in part]

    turns = [columns(pairs[begin : begin + TURN]) for begin in range(0, len(pairs), TURN)]
    timed("cold", lambda: [rouge_l_batch(*turn) for turn in turns])
    for turn in turns:
        rouge_l_batch(*turn, "unicode")
    with Bar("comparing", len(pairs), "pairs") as bar:
        for number, turn in enumerate(turns):
            part = pairs[number * TURN : (number + 1) * TURN]
            ours = timed("ours", partial(rouge_l_batch, *turn))
            timed("from_python", partial(from_python, part))
            timed("unicode", partial(rouge_l_batch, *turn, "unicode"))
            theirs = timed("baseline", partial(scored, part))
            mismatches += int((ours.view(np.int64) != np.array(theirs, np.float64).view(np.int64)).sum())
            nonzero += int((ours > 0).sum())
            bar.advance(len(part))
    rates = {name: round(len(pairs) / spent) for name, spent in seconds.items()}
    return {
        "speedup": round(seconds["baseline"] / seconds["ours"], 1),
        "mismatches": mismatches,
        "pairs": len(pairs),
        "nonzero": nonzero,
        "pairs_per_second": rates.pop("ours"),
        **{f"{name}_pairs_per_second": rate for name, rate in rates.items()},
        "unicode_speedup": round(seconds["baseline"] / seconds["unicode"], 1),
    }


def columns(pairs: Pairs) -> tuple[pa.ListArray, pa.ListArray]:
    """Return the responses and the references of pairs as columns, with one pair per row."""
    return pa.array([[said] for said, _ in pairs], TEXTS), pa.array([right for _, right in pairs], TEXTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    result = compare(real_pairs(read_rows(options.data), options.pairs, options.seed))
    print(
        f"{result['pairs']:,} pairs: cappy {result['pairs_per_second']:,}/s, rouge_score {result['baseline_pairs_per_second']:,}/s, "
        f"{result['speedup']}x; {result['mismatches']} labels differ ({result['nonzero']:,} are above 0); "
        f"unicode mode {result['unicode_pairs_per_second']:,}/s"
    )
    if options.json:
        print(json.dumps(result))
    return 1 if result["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
