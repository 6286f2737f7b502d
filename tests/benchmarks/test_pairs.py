"""The rows that benchmarks read: BIG-bench tasks by default, a Parquet file with `--data`."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.pairs import BIGBENCH_ROWS, bigbench_rows, labelled_pairs, read_rows
from benchmarks.split_leak import overlaps
from cluster.errors import UsageError

ROWS = [{"dataset": f"d{n % 2}", "template": "t", "instruction": f"ask {n}", "references": [f"answer {n}"]} for n in range(20)]


@pytest.fixture
def file(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.mark.usefixtures("bigbench_tasks")
def test_bigbench_rows_are_drawn_by_seed_with_their_choices():
    rows = bigbench_rows({"date_understanding": 50, "tense": 30})
    assert rows == bigbench_rows({"date_understanding": 50, "tense": 30}) != bigbench_rows({"date_understanding": 50, "tense": 30}, seed=1)
    assert [row["dataset"] for row in rows] == ["date_understanding"] * 50 + ["tense"] * 30
    assert all(set(row["references"]) < set(row["answer_choices"]) for row in rows[:50])
    assert all(row["answer_choices"] is None and len(row["references"]) == 1 for row in rows[50:])


def test_default_rows_suffice_for_the_default_number_of_pairs():
    # Not all tasks have as many rows; `benchmarks.training` takes 2,048 pairs.
    assert sum(BIGBENCH_ROWS.values()) > 4 * 2_048


def test_a_file_given_is_read_and_every_second_pair_has_its_own_reference(file):
    assert read_rows(file) == ROWS
    instructions, responses, labels = labelled_pairs(file, 20, seed=3)
    assert sorted(instructions) == sorted(row["instruction"] for row in ROWS) and labels == [0.0, 1.0] * 10
    own = {row["instruction"]: row["references"][0] for row in ROWS}
    assert [own[instruction] for instruction in instructions[1::2]] == responses[1::2]


def test_errors_name_the_file_the_missing_column_and_the_rows_there_are(file, tmp_path):
    pq.write_table(pa.table({"instruction": ["x"]}), tmp_path / "less.parquet")
    with pytest.raises(UsageError, match=r"less.parquet has no column dataset, references, but instruction; rename"):
        read_rows(tmp_path / "less.parquet")
    with pytest.raises(UsageError, match=r"none.parquet cannot be read as Parquet"):
        read_rows(tmp_path / "none.parquet")
    with pytest.raises(UsageError, match=r"21 pairs are more than the 20 rows of .*rows.parquet"):
        labelled_pairs(file, 21, seed=3)


def test_overlap_of_sorted_runs_is_membership():
    import numpy as np

    draw = np.random.default_rng(1)
    for _ in range(200):
        runs, seen = (np.unique(draw.integers(0, 60, draw.integers(0, 8)).astype(np.uint64)) for _ in range(2))
        assert overlaps(runs, seen) == bool(set(runs.tolist()) & set(seen.tolist()))
