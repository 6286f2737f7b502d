"""The formulas against speeds that others or this project measured."""

from __future__ import annotations

import pytest

from cluster.hardware import GPUS, Device
from generation import speed
from generation.speed import EncoderSize, LLMSize

SMOLLM2_135M = LLMSize(135e6, 2 * 2 * 30 * 3 * 64)
SMOLLM2_1_7B = LLMSize(1.71e9, 2 * 2 * 24 * 32 * 64)
# Measured by `cluster.hardware` on a virtual machine with 2 cores of an AMD EPYC.
CPU = Device("2 CPU core(s)", 350e9, 11e9)


def test_decoding_agrees_with_known_rates_within_a_factor_of_two():
    h100 = GPUS["H100"]
    batch = speed.batch_size(SMOLLM2_1_7B, 0.9 * 80e9, 256, 700)
    known = 9200  # tokens/s per H100, FinePhrase
    assert known / 2 < speed.decoded_tokens_per_second(SMOLLM2_1_7B, h100, batch, 700, speed.STEP_S["vllm"]) < 2 * known
    known = 300  # tokens/s of vLLM on 2 cores: 285 eager, 319 compiled
    assert known / 2 < speed.decoded_tokens_per_second(SMOLLM2_135M, CPU, 64, 250) < 2 * known


def test_training_and_scoring_agree_with_known_rates_within_a_factor_of_two():
    minilm, large = EncoderSize(6, 384, 1536), EncoderSize(24, 1024, 4096)
    assert 19.5 / 2 < speed.trained_pairs_per_second(minilm, CPU, 190.6) < 2 * 19.5  # pairs/s on 2 cores
    # One thread of another CPU scored 43 pairs/s, which the speed of this CPU underestimates.
    assert 43 / 3 < speed.scored_pairs_per_second(minilm, Device("1 CPU core(s)", 175e9, 11e9), 190.6) < 43
    # RoBERTa-large at 50 % of an H200: 1,219 pairs/s of training and 3,658 of scoring, on pairs of 190.6 tokens on average.
    assert speed.trained_pairs_per_second(large, GPUS["H200"], 190.6) == pytest.approx(1219, rel=0.2)
    assert speed.scored_pairs_per_second(large, GPUS["H200"], 190.6) == pytest.approx(3658, rel=0.2)


def test_more_candidates_share_the_read_of_the_weights_until_the_memory_is_full():
    rates = [speed.decoded_tokens_per_second(SMOLLM2_1_7B, GPUS["L4"], batch, 500) for batch in (1, 8, 64)]
    assert rates == sorted(rates) and rates[1] > 6 * rates[0] and rates[2] < 8 * rates[1]
    assert speed.decoded_tokens_per_second(SMOLLM2_1_7B, GPUS["L4"], 1, 0) < 0.6 * 0.3e12 / (2 * 1.71e9)
    weights = SMOLLM2_1_7B.weight_bytes
    assert speed.batch_size(SMOLLM2_1_7B, weights + 10 * 100 * SMOLLM2_1_7B.kv_bytes, 64, 100) == 10
    assert speed.batch_size(SMOLLM2_1_7B, weights / 2, 64, 100) == 1
    assert speed.batch_size(SMOLLM2_1_7B, None, 64, 1e9) == 64


def test_prompts_are_faster_than_decoding_and_bound_by_the_steps_for_a_small_model():
    h200 = GPUS["H200"]
    small = speed.prefilled_tokens_per_second(SMOLLM2_135M, h200, 0.003)
    assert small < speed.PREFILL_TOKENS / 0.003
    assert small > speed.decoded_tokens_per_second(SMOLLM2_135M, h200, 64, 250, 0.003)
    assert speed.prefilled_tokens_per_second(LLMSize(70e9, 1.0), h200) == pytest.approx(0.5 * 989e12 / 140e9)
