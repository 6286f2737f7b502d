"""Methods that rank candidates: the selection of each in pools of a few candidates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.config import LabelConfig
from evaluation.methods import choice_methods, fitted_rank, rank_by, sampled_methods
from training.selection import Selection, Variant

DECODINGS = [{"name": "hot", "temperature": 0.9}, {"name": "greedy", "temperature": 0.0}, {"name": "top-k", "temperature": 1.0}]
POOL = [
    {"response": "a red fox ran", "label": 0.1, "decoding": "greedy", "logprob": -4.0, "tokens": 4, "scorer": 0.2},
    {"response": "no", "label": 0.2, "decoding": "hot", "logprob": -1.5, "tokens": 1, "scorer": 0.9},
    {"response": "a red fox sat", "label": 0.4, "decoding": "hot", "logprob": -8.0, "tokens": 16, "scorer": 0.1},
    {"response": "a red fox", "label": 0.8, "decoding": "top-k", "logprob": -9.0, "tokens": 3, "scorer": 0.5},
]


def values(pool, methods):
    labels_C = np.asarray([each["label"] for each in pool])
    return {method.name: method.value("?", pool, labels_C) for method in methods}


def test_each_method_selects_its_candidate():
    found = values(POOL, sampled_methods(DECODINGS, LabelConfig(), {"scorer": rank_by("scorer")}))
    assert found == pytest.approx(
        {
            "greedy": 0.1,
            "sample": 0.2,
            "decoding:hot": 0.3,
            "decoding:top-k": 0.8,
            "self_sum": 0.2,
            "self_mean": 0.4,
            "consensus": 0.8,
            "random": 0.375,
            "scorer": 0.2,
            "oracle": 0.8,
        }
    )


def test_a_method_without_its_fields_gives_nan_and_the_others_a_value():
    pool = [{**each, "logprob": None} for each in POOL if each["decoding"] != "greedy"]
    found = values(pool, sampled_methods(DECODINGS, LabelConfig(), {"fitted": rank_by("fitted")}))
    assert {name for name, value in found.items() if math.isnan(value)} == {"greedy", "self_sum", "self_mean", "fitted"}


def test_log_probabilities_of_several_llms_are_not_compared():
    pool = [{**each, "model": "one" if number else "two"} for number, each in enumerate(POOL)]
    found = values(pool, sampled_methods(DECODINGS, LabelConfig(), {}))
    assert {name for name, value in found.items() if math.isnan(value)} == {"self_sum", "self_mean"}


def test_a_fitted_selection_ranks_with_scores_or_without_them():
    pool = [{"response": text, "score": score, "logprob": None, "tokens": 1} for text, score in (("a", 0.2), ("b", 0.9), ("b b", 0.1))]
    overlap = Selection((Variant(("score",), (1.0,), (1.0,)), Variant(("overlap",), (1.0,), (1.0,))))
    assert fitted_rank(overlap, "score")("a", pool).argmax() == 1
    assert fitted_rank(overlap, None)("a", pool).argmax() == 0
    assert fitted_rank(None, "score")("a", pool).tolist() == [0.2, 0.9, 0.1]
    assert fitted_rank(overlap, "missing")("a", pool) is None
    assert fitted_rank(None, None)("a", pool).argmax() == 1  # the consensus: "b" agrees with "b b"


def test_consensus_of_one_candidate_is_that_candidate():
    assert values(POOL[:1], sampled_methods(DECODINGS, LabelConfig(), {}))["consensus"] == 0.1


def test_the_calibrated_likelihood_discounts_choices_that_are_likely_anyway():
    pool = [
        {"response": "yes", "label": 0.0, "likelihood": -1.0, "unconditional": -0.5, "tokens": 1, "scorer": 0.3},
        {"response": "perhaps not", "label": 1.0, "likelihood": -3.0, "unconditional": -6.0, "tokens": 4, "scorer": 0.3},
    ]
    found = values(pool, choice_methods({"scorer": rank_by("scorer")}, likelihood=True))
    assert found == {"random": 0.5, "likelihood_sum": 0.0, "likelihood_mean": 1.0, "likelihood_pmi": 1.0, "scorer": 0.5}
