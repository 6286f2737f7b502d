"""The selection of the choices, and the answer with its usage and its cappy object."""

from __future__ import annotations

import math

import pytest

from cluster.config import LabelConfig
from generation.engines.contract import Candidate
from serving import responses
from serving.responses import distinct_responses, rank_candidates, select_choices
from tests.serving.test_completions_api import request
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
    first, second, empty = responses.ranking_scores("", candidates, [0.9, 0.5, 0.1], blend_selection(0.5))
    assert second - first == pytest.approx(0.25 + 0.1) and empty < first
    assert responses.ranking_scores("", candidates, [0.9, 0.5, 0.1], None) == [0.9, 0.5, 0.1]
    unknown = [*candidates, {**candidate("c"), "logprob": None}]
    ranking = responses.ranking_scores("", unknown, [0.9, 0.5, 0.1, 0.2], blend_selection(0.5))
    assert responses.rank_candidates(unknown, ranking) == [0, 1, 3, 2]


def test_a_selection_ranks_the_scored_candidates_as_one_pool():
    selection = Selection((Variant(("score", "consensus"), (1.0, 5.0), (1.0, 1.0)),))
    candidates = [candidate("a b"), candidate("a c"), candidate("d"), candidate("d")]
    first, second, third, missing = responses.ranking_scores("", candidates, [0.1, 0.2, 0.3, float("nan")], selection)
    assert second > first > third and math.isnan(missing)
    alone = Selection((Variant(("score", "consensus"), (1.0, 0.0), (1.0, 1.0)),))
    assert math.isnan(responses.ranking_scores("", [candidate("a")], [float("nan")], alone)[0])


def test_the_fallback_consensus_ranks_by_the_agreement_with_the_other_candidates():
    candidates = [candidate("a b"), candidate("c"), candidate("a d b")]
    ranking = responses.fallback_ranking_scores(candidates, "consensus", LabelConfig())
    assert ranking == pytest.approx([0.4, 0.0, 0.4])
    assert responses.rank_candidates(candidates, ranking) == [0, 2, 1]


def test_usage_counts_the_returned_choices_and_cappy_all_candidates():
    candidates = [candidate("a", 5), candidate("b", 7), candidate("", 1)]
    answer = responses.build_completion(
        request(n=2, cappy={"return_candidates": True}),
        candidates,
        [0.1, 0.2, float("nan")],
        [0.1, 0.2, float("nan")],
        prompt_tokens=10,
        scorer="s",
        latency=responses.Latency(sampling_s=1, scoring_s=0.1),
        completion_id="1",
        created=1,
    )
    assert [choice.message.content for choice in answer.choices] == ["b", "a"]
    assert answer.usage.model_dump() == {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}
    assert answer.cappy is not None
    assert answer.cappy.sampled_tokens == 13
    assert [(each.response, each.score, each.chosen) for each in answer.cappy.candidates] == [
        ("b", 0.2, True),
        ("a", 0.1, True),
        ("", None, False),
    ]
