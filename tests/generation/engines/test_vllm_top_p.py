"""Masks of top-p by row against those of vLLM, and an engine that uses them."""

import asyncio
import os
from unittest import mock

import pytest
import torch

top_p = pytest.importorskip("generation.engines.vllm_top_p", reason="vLLM is not installed")

from cluster.config import DecodingConfig, VLLMConfig  # noqa: E402
from generation.engines.vllm import VLLMEngine  # noqa: E402

V = 500


def vllm_masks(logits_BV, k_B, p_B):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    return apply_top_k_top_p_pytorch(logits_BV.clone(), k_B and torch.tensor(k_B), p_B and torch.tensor(p_B), allow_cpu_sync=True)


@pytest.mark.parametrize(
    ("k_B", "p_B"),
    [
        ([V, 40, V, 7], [1.0, 1.0, 0.9, 0.5]),  # temperature, top-k, top-p, both
        (None, [1.0, 0.95, 0.1, 1.0]),
        ([V, 40, 1, V], None),
        ([40, 40, 40, 40], [0.9, 0.9, 0.9, 0.9]),
        ([V, 3, V, V], [1.0, 1.0, 1.0, 1.0]),
        (None, None),
    ],
)
def test_the_masks_are_those_of_vllm(k_B, p_B):
    generator = torch.Generator().manual_seed(1)
    logits_BV = (torch.randn(4, V, generator=generator) * 3).round(decimals=1)  # with ties
    expected = vllm_masks(logits_BV, k_B, p_B)
    found = top_p.apply_top_k_top_p(logits_BV.clone(), k_B and torch.tensor(k_B), p_B and torch.tensor(p_B))
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_an_engine_draws_the_same_candidates_with_and_without_it(monkeypatch):
    async def sample():
        engine = VLLMEngine("smollm2-135m-instruct", VLLMConfig(max_model_len=256, dtype="float32"))
        try:
            ids = engine.encode([{"role": "user", "content": "Name an animal and say what it likes to eat."}], "chat", 24)
            draws = [engine.sample(ids, each, 7, each.name) for each in decodings]
            return [each["response"] for pool in await asyncio.gather(*draws) for each in pool]
        finally:
            engine.close()

    decodings = [
        DecodingConfig(name="temperature", n=3, temperature=0.9, max_tokens=24),
        DecodingConfig(name="top-k", n=3, top_k=40, max_tokens=24),
        DecodingConfig(name="top-p", n=3, top_p=0.9, max_tokens=24),
    ]
    with mock.patch.dict(os.environ):  # the engine sets variables
        found = asyncio.run(sample())
        monkeypatch.setattr("generation.engines.vllm.is_tested", lambda version: False)
        assert asyncio.run(sample()) == found and len(set(found)) > 5
