"""The answer with its usage and its cappy object."""

from __future__ import annotations

from generation.engines.contract import Candidate
from serving import responses
from tests.serving.test_completions_api import request


def candidate(response: str, tokens: int = 3) -> Candidate:
    return Candidate(response=response, decoding="sample", tokens=tokens, finish_reason="stop", logprob=-1.0)


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
