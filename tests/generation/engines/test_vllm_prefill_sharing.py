"""The KV connector, called as vLLM's scheduler and worker call it, and an engine that uses it."""

import asyncio
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sharing = pytest.importorskip("generation.engines.vllm_prefill_sharing", reason="vLLM is not installed")

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

SIZE, BLOCKS = 4, 16


def connector(*specs):
    groups = [SimpleNamespace(kv_cache_spec=object.__new__(spec)) for spec in specs]  # the connector reads only the type
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=SIZE), kv_transfer_config=SimpleNamespace())
    role = sharing.KVConnectorRole.SCHEDULER
    return sharing.PrefillSharingConnector(config, role, SimpleNamespace(kv_cache_groups=groups, num_blocks=BLOCKS))


def request(name, prompt, **more):
    fields = {"mm_features": [], "lora_request": None, "cache_salt": None, "num_output_tokens": 0, "num_computed_tokens": 0}
    return SimpleNamespace(request_id=name, prompt_token_ids=list(prompt), status=RequestStatus.WAITING, **{**fields, **more})


def schedule(made, request, computed, blocks):
    """Schedule a request as vLLM does, with `computed` tokens in vLLM's prefix cache; return the number of tokens to copy."""
    tokens, asynchronous = made.get_num_new_matched_tokens(request, computed)
    assert asynchronous is False
    if tokens is not None:
        request.status, request.num_computed_tokens = RequestStatus.RUNNING, computed + tokens
        made.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: (blocks,)), tokens)
    return tokens


def end_step(made, *computed):
    """Finish a step in which the prompts of the `computed` requests were prefilled; return its copies as (source, target) pairs."""
    copies = made.build_connector_meta(None)
    for each in computed:
        each.num_computed_tokens = len(each.prompt_token_ids)
    return list(zip(copies.sources, copies.targets, strict=True))


@pytest.fixture
def made():
    return connector(FullAttentionSpec)


def test_later_candidates_start_one_step_later_with_a_copy_of_the_partial_block(made):
    first, second, third = (request(name, range(10)) for name in "abc")
    assert schedule(made, first, 0, [1, 2, 3]) == 0
    assert schedule(made, second, 8, [1, 2, 4]) is None
    assert end_step(made, first) == []
    # Of ten tokens vLLM shares eight, and each request computes the last one itself: one is copied.
    assert schedule(made, second, 8, [1, 2, 4]) == 1
    assert schedule(made, third, 8, [1, 2, 5]) == 1
    assert end_step(made, second, third) == [(3, 4), (3, 5)]
    assert end_step(made) == []


