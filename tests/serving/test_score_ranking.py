from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from generation import units
from serving import score_ranking
from serving.score_units import SCORES

UNIT_ROWS = 7


def write_units(staging, instructions, logits):
    names = []
    for number, start in enumerate(range(0, len(logits), UNIT_ROWS)):
        part, name = slice(start, start + UNIT_ROWS), f"scores-{number:06d}"
        names.append(name)
        units.write_unit(units.unit_uri(staging, "prepared", name), pa.table({"instruction": instructions[part]}))
        table = pa.table([pa.array(logits[part], pa.float32(), from_pandas=True)], schema=SCORES)
        units.write_unit(units.unit_uri(staging, "units", name), table)
    return names


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("file_rows", [1 << 20, 11])
def test_the_best_rows_of_each_instruction_are_kept_also_across_units_and_files(file_rows, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(score_ranking, "FILE_ROWS", file_rows)
    draw = random.Random(5)
    instructions = [f"say {draw.randrange(9)}" for _ in range(60)]
    logits = [float("nan") if draw.random() < 0.1 else draw.choice([-1.0, 0.25, 0.5, 2.0]) for _ in instructions]
    names = write_units(f"{tmp_path}/_staging", instructions, logits)
    kept = score_ranking.best_rows(f"{tmp_path}/_staging", names, UNIT_ROWS, len(logits), limit)
    expected = np.zeros(len(logits), bool)
    for instruction in set(instructions):
        rows = [row for row, each in enumerate(instructions) if each == instruction and logits[row] == logits[row]]
        expected[sorted(rows, key=lambda row: -logits[row])[:limit]] = True  # of equal scores the first row
    assert kept.tolist() == expected.tolist()
