"""Labels per second against `rouge_score`, and whether every bit of them agrees.

    python -m benchmarks.rouge --pairs 20000 --json -

The pairs are real: each T0 training row's reference against a reference of another row of its dataset, or (every third) a
prefix of its own, so that overlaps of all sizes occur. The baseline is `rouge_score.RougeScorer(["rougeL"],
use_stemmer=True)` on the same pairs, in the same process, on one core; ours runs once beforehand, to warm its memo of stems.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from generation.annotate import rouge_l

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "t0_train.parquet"


def real_pairs(path: Path, count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Return `count` (response, references) pairs made of the texts of T0 training rows."""
    rows = pq.read_table(path, columns=["dataset", "instruction", "references"]).to_pylist()
    by_dataset: dict[str, list[dict[str, Any]]] = {}
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


def compare(pairs: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """Return pairs per second of both, their ratio, and the number of labels that differ in any bit."""
    from rouge_score.rouge_scorer import RougeScorer

    baseline = RougeScorer(["rougeL"], use_stemmer=True)
    for response, references in pairs:
        rouge_l(response, references)
    start = time.perf_counter()
    ours = [rouge_l(response, references) for response, references in pairs]
    middle = time.perf_counter()
    theirs = [baseline.score_multi(references, response)["rougeL"].fmeasure for response, references in pairs]
    end = time.perf_counter()
    return {
        "pairs": len(pairs),
        "mismatches": sum(struct.pack("d", a) != struct.pack("d", b) for a, b in zip(ours, theirs, strict=True)),
        "nonzero": sum(value > 0 for value in theirs),
        "pairs_per_second": round(len(pairs) / (middle - start)),
        "baseline_pairs_per_second": round(len(pairs) / (end - middle)),
        "speedup": round((end - middle) / (middle - start), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--data", type=Path, default=DATA, help="Parquet with dataset, instruction, references")
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    result = compare(real_pairs(options.data, options.pairs, options.seed))
    print(
        f"{result['pairs']:,} pairs: ours {result['pairs_per_second']:,}/s, rouge_score {result['baseline_pairs_per_second']:,}/s, "
        f"{result['speedup']}x; {result['mismatches']} labels differ ({result['nonzero']:,} are above 0)"
    )
    if options.json:
        print(json.dumps(result))
    return 1 if result["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
