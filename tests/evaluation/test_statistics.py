"""The statistics, compared with brute force, with scipy and with simulations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import statistics

# Few distinct numbers, so that equal scores are common.
COARSE = st.integers(0, 3).map(lambda value: value / 3)


def rows(*lists):
    """Return lists of different lengths as a padded array and the mask of its real elements."""
    longest = max(map(len, lists))
    padded = np.array([[*each, *[np.nan] * (longest - len(each))] for each in lists], float)
    return padded, np.array([[at < len(each) for at in range(longest)] for each in lists])


def test_the_first_of_tied_scores_is_picked():
    scores, present = rows([0.1, 0.7, 0.7], [0.5, 0.5, 0.5], [-3.0, -2.0])
    assert statistics.pick_best(scores, present).tolist() == [1, 0, 1]


def test_padding_is_never_picked_even_below_the_worst_score():
    scores, present = rows([-1e9], [-5.0, -6.0])
    assert statistics.pick_best(scores, present).tolist() == [0, 0]


def test_every_task_has_the_same_weight_with_any_number_of_rows():
    values, tasks = np.array([[1.0], [1.0], [1.0], [0.0]]), np.array([0, 0, 0, 1])
    assert statistics.task_averages(values, tasks).tolist() == [[1.0], [0.0]]
    assert statistics.macro_average(values, tasks).tolist() == [0.5]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(COARSE, COARSE), min_size=1, max_size=7))
def test_expected_best_of_k_equals_the_mean_over_all_subsets(pairs):
    scores, values = (np.array(each) for each in zip(*pairs, strict=True))
    sizes = range(1, len(pairs) + 1)
    brute = [
        np.mean([values[max(subset, key=lambda at: (scores[at], -at))] for subset in combinations(range(len(pairs)), size)])
        for size in sizes
    ]
    present = np.ones((1, len(pairs)), bool)
    assert statistics.expected_best_of_k(scores[None], values[None], present, sizes)[0] == pytest.approx(brute)


def test_expected_best_of_k_uses_all_candidates_of_a_row_with_fewer():
    scores, present = rows([0.2, 0.9], [0.1, 0.2, 0.3])
    values, _ = rows([0.0, 1.0], [0.5, 0.6, 0.7])
    expected = statistics.expected_best_of_k(scores, values, present, [1, 3])
    assert expected == pytest.approx(np.array([[0.5, 1.0], [0.6, 0.7]]))


def test_in_large_pools_best_of_one_is_the_mean_and_best_of_all_is_the_pick():
    rng = np.random.default_rng(0)
    scores, values = rng.random((2, 3, 4096))
    present = np.ones_like(scores, bool)
    expected = statistics.expected_best_of_k(scores, values, present, [1, 2048, 4096])
    assert expected[:, 0] == pytest.approx(values.mean(axis=1))
    assert np.isfinite(expected).all()
    assert expected[:, 2] == pytest.approx(values[np.arange(3), scores.argmax(axis=1)])


@settings(max_examples=30, deadline=None)
@given(st.lists(COARSE, min_size=2, max_size=12))
def test_the_oracle_never_decreases_with_more_candidates(values):
    table = np.array([values])
    curve = statistics.expected_best_of_k(table, table, np.ones_like(table, bool), range(1, len(values) + 1))[0]
    assert (np.diff(curve) >= -1e-12).all()
    assert curve[-1] == pytest.approx(max(values))


def test_bootstrap_interval_matches_scipys_percentile_bootstrap():
    values = np.random.default_rng(3).beta(0.5, 0.8, 80)
    samples = statistics.bootstrap(values[:, None], np.zeros(80, int), 6000, seed=1)[:, 0, 0]
    ours = statistics.interval(samples, 0.95)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=6000, method="percentile", rng=2).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.008)


def test_a_95_percent_interval_covers_the_true_mean_in_about_95_of_100_cases():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        values = np.concatenate([rng.binomial(1, 0.3, 60), rng.binomial(1, 0.7, 40)]).astype(float)
        macro = statistics.bootstrap(values[:, None], np.repeat([0, 1], [60, 40]), 400, seed=trial).mean(axis=1)[:, 0]
        low, high = statistics.interval(macro, 0.95)
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_rows_are_resampled_within_their_task_only():
    values, tasks = np.array([[1.0]] * 5 + [[2.0]] * 3), np.repeat([0, 1], [5, 3])
    assert (statistics.bootstrap(values, tasks, 50, seed=0) == np.array([[1.0], [2.0]])).all()


def test_columns_share_the_drawn_rows_so_differences_are_paired():
    values = np.random.default_rng(0).random((30, 1)) + np.array([[0.0, 0.1]])
    samples = statistics.bootstrap(values, np.zeros(30, int), 100, seed=0)
    assert samples[:, 0, 1] - samples[:, 0, 0] == pytest.approx(np.full(100, 0.1))


def test_the_bootstrap_depends_on_the_seed_and_not_on_the_batch_size(monkeypatch):
    values, tasks = np.random.default_rng(0).random((40, 2)), np.repeat([0, 1], 20)
    first, again, other = (statistics.bootstrap(values, tasks, 100, seed) for seed in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any()
    monkeypatch.setattr(statistics, "_DRAWS", 90)
    assert statistics.bootstrap(values, tasks, 100, 7).mean(axis=0) == pytest.approx(first.mean(axis=0), abs=0.05)


def test_the_closed_share_of_the_gap_is_undefined_without_a_gap():
    share = statistics.gap_closed(np.array([25.0, 20.0, 18.0, 20.0]), np.full(4, 20.0), np.array([40.0, 40.0, 40.0, 20.0]))
    assert share[:3].tolist() == [0.25, 0.0, -0.1]
    assert np.isnan(share[3])


def test_calibration_groups_are_of_equal_size_and_ordered_by_score():
    scores = np.array([0.9, 0.1, 0.5, 0.7, 0.3, 0.2])
    groups = statistics.calibration(scores, scores**2, 3)
    assert [group["count"] for group in groups] == [2, 2, 2]
    assert [group["score"] for group in groups] == pytest.approx([0.15, 0.4, 0.8])
    assert len(statistics.calibration(scores[:2], scores[:2], 10)) == 2
