"""The selection of the choices of a pool."""

from __future__ import annotations

import math

import pytest

from cluster.config import LabelConfig
from generation.engines.contract import Candidate
from serving.ranking import distinct_responses, fallback_ranking_scores, rank_candidates, ranking_scores, select_choices
from training.selection import Selection, Variant, blend_selection


def candidate(response: str, tokens: int = 3) -> Candidate:
    return Candidate(response=response, decoding="sample", tokens=tokens, finish_reason="stop", logprob=-1.0)


def test_choices_are_distinct_and_best_first_and_equal_scores_keep_their_order():
    candidates = [candidate(text) for text in ("b", "a", "b", "c", "d")]
    scores = [0.2, 0.9, 0.2, 0.2, 0.1]
    assert distinct_responses(candidates) == ["b", "a", "c", "d"]
    assert select_choices(candidates, scores, 3) == [1, 0, 3]
    assert rank_candidates(candidates, scores) == [1, 0, 2, 3, 4]


def test_repeated_responses_are_chosen_last():
    candidates = [candidate(text) for text in ("a", "a", "b")]
    assert select_choices(candidates, [0.5, 0.5, 0.1], 3) == [0, 2, 1]


def test_empty_and_scoreless_responses_rank_last():
    candidates = [candidate(""), candidate("a"), candidate("b")]
    assert select_choices(candidates, [0.9, 0.1, 0.2], 3) == [2, 1, 0]
    assert select_choices(candidates, [0.9, float("nan"), 0.2], 1) == [2]


def test_the_blend_adds_the_mean_log_probability_unless_one_is_missing():
    candidates = [{**candidate("a", 4), "logprob": -8.0}, {**candidate("b", 2), "logprob": -1.0}, {**candidate("", 0), "logprob": 0.0}]
    first, second, empty = ranking_scores("", candidates, [0.9, 0.5, 0.1], blend_selection(0.5))
    assert second - first == pytest.approx(0.25 + 0.1) and empty < first
    assert ranking_scores("", candidates, [0.9, 0.5, 0.1], None) == [0.9, 0.5, 0.1]
    unknown = [*candidates, {**candidate("c"), "logprob": None}]
    ranking = ranking_scores("", unknown, [0.9, 0.5, 0.1, 0.2], blend_selection(0.5))
    assert rank_candidates(unknown, ranking) == [0, 1, 3, 2]


def test_a_selection_ranks_the_scored_candidates_as_one_pool():
    selection = Selection((Variant(("score", "consensus"), (1.0, 5.0), (1.0, 1.0)),))
    candidates = [candidate("a b"), candidate("a c"), candidate("d"), candidate("d")]
    first, second, third, missing = ranking_scores("", candidates, [0.1, 0.2, 0.3, float("nan")], selection)
    assert second > first > third and math.isnan(missing)
    alone = Selection((Variant(("score", "consensus"), (1.0, 0.0), (1.0, 1.0)),))
    assert math.isnan(ranking_scores("", [candidate("a")], [float("nan")], alone)[0])


def test_the_fallback_consensus_ranks_by_the_agreement_with_the_other_candidates():
    candidates = [candidate("a b"), candidate("c"), candidate("a d b")]
    ranking = fallback_ranking_scores(candidates, "consensus", LabelConfig())
    assert ranking == pytest.approx([0.4, 0.0, 0.4])
    assert rank_candidates(candidates, ranking) == [0, 2, 1]
