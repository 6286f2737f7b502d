"""Real (instruction, response) pairs of T0 for benchmarks of the scorer."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "t0_train.parquet"

Pairs = tuple[list[str], list[str], list[float]]


def t0_pairs(path: Path, count: int, seed: int) -> Pairs:
    """Return instructions, responses and labels of `count` rows drawn from the whole file.

    Every second row keeps a reference of its own (label 1), the others get one of another row of their dataset (label 0).
    """
    rows = pq.read_table(path, columns=["dataset", "instruction", "references"]).to_pylist()
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["dataset"], []).append(row["references"][0])
    draw = random.Random(seed)
    drawn = draw.sample(rows, count)
    responses = [row["references"][0] if place % 2 else draw.choice(references[row["dataset"]]) for place, row in enumerate(drawn)]
    return [row["instruction"] for row in drawn], responses, [float(place % 2) for place in range(count)]