def test_a_copy_of_a_copy_reads_the_block_that_is_filled_before_the_step(made):
    first, second, third = (request(name, range(11)) for name in "abc")
    schedule(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert schedule(made, second, 8, [1, 2, 4]) == 2
    made.request_finished(first, None)
    # Only the second request is left as a source, and its block is the target of a copy in this step.
    assert schedule(made, third, 8, [1, 2, 5]) == 2
    assert end_step(made) == [(3, 4), (3, 5)]


@pytest.mark.parametrize(("length", "computed"), [(9, 8), (10, 4), (10, 0)])
def test_nothing_is_copied_if_no_token_or_more_than_a_partial_block_is_missing(made, length, computed):
    first, second = request("a", range(length)), request("b", range(length))
    schedule(made, first, 0, [1, 2, 3])
    assert schedule(made, second, computed, [1, 2, 4]) == 0
    assert end_step(made) == []


def test_no_copy_for_another_prompt_for_a_resumed_request_and_from_a_preempted_request(made):
    first = request("a", range(10))
    schedule(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert schedule(made, request("b", [*range(9), 99]), 8, [1, 2, 4]) == 0
    assert schedule(made, request("c", range(10), num_output_tokens=2), 8, [1, 2, 5]) == 0
    for each in made._allocated[tuple(range(10))].values():
        each[0].status = RequestStatus.PREEMPTED
    assert schedule(made, request("d", range(10)), 8, [1, 2, 6]) == 0
    assert end_step(made) == []


def test_finished_requests_are_removed_also_before_they_get_blocks(made):
    first, second = request("a", range(10)), request("b", range(10))
    schedule(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert made.get_num_new_matched_tokens(second, 8) == (1, False)  # but vLLM had no free block
    assert made.request_finished(second, None) == made.request_finished_all_groups(first, None) == (False, None)
    assert not made._allocated and not made._sources
    assert schedule(made, request("c", range(10)), 8, [1, 2, 4]) == 0
    assert end_step(made) == []


@pytest.mark.parametrize("more", [{"lora_request": "an adapter"}, {"mm_features": ["an image"]}, {"cache_salt": "a tenant"}])
def test_no_copy_for_a_request_whose_cache_depends_on_more_than_the_prompt(made, more):
    first, second = (request(name, range(10), **more) for name in "ab")
    schedule(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert schedule(made, second, 8, [1, 2, 4]) == 0
    assert end_step(made) == []


@pytest.mark.parametrize("specs", [(SlidingWindowSpec,), (FullAttentionSpec, SlidingWindowSpec)])
def test_no_copy_for_models_with_other_attention(specs):
    made = connector(*specs)
    first, second = request("a", range(10)), request("b", range(10))
    schedule(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert schedule(made, second, 8, [1, 2, 4]) == 0
    assert end_step(made) == []


def test_blocks_are_copied_in_every_layer_and_a_cache_of_another_layout_is_rejected(made):
    layers = {name: torch.randn(BLOCKS, 2, SIZE, 3) for name in ("one", "two")}
    before = {name: cache.clone() for name, cache in layers.items()}
    made.register_kv_caches(layers)
    made.bind_connector_metadata(sharing.BlockCopies([3, 3], [4, 5]))
    made.start_load_kv(None)
    for name, cache in layers.items():
        assert cache[4].equal(before[name][3]) and cache[5].equal(before[name][3])
        kept = [block for block in range(BLOCKS) if block not in (4, 5)]
        assert cache[kept].equal(before[name][kept])
    with pytest.raises(ValueError, match=r"\(2, 16, 4, 3\)"):
        made.register_kv_caches({"one": torch.zeros(2, BLOCKS, SIZE, 3)})


@pytest.mark.full
def test_an_engine_with_prefill_sharing_draws_the_same_candidates_as_one_without():
    from cluster.config import DecodingConfig, VLLMConfig
    from generation.engines.vllm import VLLMEngine

    warm, greedy = DecodingConfig(name="warm", n=6, max_tokens=12), DecodingConfig(name="greedy", n=1, temperature=0.0, max_tokens=12)

    async def sample(shared):
        config = VLLMConfig(max_model_len=256, max_num_seqs=16, dtype="float32", share_prefill=shared)
        engine = VLLMEngine("smollm2-135m-instruct", config)
        try:
            # Prompts that end at different positions in a block.
            prompts = [
                engine.encode([{"role": "user", "content": "word " * words + "Say something."}], "chat", 12) for words in range(0, 36, 5)
            ]
            draws = [engine.sample(ids, each, 7, f"{index}-{each.name}") for index, ids in enumerate(prompts) for each in (warm, greedy)]
            pools = await asyncio.gather(*draws)
            return [[candidate["text"] for candidate in pool] for pool in pools], await computed_again(engine.llm, prompts)
        finally:
            engine.close()

    async def computed_again(llm, prompts):
        """Return, for each prompt, how many tokens the second of two concurrent requests computed beside the last prompt token."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        async def one(index, ids):
            return [step async for step in llm.generate(tokens_input(ids), SamplingParams(max_tokens=4), f"cached-{index}")][-1]

        return [
            len(ids) - 1 - (await asyncio.gather(one(2 * index, ids), one(2 * index + 1, ids)))[1].num_cached_tokens
            for index, ids in enumerate(prompts)
        ]

    with mock.patch.dict(os.environ):
        # The default (None) turns it on with the installed version, which is tested.
        texts, computed = asyncio.run(sample(None))
        texts_without, computed_without = asyncio.run(sample(False))
    assert texts == texts_without and len({text for pool in texts for text in pool}) > 20
    assert computed == [0] * 8
    assert max(computed_without) > 16
