from __future__ import annotations

import pytest

from cluster.config import load
from generation import cost_model
from generation.cost_model import Count, Rates

ORIGIN = {"sampled": "measured", "prompt": "measured", "tokens_per_candidate": "measured", "bytes_per_pair": "measured"}
DECODINGS = "sampler.decodings=[{name: greedy, temperature: 0, max_tokens: 10}, {name: warm, n: 4, max_tokens: 30}]"
# 100 sampled instructions with 150 references of 8 tokens, 20 tokens each; 50 classification rows with 2 wrong choices each.
COUNTS = {
    "made up": Count(80, 20, 100, 150, 150, 0, 2000.0, 1200.0),
    "multiple choice": Count(40, 10, 0, 50, 0, 100),
}


def estimate(*overrides, **changed):
    rates = {"sampled": 50.0, "prompt": 200.0, "tokens_per_candidate": None, "bytes_per_pair": 100.0, "origin": ORIGIN}
    return cost_model.estimate_plan(COUNTS, load(None, [DECODINGS, *overrides]), Rates(**rates | changed))


def test_rows_pairs_and_tokens_equal_values_calculated_by_hand():
    result = estimate("generate.mismatched=2")
    totals = result["totals"]
    assert totals["instructions"] == 150 and totals["sampled_instructions"] == 100
    # 5 candidates per instruction; 2 mismatched references per reference of a sampled row.
    assert totals["pairs_by_source"] == {"reference": 200, "choice": 100, "mismatched": 300, "sampled": 500}
    assert totals["pairs"] == 1100 and totals["bytes"] == 110_000
    # 8 tokens per candidate, as a reference has; at most 10 + 4 x 30 per instruction.
    assert totals["sampled_tokens"] == {"expected": 100 * 5 * 8, "most": 100 * 130} and totals["prompt_tokens"] == 2000
    row = result["mixture"]["made up"]
    assert (row["train"], row["validation"], row["mean_prompt_tokens"], row["candidates"], row["pairs"]) == (80, 20, 20.0, 500, 950)


def test_hours_and_dollars_equal_values_calculated_by_hand():
    result = estimate("plan.gpus=[1, 2, 8]", "sampler.engine.tensor_parallel=2", "plan.gpu_dollars_per_hour=3")
    expected = (2000 / 200 + 4000 / 50) / 3600  # a replica has two GPUs and takes 90 s
    assert result["compute"]["gpu_hours"]["expected"] == pytest.approx(2 * expected)
    assert result["compute"]["wall_hours"] == {"1": None, "2": pytest.approx(expected), "8": pytest.approx(expected / 4)}
    assert result["dollars"]["expected"] == pytest.approx(6 * expected)
    assert result["dollars"]["most"] == pytest.approx(6 * (10 + 13_000 / 50) / 3600)


def test_without_a_prompt_rate_only_sampled_tokens_take_time():
    assert estimate(prompt=None)["compute"]["gpu_hours"]["expected"] == pytest.approx(4000 / 50 / 3600)


@pytest.mark.parametrize(("tokens", "expected"), [(20.0, 100 * (10 + 4 * 20)), (100.0, 100 * 130)])
def test_measured_tokens_per_candidate_replace_the_reference_length_up_to_max_tokens(tokens, expected):
    assert estimate(tokens_per_candidate=tokens)["totals"]["sampled_tokens"]["expected"] == expected


def test_shots_lengthen_the_prompt_up_to_the_context_and_take_no_gpu_time():
    plain, shots = estimate(), estimate("sampler.prompt.shots=3")
    assert shots["mixture"]["made up"]["mean_prompt_tokens"] == 20 + 3 * (20 + 8)
    assert shots["compute"] == plain["compute"]
    assert estimate("sampler.prompt.shots=3", "sampler.engine.max_model_len=64")["mixture"]["made up"]["mean_prompt_tokens"] == 64


def test_an_endpoint_costs_its_prices_and_no_gpu_hours():
    class Priced:
        kind = "endpoint"
        price_per_million_prompt = 0.5
        price_per_million_sampled = 2.0

    config = load(None, [DECODINGS])
    config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"engine": Priced()})})
    result = cost_model.estimate_plan(COUNTS, config, Rates(1.0, None, None, 100.0, ORIGIN))
    assert result["compute"] is None
    assert result["dollars"]["expected"] == pytest.approx((2 * 2000 * 0.5 + 4000 * 2) / 1e6)  # two decodings, two requests
