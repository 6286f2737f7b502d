"""Rounds, expected gain and stop reasons, compared with hand-made and simulated values."""

import json
import math

import numpy as np
import pytest

from cluster.config import AdaptiveConfig, Config, DecodingConfig
from generation.engines.contract import Candidate
from serving.completions_api import parse_chat_request
from serving.sampling_policy import select_decodings
from training.early_stopping import expected_gain, new_response_probability, nth_best_score, plan_rounds, stop_reason

PRIOR = AdaptiveConfig(prior_mean=0.4, prior_std=0.2, prior_weight=2)


def drawn(*responses, logprob=None):
    return [Candidate(response=each, decoding="sample", tokens=3, finish_reason="stop", logprob=logprob) for each in responses]


def cut(n, first=1, size=3, **fields):
    fields = {"model": "cappy", "messages": [{"role": "user", "content": "hi"}], "cappy": {"candidates": n}, **fields}
    decodings = select_decodings(parse_chat_request(json.dumps(fields).encode()), Config())
    return decodings, [[(part.name, part.n) for part in parts] for parts in plan_rounds(decodings, first, size)]


def test_the_first_round_is_greedy_and_later_ones_take_the_decodings_in_turn():
    assert cut(8)[1] == [
        [("greedy", 1)],
        [("sample", 1), ("temperature", 1), ("top-k", 1)],
        [("sample", 1), ("temperature", 1), ("top-p", 1)],
        [("top-k", 1)],
    ]
    assert cut(8, size=7)[1] == [[("greedy", 1)], [("sample", 2), ("temperature", 2), ("top-k", 2), ("top-p", 1)]]
    assert cut(6, temperature=0.7, size=4)[1] == [[("request", 1)], [("request", 4)], [("request", 1)]]


@pytest.mark.parametrize("n", [1, 2, 8, 17, 64])
@pytest.mark.parametrize("first", [1, 2, 8])
def test_the_rounds_add_up_to_the_pool_and_the_first_has_a_candidate_per_choice(n, first):
    decodings, parts = cut(n, first=first)
    total = {decoding.name: sum(count for part in parts for name, count in part if name == decoding.name) for decoding in decodings}
    assert total == {decoding.name: decoding.n for decoding in decodings}
    assert sum(count for _, count in parts[0]) == min(n, first)


def test_every_candidate_of_a_beam_search_is_in_the_first_round():
    beam = DecodingConfig(name="beam", n=2, temperature=0, beams=4)
    assert [[(part.name, part.n) for part in parts] for parts in plan_rounds([DecodingConfig(name="a", n=2), beam], 1, 9)] == [
        [("beam", 2)],
        [("a", 2)],
    ]


@pytest.mark.parametrize("scores", [[0.4], [0.9], [0.1, 0.2, 0.15], [0.2, 0.8, 0.5, 0.55]])
def test_the_gain_is_the_mean_improvement_of_draws_from_the_shrunk_distribution(scores):
    candidates = drawn(*map(str, range(len(scores))))
    count, weight = len(scores), PRIOR.prior_weight
    mean = (sum(scores) + weight * PRIOR.prior_mean) / (count + weight)
    variance = (np.var(scores) * count + weight * PRIOR.prior_std**2) / (count + weight - 1)
    draws = np.random.default_rng(0).normal(mean, variance**0.5, 2_000_000)
    improved = np.maximum(draws - max(scores), 0)
    assert expected_gain(candidates, scores, PRIOR) == pytest.approx(improved.mean(), abs=4 * improved.std() / 2_000_000**0.5)


def test_more_repeats_make_a_new_response_less_probable():
    # (responses that occur once + 1) / (samples + 1)
    assert [new_response_probability(drawn(*text)) for text in ("a", "ab", "aa", "aaaa", "aabc")] == [1, 1, 1 / 3, 1 / 5, 3 / 5]


def test_the_probabilities_of_the_sampled_responses_reduce_the_probability_of_a_new_one():
    likely = drawn("a", logprob=math.log(0.9))
    # The probability of a repeated response counts once.
    assert new_response_probability(likely) == new_response_probability(likely * 2) == pytest.approx(0.1)
    assert new_response_probability([*likely, *drawn("b", logprob=math.log(0.05))]) == pytest.approx(0.05)
    assert (
        new_response_probability(likely, use_logprobs=False) == new_response_probability([*likely, *drawn("b")]) == 1
    )  # one log-probability is unknown
    assert new_response_probability([*likely, *drawn("b", logprob=math.log(0.2))]) == 0


def test_with_several_choices_the_gain_is_over_the_nth_best_and_repeats_and_empty_responses_do_not_count():
    candidates, scores = drawn("a", "b", "a", "", "c"), [0.9, 0.3, 0.9, 2.0, math.nan]
    assert [nth_best_score(candidates, scores, n) for n in (1, 2, 3)] == [0.9, 0.3, -math.inf]
    assert expected_gain(candidates, scores, PRIOR, 1) < expected_gain(candidates, scores, PRIOR, 2)
    assert expected_gain(candidates, scores, PRIOR, 3) == math.inf


def test_sampling_stops_at_the_target_score_or_below_the_minimum_gain():
    candidates, scores = drawn("a", "b"), [0.9, 0.3]
    gain = expected_gain(candidates, scores, PRIOR)

    def reason(n=1, **settings):
        return stop_reason(candidates, scores, PRIOR.model_copy(update=settings), n)

    assert reason(target_score=0.9) == "target_score" and reason(target_score=0.91) is None and reason(n=2, target_score=0.9) is None
    assert reason(min_gain=gain * 1.01) == "min_gain" and reason(min_gain=gain * 0.99) is None and reason(n=3, min_gain=9.0) is None
    assert reason() is None and reason(min_gain=0) is None
