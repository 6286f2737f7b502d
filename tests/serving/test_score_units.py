from __future__ import annotations

import functools

import numpy as np
import pyarrow as pa
import pytest

from cluster import storage
from cluster.config import load
from serving import score_units
from tests.serving.number_scorer import NumberScorer, load_number_scorer, score_of


class Counting(NumberScorer):
    """Counts the pairs of each call."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def score(self, instructions, responses):
        self.sizes.append(len(instructions))
        return super().score(instructions, responses)


def unit(*pairs):
    instructions, responses = zip(*pairs, strict=True)
    return pa.table({"instruction": instructions, "response": responses})


def test_equal_pairs_of_a_unit_are_scored_once():
    scorer = Counting()
    pairs = [("q", "a"), ("q", "b"), ("q", "a"), ("r", "a"), ("q", "a")]
    logits, failed, repeated = score_units.score_pairs(scorer, unit(*pairs))
    assert logits.tolist() == pytest.approx([score_of(*pair) for pair in pairs])
    assert (failed, repeated, scorer.sizes) == ({}, 2, [3])


def test_a_pair_that_the_scorer_cannot_score_is_found_and_the_others_are_scored():
    pairs = [(f"q{n}", "a") for n in range(9)]
    pairs[3] = pairs[7] = ("NO SCORE", "a")
    logits, failed, repeated = score_units.score_pairs(NumberScorer(), unit(*pairs))
    assert failed == dict.fromkeys((3, 7), "the scorer failed (RuntimeError: out of memory)") and repeated == 1
    assert np.isnan(logits[[3, 7]]).all() and np.isfinite(np.delete(logits, [3, 7])).all()


def test_a_score_that_is_not_finite_is_a_reason():
    class Infinite(NumberScorer):
        def score(self, instructions, responses):
            return np.array([np.inf if text == "bad" else 1.0 for text in responses], np.float32)

    logits, failed, _ = score_units.score_pairs(Infinite(), unit(("q", "a"), ("q", "bad")))
    assert failed == {1: "the score is not a finite number"} and np.isnan(logits[1])


def test_the_data_type_of_the_first_scorer_is_used_by_all_later_ones(tmp_path):
    config = load(None, ["serving.scorer_dtype=auto"])

    def load_on(machine, config):
        dtype = config.serving.scorer_dtype
        return load_number_scorer(config, dtype=machine if dtype == "auto" else dtype)

    staging = f"{tmp_path}/_staging"
    for machine in ("bfloat16", "float32"):
        loaded = score_units.load_with_arithmetic(staging, config, functools.partial(load_on, machine))
        assert loaded.model.dtype == "bfloat16"
    assert storage.read_json(f"{staging}/{score_units.ARITHMETIC}")["dtype"] == "bfloat16"
