"""The values of a gateway's metrics after one pool."""

import math

from prometheus_client.parser import text_string_to_metric_families

from generation.engines.contract import Candidate
from serving.best_of_n import Pool
from serving.prometheus import Metrics


def candidate(response, tokens):
    return Candidate(response=response, decoding="sample", tokens=tokens, finish_reason="stop", logprob=None)


def values(metrics):
    """Return the value of each sample, by name and labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_a_pool_counts_its_candidates_tokens_cost_scores_seconds_and_stop_reason():
    metrics = Metrics()
    pool = Pool(
        parts=[[candidate("a", 3), candidate("a", 3)], [candidate("b", 5)]],
        score_of={"a": 0.5, "b": math.nan},
        prompt_tokens=7,
        cost=0.25,
        sampling_s=2.0,
        scoring_s=0.5,
        stop_reason="scorer",
    )
    metrics.observe_pool(pool)
    found = values(metrics)
    assert found["cappy_serving_candidates_total",] == 3
    assert (found["cappy_serving_tokens_total", "prompt"], found["cappy_serving_tokens_total", "sampled"]) == (7, 11)
    assert found["cappy_serving_cost_dollars_total",] == 0.25
    # The distinct responses with a score: one of two.
    assert (found["cappy_serving_score_count",], found["cappy_serving_score_sum",]) == (1, 0.5)
    assert (found["cappy_serving_seconds_sum", "sampling"], found["cappy_serving_seconds_sum", "scoring"]) == (2.0, 0.5)
    assert found["cappy_serving_stopped_total", "scorer"] == 1


def test_a_pool_without_prices_and_stop_reason_adds_no_cost_and_no_reason():
    metrics = Metrics()
    metrics.observe_pool(Pool(parts=[[candidate("a", 1)]], score_of={"a": 0.1}))
    found = values(metrics)
    assert found["cappy_serving_cost_dollars_total",] == 0
    assert not [key for key in found if key[0] == "cappy_serving_stopped_total"]


def test_each_gateway_has_its_own_counts():
    one, other = Metrics(), Metrics()
    one.count_fallback("first")
    one.count_abstention()
    assert values(one)["cappy_serving_fallbacks_total", "first"] == 1 == values(one)["cappy_serving_abstentions_total",]
    assert values(other)["cappy_serving_abstentions_total",] == 0
