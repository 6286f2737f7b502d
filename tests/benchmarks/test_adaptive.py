"""The replay of a pool and the choice of a setting in `benchmarks.adaptive`."""

import numpy as np
import pytest

from benchmarks import adaptive
from cluster.config import AdaptiveConfig, DecodingConfig

GREEDY = DecodingConfig(name="greedy", temperature=0)
WARM = DecodingConfig(name="warm", n=4)


def candidate(response: str, score: float, decoding: str = "warm", label: float | None = None) -> dict:
    own = {"response": response, "score": score, "label": score if label is None else label, "decoding": decoding}
    return {**own, "tokens": 3, "logprob": -1.0, "finish_reason": "stop"}


def test_the_prior_is_the_mean_and_the_spread_within_an_instruction_of_distinct_responses():
    rows = [
        {"candidates": [candidate("a", 0.0), candidate("a", 0.0), candidate("b", 0.4), candidate("", 9.0)]},
        {"candidates": [candidate("c", 0.6)]},
    ]
    prior = adaptive.fitted_prior(rows, 4)
    assert prior.prior_mean == pytest.approx((0.2 + 0.6) / 2) and prior.prior_std == pytest.approx(0.08**0.5, abs=1e-3)
    assert prior.round_size == 4


def test_the_grid_has_powers_of_two_below_the_pool_and_the_whole_pool():
    ways = adaptive.grid(AdaptiveConfig(), 9)
    assert {name: way for name, way in ways.items() if isinstance(way, int)} == {"n=1": 1, "n=2": 2, "n=4": 4, "n=8": 8, "all": 9}
    assert all(ways[f"min_gain={gain:g}"].min_gain == gain for gain in adaptive.MIN_GAINS)


def test_a_replay_stops_at_its_number_or_at_its_target_and_picks_by_score():
    rounds = [[candidate("g", 0.1, "greedy", label=0.9)], [candidate("a", 0.8, label=0.5)], [candidate("b", 0.9, label=0.2)]]
    ways = {"n=1": 1, "all": 3, "target": AdaptiveConfig(target_score=0.7), "never": AdaptiveConfig(target_score=2.0)}
    assert adaptive.replay(rounds, ways).tolist() == [[0.9, 3, 1], [0.2, 9, 3], [0.5, 6, 2], [0.2, 9, 3]]


def test_a_replay_of_a_whole_pool_is_the_same_in_every_order():
    pool = [candidate("g", 0.1, "greedy"), *(candidate(f"r{at}", at / 10) for at in range(4))]
    points = adaptive.replay_all([{"candidates": pool}], [GREEDY, WARM], {"n=1": 1, "all": 5}, 2, orders=3, seed=1)
    assert points[0, 0].tolist() == pytest.approx([0.1, 3, 1]) and points[0, 1].tolist() == pytest.approx([0.3, 15, 5])


@pytest.mark.parametrize(("tolerance", "chosen"), [(0.5, "min_gain=0.01"), (5, "min_gain=0.1"), (0, "min_gain=0.001")])
def test_the_chosen_setting_has_the_fewest_tokens_within_the_tolerance(tolerance, chosen):
    ways = {"n=1": 1, "all": 8, **{name: AdaptiveConfig() for name in ("min_gain=0.001", "min_gain=0.01", "min_gain=0.1")}}
    points = np.array([[0.30, 3, 1], [0.40, 24, 8], [0.399, 20, 7], [0.397, 12, 4], [0.36, 6, 2]])
    assert adaptive.choose(points, ways, tolerance) == chosen


def test_a_fixed_number_with_the_same_rouge_l_is_interpolated_and_missing_above_the_curve():
    ways = {"n=1": 1, "n=2": 2, "all": 4, "min_gain=0.01": AdaptiveConfig(), "min_gain=0.1": AdaptiveConfig()}
    points = np.array([[0.2, 2, 1], [0.4, 4, 2], [0.35, 8, 4], [0.3, 2.5, 1.2], [0.5, 3, 1.5]])
    samples = np.repeat(points[None], 5, axis=0)
    assert adaptive.report(points, samples, ways, "min_gain=0.01")["chosen"]["tokens_of_fixed_n_at_same_rouge_l"] == 3.0
    curve = adaptive.report(points, samples, ways, "min_gain=0.1")
    assert curve["chosen"]["tokens_of_fixed_n_at_same_rouge_l"] is None
    assert curve["curve"]["min_gain=0.1"]["rouge_l_minus_all"]["mean"] == pytest.approx(15.0)
