from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from training import validation

# Few values, so that ties are common.
COARSE = st.integers(0, 3).map(lambda value: value / 3)


def test_measure_ranks_within_instructions_only():
    labels = np.array([1.0, 0.5, 0.0, 1.0, 1.0, 0.0], np.float32)
    scores = np.array([0.9, 0.4, 0.1, 0.2, 0.3, 0.3], np.float32)
    groups = np.array([0, 0, 0, 1, 1, 1])
    metrics = validation.measure(scores, labels, groups).metrics()
    assert metrics["mse"] == pytest.approx(np.mean((scores - labels) ** 2))
    assert metrics["spearman"] == pytest.approx((1 - 0.5) / 2)
    assert metrics["pairwise_accuracy"] == pytest.approx((3 + 0 + 0.5) / 5)
    halves = validation.measure(scores[:3], labels[:3], groups[:3]) + validation.measure(scores[3:], labels[3:], groups[3:])
    assert halves.metrics() == pytest.approx(metrics)
    assert validation.NOTHING.metrics()["mse"] is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(COARSE, COARSE), min_size=2, max_size=9))
def test_rank_agreement_is_scipys_spearman_and_counts_pairs(pairs):
    scores, values = (np.array(each) for each in zip(*pairs, strict=True))
    spearman, counted, right = validation.rank_agreement(scores, values)
    unequal = [(a, b) for a, b in combinations(range(len(pairs)), 2) if values[a] != values[b]]
    expected = [0.5 if scores[a] == scores[b] else float((scores[a] > scores[b]) == (values[a] > values[b])) for a, b in unequal]
    assert (counted, right) == (len(unequal), sum(expected))
    constant = len(set(scores)) == 1 or len(set(values)) == 1
    assert spearman == pytest.approx(0.0 if constant else scipy.stats.spearmanr(scores, values).statistic)
