from __future__ import annotations

from typing import Any

import pytest

from cluster.config import Config, ObjectiveConfig
from training import model_card

CONFIG = Config.model_validate({"workspace": "runs/x", "scorer": {"encoder": "enc", "max_length": 128}, "training": {"epochs": 2}})
SUMMARY: dict[str, Any] = {
    "uri": "runs/x/scorer",
    "steps": 1200,
    "pairs": 3000,
    "epochs": 2,
    "train_mse": 0.0512,
    "validation": {"pairs": 60, "mse": 0.0634, "selection": 0.7123, "greedy": None},
    "calibration": [],
    "best": {"metric": None, "value": None, "step": None},
    "blend": None,
    "cut_pairs": 17,
}


def test_the_card_has_the_measures_that_are_known_and_how_the_scorer_was_trained():
    card = model_card.render_card(CONFIG, SUMMARY, {"code_version": "v1"})
    assert "| MSE, validation | 0.0634 |" in card and "0.7123" in card
    assert "greedy" not in card
    assert 'Scorer.load("runs/x/scorer")' in card
    assert "3,000 pairs (17 cut to 128 tokens)" in card and "(written by v1)" in card
    assert "The published weights are those of the last step." in card
    assert "calibration.svg" not in card and "mean log-probability\nper token" not in card


def test_the_card_names_the_best_step_the_calibration_and_the_blend():
    summary = SUMMARY | {
        "best": {"metric": "selection", "value": 0.7, "step": 400},
        "calibration": [{"count": 3, "score": 0.5, "label": 0.4}],
        "blend": {"logprob_weight": 0.05, "rows": 500, "selection_train": 0.61, "selection_train_blend": 0.64},
    }
    card = model_card.render_card(CONFIG, summary, {})
    assert "The published weights are those of step 400, the best validation by selection." in card
    assert "![calibration](calibration.svg)" in card
    assert "score + 0.05 x mean log-probability" in card and "0.6100 by\nscore alone, and 0.6400" in card


OUTCOME: dict[str, Any] = {
    "task": "sides",
    "uri": "runs/x/adapted/sides",
    "base": {"name": "the-base"},
    "method": "full",
    "label": "rouge_l",
    "pairs": 2048,
    "distinct_pairs": 90,
    "train_rows": 40,
    "steps": 64,
    "learning_rate": 2e-5,
    "figures": {"before": 25.0, "after": 50.0, "random": 20.0, "self": None, "oracle": 90.0, "rows": 15, "apart": True},
}


def test_the_card_of_an_adapted_scorer_has_its_points():
    card = model_card.render_adapted_card(CONFIG, OUTCOME)
    assert "| before | 25.0 |\n| after | 50.0 |\n| random | 20.0 |\n| oracle | 90.0 |" in card
    assert "15 validation rows. The gate did not use these rows." in card and "library_name: transformers" in card
    same = model_card.render_adapted_card(CONFIG, OUTCOME | {"figures": OUTCOME["figures"] | {"apart": False}})
    assert "The gate used the same rows." in same


def test_the_card_shows_the_fitted_selection():
    measured = {"fitted": 0.316, "score": 0.3, "consensus": 0.25, "random": 0.16, "oracle": 0.38}
    fitted = {"rows": 1200, "l2": 0.1, "weights": {"score": 0.4, "consensus": -0.2}, "cross_validated": measured}
    card = model_card.render_adapted_card(CONFIG, OUTCOME | {"selection": fitted})
    assert "fitted on 1,200 train rows" in card and "| score | 0.400 | 30.0 |\n| consensus | -0.200 | 25.0 |" in card
    assert "31.6\npoints, random picks 16.0, and the best candidates 38.0" in card
    unmeasured = model_card.render_adapted_card(CONFIG, OUTCOME | {"selection": fitted | {"cross_validated": {}}})
    assert "| score | 0.400 | |" in unmeasured and "cross-validation" not in unmeasured
    assert "selection.json" not in model_card.render_adapted_card(CONFIG, OUTCOME | {"selection": None})


def test_the_card_of_adapters_without_validation_rows_has_no_points():
    card = model_card.render_adapted_card(CONFIG, OUTCOME | {"figures": None, "method": "lora", "trained_parameters": 1234})
    assert "The task had no validation rows, so the gain was not measured." in card
    assert "library_name: peft" in card and "1,234 parameters in low-rank adapters of rank 8 and the head" in card


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "mean squared error on the raw logit, towards labels"),
        ({"mse": 0, "pairwise": 1}, "pairwise (temperature 0.2), towards labels"),
        (
            {"listwise": 0.5, "labels": "power"},
            "mean squared error on the raw logit + 0.5 x listwise (temperature 0.2), towards labels to the power of 0.5",
        ),
    ],
)
def test_the_objective_in_words(settings: dict[str, Any], words: str):
    assert model_card.describe_objective(ObjectiveConfig.model_validate(settings)) == words


def test_plots_are_svg_images():
    loss = model_card.plot_loss([{"step": 10, "loss": 0.3}, {"step": 20, "loss": 0.2}, {"step": 20, "validation": {"mse": 0.25}}])
    calibration = model_card.plot_calibration([{"count": 3, "score": 0.5, "label": 0.4}])
    assert all(image.startswith(b"<?xml") and b"<svg" in image for image in (loss, calibration))
