"""The number of candidates, the decodings and the limits of one request."""

from __future__ import annotations

import pytest

from cluster.config import GREEDY, Config, DecodingConfig, SamplerConfig, ServingConfig
from serving.sampling_policy import select_decodings
from tests.serving.test_completions_api import request


def pool(fields=None, config=None):
    return [(decoding.name, decoding.n) for decoding in select_decodings(request(**(fields or {})), config or Config())]


def test_a_pool_has_one_candidate_per_greedy_decoding_and_shares_the_rest_equally():
    assert pool() == [("greedy", 1), ("sample", 2), ("temperature", 2), ("top-k", 2), ("top-p", 1)]
    assert pool({"cappy": {"candidates": 1}}) == [("greedy", 1)]
    assert pool({"cappy": {"candidates": 3}}) == [("greedy", 1), ("sample", 1), ("temperature", 1)]
    assert pool({"cappy": {"candidates": 42}}) == [("greedy", 1), ("sample", 11), ("temperature", 10), ("top-k", 10), ("top-p", 10)]


@pytest.mark.parametrize("candidates", [1, 2, 5, 17, 64])
def test_a_pool_has_the_requested_number_of_candidates(candidates):
    assert sum(n for _, n in pool({"cappy": {"candidates": candidates}})) == candidates


def test_n_above_the_default_pool_enlarges_it():
    assert sum(n for _, n in pool({"n": 20})) == 20


def test_a_temperature_in_the_request_replaces_the_decodings():
    (decoding,) = select_decodings(request(temperature=0.5, top_p=0.9, cappy={"candidates": 6}), Config())
    assert (decoding.n, decoding.temperature, decoding.top_p, decoding.top_k) == (6, 0.5, 0.9, None)
    (decoding,) = select_decodings(request(temperature=0), Config())
    assert (decoding.n, decoding.temperature) == (1, 0.0)


def test_a_request_can_name_its_decodings():
    named = {"decodings": ["top-p", "sample", "greedy"]}
    assert pool({"cappy": {**named, "candidates": 6}}) == [("greedy", 1), ("sample", 3), ("top-p", 2)]
    assert pool({"cappy": {"decodings": ["top-k"]}}) == [("top-k", 8)]
    assert pool({"cappy": {"decodings": ["greedy"]}}) == pool({"cappy": {"decodings": ["greedy", "greedy"]}}) == [("greedy", 1)]


def test_a_sampler_with_only_greedy_decodings_fills_its_pool_at_temperature_1():
    config = Config(sampler=SamplerConfig(decodings=(GREEDY,)))
    assert pool({"cappy": {"candidates": 4}}, config) == [("greedy", 1), ("sample", 3)]


def test_an_unscored_pool_has_n_candidates_unless_more_are_requested():
    def size(**fields):
        return sum(decoding.n for decoding in select_decodings(request(**fields), Config(), scored=False))

    assert (size(), size(n=3), size(n=3, cappy={"candidates": 5})) == (1, 3, 5)


def test_length_and_stop_strings_of_the_request_reach_every_decoding():
    own = (DecodingConfig(name="a", min_tokens=5, stop=("\n",)), DecodingConfig(name="b"))
    config = Config(sampler=SamplerConfig(decodings=own))
    decodings = select_decodings(request(max_tokens=9, max_completion_tokens=3, stop="END", n=2), config)
    assert [(each.max_tokens, each.min_tokens, each.stop) for each in decodings] == [(3, 3, ("\n", "END")), (3, 0, ("END",))]


def test_the_default_pool_is_within_the_default_limit():
    assert ServingConfig().candidates <= ServingConfig().max_candidates
