from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.schema import CANDIDATE
from training import validation

# Few values, so that ties are common.
COARSE = st.integers(0, 3).map(lambda value: value / 3)


def candidate(response: str, label: float, source: str = "sampled", **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("model", "decoding", "tokens", "finish_reason", "logprob"))
    return {**empty, "response": response, "label": label, "source": source, **more}


def table(*rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({"instruction": [f"i{number}" for number in range(len(rows))], "candidates": pa.array(list(rows), pa.list_(CANDIDATE))})


def by_text(instructions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Score a response by the number in it: `a0.7` scores 0.7."""
    return np.array([float(response[1:]) for response in responses], np.float32)


GENERATION = [
    candidate("r0.99", 1.0, "reference"),
    candidate("a0.9", 0.4, decoding="warm", logprob=-8.0, tokens=4),
    candidate("b0.2", 0.8, decoding="greedy", logprob=-2.0, tokens=2),
    candidate("c0.5", 0.0, decoding="warm", logprob=-3.0, tokens=6),
    candidate("c0.5", 0.0, decoding="warm", logprob=-3.0, tokens=6),
]
CLASSIFICATION = [candidate("y0.3", 1.0, "reference"), candidate("n0.8", 0.0, "choice"), candidate("m0.1", 0.0, "choice")]
SECOND = [candidate("y0.9", 1.0, "reference"), candidate("n0.8", 0.0, "choice")]


def test_metrics_equal_a_computation_by_hand():
    metrics = validation.measure_scores(table(GENERATION, CLASSIFICATION, SECOND), by_text, "greedy").metrics()
    scores = np.array([0.99, 0.9, 0.2, 0.5, 0.3, 0.8, 0.1, 0.9, 0.8])
    labels = np.array([1.0, 0.4, 0.8, 0.0, 1, 0, 0, 1, 0])
    assert metrics["pairs"] == 9
    assert metrics["mse"] == pytest.approx(np.mean((scores - labels) ** 2))
    assert metrics["selection"] == pytest.approx(0.4)
    assert metrics["random"] == pytest.approx((0.4 + 0.8) / 4)
    assert metrics["oracle"] == pytest.approx(0.8)
    assert metrics["greedy"] == pytest.approx(0.8)
    assert metrics["self_sum"] == pytest.approx(0.8)
    assert metrics["self_mean"] == pytest.approx(0.0)
    assert metrics["accuracy"] == pytest.approx(0.5)


def test_sums_add_up_over_batches():
    rows = [GENERATION, CLASSIFICATION, SECOND, GENERATION[1:]]
    whole = validation.measure_scores(table(*rows), by_text, "greedy")
    parts = sum((validation.measure_scores(table(row), by_text, "greedy") for row in rows), validation.EMPTY_SUMS)
    assert parts.metrics() == pytest.approx(whole.metrics())
    assert [*map(tuple, (each.values() for each in parts.calibration()))] == [
        pytest.approx(tuple(each.values())) for each in whole.calibration()
    ]
    assert set(validation.EMPTY_SUMS.metrics().values()) == {0, None} and validation.EMPTY_SUMS.calibration() == []


def test_a_baseline_is_none_if_one_row_does_not_allow_it():
    unknown = [candidate("a0.9", 0.4, decoding="warm"), candidate("b0.1", 0.2, decoding="warm")]
    metrics = validation.measure_scores(table(GENERATION, unknown), by_text, "greedy").metrics()
    assert metrics["selection"] == pytest.approx(0.4) and metrics["oracle"] == pytest.approx(0.6)
    assert metrics["greedy"] is metrics["self_sum"] is metrics["self_mean"] is None
    assert validation.measure_scores(table(CLASSIFICATION), by_text).metrics()["selection"] is None
    assert validation.measure_scores(table(GENERATION), by_text).metrics()["accuracy"] is None


def test_calibration_counts_each_pair_once_and_groups_scores_outside_0_to_1():
    outside = [candidate("a-0.5", 0.0), candidate("b0.0", 0.0), candidate("c1.5", 1.0), candidate("d0.95", 0.5), candidate("e0.96", 1.0)]
    groups = validation.measure_scores(table(outside), by_text).calibration()
    assert [group["count"] for group in groups] == [1, 1, 2, 1]
    assert [group["score"] for group in groups] == pytest.approx([-0.5, 0.0, 0.955, 1.5])
    assert [group["label"] for group in groups] == pytest.approx([0, 0, 0.75, 1])


def test_ranks_are_compared_within_instructions_only():
    rows = table([candidate("a0.9", 1.0), candidate("b0.4", 0.5), candidate("c0.1", 0.0)], [candidate("a0.2", 1.0), candidate("b0.3", 0.0)])
    metrics = validation.measure_scores(rows, by_text).metrics()
    assert metrics["spearman"] == pytest.approx((1 - 1) / 2)
    assert metrics["pairwise_accuracy"] == pytest.approx(3 / 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(COARSE, COARSE), min_size=2, max_size=9))
def test_rank_agreement_equals_the_spearman_of_scipy_and_counts_pairs(pairs):
    scores, values = (np.array(each) for each in zip(*pairs, strict=True))
    spearman, counted, right = validation.rank_agreement(scores, values)
    unequal = [(a, b) for a, b in combinations(range(len(pairs)), 2) if values[a] != values[b]]
    expected = [0.5 if scores[a] == scores[b] else float((scores[a] > scores[b]) == (values[a] > values[b])) for a, b in unequal]
    assert (counted, right) == (len(unequal), sum(expected))
    constant = len(set(scores)) == 1 or len(set(values)) == 1
    assert spearman == pytest.approx(0.0 if constant else scipy.stats.spearmanr(scores, values).statistic)


def test_is_better_follows_the_direction_of_the_metric():
    assert validation.is_better("mse", 0.1, 0.2) and not validation.is_better("mse", 0.2, 0.2)
    assert validation.is_better("selection", 0.3, 0.2) and validation.is_better("selection", 0.3, None)
    assert not validation.is_better("selection", None, 0.2) and not validation.is_better("mse", None, None)
