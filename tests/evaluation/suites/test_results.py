"""Results of a suite: averages, gains with two intervals, outcomes, and the share of the oracle gap."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import CappyError
from evaluation.methods import Method
from evaluation.statistics import bootstrap_tasks
from evaluation.suites.results import best_baseline_values, compare, complete_values

ROLES = {"greedy": "baseline", "fitted": "trained", "oracle": "oracle"}


def compared(by_method, tasks_R, names):
    arrays = {name: np.asarray(values, float) for name, values in by_method.items()}
    return compare(arrays, ROLES, names, np.asarray(tasks_R), resamples=400, confidence=0.95, seed=3)


def test_tasks_have_equal_weights_and_shares_are_of_the_averages():
    # Task 0 has three rows, task 1 has one.
    found = compared(
        {"greedy": [0.2, 0.2, 0.2, 0.4], "fitted": [0.5, 0.2, 0.2, 0.4], "oracle": [0.8, 0.8, 0.8, 0.8]}, [0, 0, 0, 1], ["a", "b"]
    )
    gain = found["gains"]["fitted"]["greedy"]
    assert gain["mean"] == pytest.approx(5)
    assert gain["outcomes"] == {"wins": 1, "ties": 3, "losses": 0}
    assert gain["tasks"] == {"wins": 1, "ties": 1, "losses": 0}
    assert found["oracle_gap"]["fitted"]["greedy"]["mean"] == pytest.approx(5 / 50)
    assert found["per_task"]["a"]["gains"]["fitted"]["greedy"]["mean"] == pytest.approx(10)


def test_the_interval_over_tasks_is_wide_when_one_task_makes_the_gain_and_the_one_over_rows_is_not():
    rows = 60
    tasks_R = np.repeat(np.arange(6), rows)
    gain_R = np.where(tasks_R == 0, 0.6, 0.0)
    found = compared({"greedy": np.full(6 * rows, 0.2), "fitted": 0.2 + gain_R, "oracle": np.full(6 * rows, 0.9)}, tasks_R, list("abcdef"))
    gain = found["gains"]["fitted"]["greedy"]
    assert gain["low"] == pytest.approx(gain["mean"]) == pytest.approx(10)
    assert gain["low_tasks"] == pytest.approx(0)
    assert gain["high_tasks"] > 19
    assert gain["not_below"] == {"tasks": 6, "of": 6, "min_rows": 50}


def test_the_best_baseline_is_chosen_by_the_other_folds():
    # Baseline a is better in fold 0, b in fold 1: each fold gets the choice of the other one.
    values, chosen = best_baseline_values(
        {"a": np.asarray([0.9, 0.1]), "b": np.asarray([0.2, 0.3])}, np.asarray([0, 0]), np.asarray([0, 1])
    )
    assert values.tolist() == [0.2, 0.1]
    assert chosen == {(0, 0): "b", (0, 1): "a"}


def test_rows_that_one_method_cannot_rank_are_left_out_of_all():
    methods = [Method(name, "baseline", lambda *_: None) for name in ("greedy", "self_sum", "sample")]
    found = complete_values(
        methods, {"greedy": np.asarray([0.1, 0.2, np.nan]), "self_sum": np.full(3, np.nan), "sample": np.asarray([0.3, 0.4, 0.5])}
    )
    assert found.rows.tolist() == [0, 1]
    assert list(found.by_method) == ["greedy", "sample"]
    assert list(found.left_out) == ["self_sum"]
    with pytest.raises(CappyError, match="no row has candidates for all of greedy, sample"):
        complete_values(methods[::2], {"greedy": np.asarray([0.1, np.nan]), "sample": np.asarray([np.nan, 0.3])})


def test_resampled_tasks_keep_their_averages():
    samples = bootstrap_tasks(np.asarray([[10.0], [30.0]]), 500, seed=1)
    assert set(np.unique(samples)) == {10.0, 20.0, 30.0}
