from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import AdaptConfig
from generation.schema import DATASET
from tests.training.test_adapt_one import task_rows
from training import gate
from training.selection import blend_selection

SETTINGS = AdaptConfig()


def metrics(selection: float | None, pairwise: float | None = None, accuracy: float | None = None) -> dict[str, float | None]:
    return {"selection": selection, "pairwise_accuracy": pairwise, "accuracy": accuracy, "random": 0.2, "self_mean": None, "oracle": 0.9}


def test_the_gate_requires_a_gain_of_at_least_min_gain():
    def decide(before: dict[str, Any], after: dict[str, Any], **chosen: Any) -> dict[str, Any]:
        return gate.decide_gate(before, after, AdaptConfig.model_validate(chosen))

    won = decide(metrics(0.25), metrics(0.5))
    assert won == {"metric": "selection", "before": 25.0, "after": 50.0, "gain": 25.0, "passed": True}
    assert not decide(metrics(0.5), metrics(0.25))["passed"] and not decide(metrics(0.5), metrics(0.5))["passed"]
    assert decide(metrics(0.25), metrics(0.5), min_gain=25)["passed"]
    assert not decide(metrics(0.25), metrics(0.5), min_gain=25.1)["passed"]
    assert decide(metrics(0.5, 0.25), metrics(0.4, 0.5), metric="pairwise_accuracy")["passed"]
    level = decide(metrics(0.3), metrics(0.3), metric="pairwise_accuracy")
    assert level["gain"] is None and not level["passed"]
    assert decide(metrics(None, accuracy=0.5), metrics(None, accuracy=0.75))["gain"] == 25


def test_results_are_in_points_and_accuracy_replaces_selection_for_choices():
    figures = gate.summarise_points(metrics(0.25, 0.5), metrics(0.5, 0.75))
    assert figures == {
        "before": 25,
        "after": 50,
        "fitted": None,
        "random": 20,
        "self": None,
        "oracle": 90,
        "pairwise_accuracy": {"before": 50, "after": 75},
    }
    assert gate.summarise_points(metrics(0.25), metrics(0.5), np.array([1.0, np.nan, 0.5]))["fitted"] == 75
    assert gate.summarise_points(metrics(None, accuracy=0.5), metrics(None, accuracy=1.0))["after"] == 100


def row(labels: list[float], sources: list[str] | None = None) -> dict[str, Any]:
    """Return a row with responses a, b, ... and these labels."""
    made = task_rows("colors", 1, 1)[0]
    sources = sources or ["sampled"] * len(labels)
    candidates = [
        {**made["candidates"][-1], "response": chr(97 + at), "label": label, "source": source}
        for at, (label, source) in enumerate(zip(labels, sources, strict=True))
    ]
    return {**made, "candidates": candidates}


def test_the_value_of_a_row_is_the_label_of_its_pick_or_its_share_of_ordered_pairs():
    rows = [
        row([0.2, 0.9, 0.5]),
        row([1.0, 0.3, 0.6], ["reference", "sampled", "sampled"]),  # only samples are picked
        row([1.0, 0.0], ["reference", "choice"]),
        row([1.0, 0.0], ["reference", "mismatched"]),
    ]
    table = pa.Table.from_pylist(rows, DATASET)
    scores = [np.array(each, np.float64) for each in ([0, 2, 1], [3, 1, 2], [0, 1], [1, 0])]
    assert gate.row_values(table, scores, "selection").tolist()[:3] == [0.9, 0.6, 0.0]
    assert math.isnan(gate.row_values(table, scores, "selection")[3])
    assert gate.row_values(table, scores, "pairwise_accuracy").tolist() == [1.0, 1.0, 0.0, 1.0]
    level = pa.Table.from_pylist([row([0.5, 0.5])], DATASET)
    assert math.isnan(gate.row_values(level, [np.zeros(2)], "pairwise_accuracy")[0])


def test_the_cross_validated_gain_is_paired_and_has_an_interval():
    before, after = np.array([0.1, 0.5, math.nan, 0.3]), np.array([0.2, 0.9, 1.0, 0.2])
    decision = gate.decide_on_rows(before, after, SETTINGS)
    gains = np.array([10, 40, -10])
    assert (decision["rows"], decision["split"], decision["folds"], decision["passed"]) == (3, "train", 2, True)
    assert decision["before"] == pytest.approx(30) and decision["after"] == pytest.approx(130 / 3)
    assert decision["gain"] == pytest.approx(gains.mean())
    error = gains.std(ddof=1) / math.sqrt(3)
    assert (decision["low"], decision["high"]) == pytest.approx((gains.mean() - 1.2816 * error, gains.mean() + 1.2816 * error))
    assert decision["low"] is not None and decision["low"] < 0  # an interval around 0 does not reject a scorer that gains


@pytest.mark.parametrize(
    ("before", "after", "min_gain", "passed"),
    [([0.2], [0.3], 0, True), ([0.2], [0.3], 11, False), ([0.2], [0.2], 0, False), ([0.4], [0.3], 0, False), ([math.nan], [1], 0, False)],
)
def test_the_mean_gain_decides(before: list[float], after: list[float], min_gain: float, passed: bool):
    settings = SETTINGS.model_copy(update={"min_gain": min_gain})
    assert gate.decide_on_rows(np.array(before), np.array(after), settings)["passed"] is passed


@pytest.mark.parametrize(
    ("after", "base_fitted", "passed", "weights", "points"),
    [
        (0.6, 0.5, True, None, 60),  # the adapted weights gain more
        (0.6, 0.6, True, "base", 60),  # equal: no other weights are needed
        (0.5, 0.6, True, "base", 60),
        (0.3, 0.6, True, "base", 60),
        (0.3, 0.4, False, None, 30),  # neither gains
        (0.6, None, True, None, 60),
    ],
)
def test_the_base_with_a_fitted_selection_passes_if_the_adapted_weights_are_not_better(after, base_fitted, passed, weights, points):
    rows = np.ones(10)
    decision = gate.decide_on_rows(0.4 * rows, after * rows, SETTINGS, None if base_fitted is None else base_fitted * rows)
    assert (decision["passed"], decision.get("weights"), decision["after"]) == (passed, weights, pytest.approx(points))


def test_the_values_of_rows_are_those_of_the_picks_of_a_selection():
    candidates = [
        {"response": text, "label": label, "source": "sampled", "logprob": logprob, "tokens": 1}
        for text, label, logprob in (("a", 0.1, -9.0), ("b", 0.7, -1.0), ("", 0.9, 0.0))
    ]
    table = pa.Table.from_pylist([{"instruction": "x", "candidates": candidates}])
    scores = [np.array([0.9, 0.1, 0.2])]
    assert gate.row_values(table, scores, "selection").tolist() == [0.1]
    assert gate.row_values(table, scores, "selection", blend_selection(1.0)).tolist() == [0.7]
    assert gate.row_values(table, scores, "pairwise_accuracy", blend_selection(1.0)).tolist() == [1 / 3]
