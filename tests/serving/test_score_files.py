from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import load
from generation import units
from generation.pair_units import PAIRS
from serving import score, score_files
from serving.score_units import SCORES


def test_the_distribution_has_mean_quantiles_and_ten_bins():
    scores = np.linspace(0, 1, 101)
    found = score_files.distribution(score_files.count_scores(scores).tolist(), float(scores.sum()))
    assert sum(found["bins"]) == 101 and found["bins"][-1] == 11
    assert found["mean"] == pytest.approx(0.5)
    assert [found[name] for name in ("p5", "p50", "p95")] == pytest.approx([0.05, 0.5, 0.95], abs=0.011)
    assert score_files.distribution([0] * score_files.FINE_BINS, 0.0) == {"mean": None, "bins": [0] * 10}


def write(tmp_path, logits, **options):
    staging, name = f"{tmp_path}/_staging", "scores-000000"
    rows = [{"id": f"{n:032x}", "instruction": "q", "response": f"a{n}", "own": f'{{"score": {n}}}'} for n in range(len(logits))]
    units.write_unit(units.unit_uri(staging, "prepared", name), pa.Table.from_pylist(rows, PAIRS))
    table = pa.table([pa.array(logits, pa.float32(), from_pandas=True)], schema=SCORES)
    counts = {"unit": name, "rows": len(logits), "repeated": 1, "dead_letters": 1, "cost": 0.0}
    units.write_unit(units.unit_uri(staging, "units", name), units.with_metadata(table, {"counts": counts, "letters": ["{}"]}))
    target = f"{tmp_path}/data/scores/part-00000-00000000.parquet"
    filters = {"keep_above": None, "kept": None, **options}
    shard = score_files.write_scores([name], staging, target, {"score": "int64"}, **filters, row_group_rows=2, check=lambda: None)
    return shard, pq.read_table(target).to_pylist()


def test_scores_are_limited_to_their_range_and_own_columns_keep_their_values(tmp_path):
    shard, rows = write(tmp_path, [-0.25, 0.5, float("nan"), 1.5])
    assert [(row["score"], row["logit"], row["source_score"]) for row in rows] == [(0, -0.25, 0), (0.5, 0.5, 1), (1, 1.5, 3)]
    assert (shard["entry"]["rows"], shard["letters"], shard["repeated"], sum(shard["bins"])) == (3, 1, 1, 3)
    assert shard["score_sum"] == 1.5 and (shard["below"], shard["ranked_out"]) == (0, 0)


def test_dropped_rows_are_counted_by_their_reason(tmp_path):
    best = np.array([True, False, False, True, True])
    shard, rows = write(tmp_path, [0.1, 0.5, float("nan"), 0.5, 0.9], keep_above=0.5, kept=best)
    assert [row["response"] for row in rows] == ["a3", "a4"]
    assert (shard["below"], shard["ranked_out"], sum(shard["bins"])) == (1, 1, 4)


def test_the_smallest_kept_score_is_compared_with_the_score_and_not_with_the_logit(tmp_path):
    shard, rows = write(tmp_path, [-0.25, 0.5, float("nan"), 1.5], keep_above=0.0)
    assert len(rows) == 3 and shard["below"] == 0
    assert write(tmp_path, [-0.25, 0.5, float("nan"), 1.5], keep_above=1.25)[0]["below"] == 3


def test_the_command_of_a_run_names_its_options():
    options = ["score.keep_above=0.5", "score.top_per_instruction=2", "scorer_path=cappy-minilm"]
    found = score.command_line("s3://bucket/a b.jsonl", load(None, options))
    assert found == "cappy score 's3://bucket/a b.jsonl' DST --scorer cappy-minilm --keep-above 0.5 --top-per-instruction 2"
