"""What vLLM's scheduler and worker would ask of the connector, and the engine with it."""

import asyncio
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

siblings = pytest.importorskip("generation.engines.vllm_prefill_sharing", reason="vLLM is not installed")

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

SIZE, BLOCKS = 4, 16


def connector(*specs):
    groups = [SimpleNamespace(kv_cache_spec=object.__new__(spec)) for spec in specs]  # its kind alone is read
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=SIZE), kv_transfer_config=SimpleNamespace())
    role = siblings.KVConnectorRole.SCHEDULER
    return siblings.PrefillSharingConnector(config, role, SimpleNamespace(kv_cache_groups=groups, num_blocks=BLOCKS))


def request(name, prompt, **more):
    fields = {"mm_features": [], "lora_request": None, "cache_salt": None, "num_output_tokens": 0, "num_computed_tokens": 0}
    return SimpleNamespace(request_id=name, prompt_token_ids=list(prompt), status=RequestStatus.WAITING, **{**fields, **more})


def begin(made, asked, computed, blocks):
    """Schedule a request as vLLM does, with `computed` tokens in its own cache; return what the connector answered."""
    tokens, later = made.get_num_new_matched_tokens(asked, computed)
    assert later is False
    if tokens is not None:
        asked.status, asked.num_computed_tokens = RequestStatus.RUNNING, computed + tokens
        made.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: (blocks,)), tokens)
    return tokens


def end_step(made, *computed):
    copies = made.build_connector_meta(None)
    for each in computed:
        each.num_computed_tokens = len(each.prompt_token_ids)
    return list(zip(copies.sources, copies.targets, strict=True))


@pytest.fixture
def made():
    return connector(FullAttentionSpec)


def test_the_second_candidate_of_a_prompt_waits_a_step_and_then_copies_what_vllm_does_not_share(made):
    first, second, third = (request(name, range(10)) for name in "abc")
    assert begin(made, first, 0, [1, 2, 3]) == 0
    assert begin(made, second, 8, [1, 2, 4]) is None
    assert end_step(made, first) == []
    # Eight tokens are vLLM's own, the last is computed by each: one is left.
    assert begin(made, second, 8, [1, 2, 4]) == 1
    assert begin(made, third, 8, [1, 2, 5]) == 1
    assert end_step(made, second, third) == [(3, 4), (3, 5)]
    assert end_step(made) == []


def test_a_copy_comes_from_where_it_is_when_the_step_begins(made):
    first, second, third = (request(name, range(11)) for name in "abc")
    begin(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert begin(made, second, 8, [1, 2, 4]) == 2
    made.request_finished(first, None)
    # Only the second is left to copy from, and gets its own copy in this step.
    assert begin(made, third, 8, [1, 2, 5]) == 2
    assert end_step(made) == [(3, 4), (3, 5)]


@pytest.mark.parametrize(("length", "computed"), [(9, 8), (10, 4), (10, 0)])
def test_nothing_is_copied_where_nothing_or_more_than_the_end_is_missing(made, length, computed):
    first, second = request("a", range(length)), request("b", range(length))
    begin(made, first, 0, [1, 2, 3])
    assert begin(made, second, computed, [1, 2, 4]) == 0
    assert end_step(made) == []


def test_another_prompt_one_that_was_stopped_and_one_that_is_resumed_have_no_sibling(made):
    first = request("a", range(10))
    begin(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert begin(made, request("b", [*range(9), 99]), 8, [1, 2, 4]) == 0
    assert begin(made, request("c", range(10), num_output_tokens=2), 8, [1, 2, 5]) == 0
    for each in made._begun[tuple(range(10))].values():
        each[0].status = RequestStatus.PREEMPTED
    assert begin(made, request("d", range(10)), 8, [1, 2, 6]) == 0
    assert end_step(made) == []


def test_a_request_without_blocks_asks_again_and_one_that_ended_is_forgotten(made):
    first, second = request("a", range(10)), request("b", range(10))
    begin(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert made.get_num_new_matched_tokens(second, 8) == (1, False)  # and vLLM had no block left for it
    assert made.request_finished(second, None) == made.request_finished_all_groups(first, None) == (False, None)
    assert not made._begun and not made._sources
    assert begin(made, request("c", range(10)), 8, [1, 2, 4]) == 0
    assert end_step(made) == []


@pytest.mark.parametrize("more", [{"lora_request": "an adapter"}, {"mm_features": ["an image"]}, {"cache_salt": "a tenant"}])
def test_a_request_that_is_more_than_its_prompt_is_left_alone(made, more):
    first, second = (request(name, range(10), **more) for name in "ab")
    begin(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert begin(made, second, 8, [1, 2, 4]) == 0
    assert end_step(made) == []


@pytest.mark.parametrize("specs", [(SlidingWindowSpec,), (FullAttentionSpec, SlidingWindowSpec)])
def test_models_with_other_attention_are_left_alone(specs):
    made = connector(*specs)
    first, second = request("a", range(10)), request("b", range(10))
    begin(made, first, 0, [1, 2, 3])
    end_step(made, first)
    assert begin(made, second, 8, [1, 2, 4]) == 0
    assert end_step(made) == []


def test_blocks_are_copied_in_every_layer_and_a_cache_of_another_layout_is_refused(made):
    layers = {name: torch.randn(BLOCKS, 2, SIZE, 3) for name in ("one", "two")}
    before = {name: cache.clone() for name, cache in layers.items()}
    made.register_kv_caches(layers)
    made.bind_connector_metadata(siblings.BlockCopies([3, 3], [4, 5]))
    made.start_load_kv(None)
    for name, cache in layers.items():
        assert cache[4].equal(before[name][3]) and cache[5].equal(before[name][3])
        kept = [block for block in range(BLOCKS) if block not in (4, 5)]
        assert cache[kept].equal(before[name][kept])
    with pytest.raises(ValueError, match=r"\(2, 16, 4, 3\)"):
        made.register_kv_caches({"one": torch.zeros(2, BLOCKS, SIZE, 3)})


@pytest.mark.slow
def test_candidates_of_an_engine_are_those_of_one_that_prefills_each_alone():
    from cluster.config import DecodingConfig, VLLMConfig
    from generation.engines import vllm

    warm, greedy = DecodingConfig(name="warm", n=6, max_tokens=12), DecodingConfig(name="greedy", n=1, temperature=0.0, max_tokens=12)

    async def sample(shared):
        with mock.patch.object(vllm, "prefill_sharing_arguments", vllm.prefill_sharing_arguments if shared else dict):
            engine = vllm.VLLMEngine("smollm2-135m-instruct", VLLMConfig(max_model_len=256, max_num_seqs=16, dtype="float32"))
        try:
            # Prompts that end in many places of a block.
            prompts = [
                engine.encode([{"role": "user", "content": "word " * words + "Say something."}], "chat", 12) for words in range(0, 36, 5)
            ]
            draws = [engine.sample(ids, each, 7, f"{place}-{each.name}") for place, ids in enumerate(prompts) for each in (warm, greedy)]
            pools = await asyncio.gather(*draws)
            return [[candidate["text"] for candidate in pool] for pool in pools], await copied(engine.llm, prompts)
        finally:
            engine.close()

    async def copied(llm, prompts):
        """How many tokens of a prompt the second of two requests at once did not compute."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        async def one(place, ids):
            return [step async for step in llm.generate(tokens_input(ids), SamplingParams(max_tokens=4), f"cached-{place}")][-1]

        return [
            len(ids) - 1 - (await asyncio.gather(one(2 * place, ids), one(2 * place + 1, ids)))[1].num_cached_tokens
            for place, ids in enumerate(prompts)
        ]

    with mock.patch.dict(os.environ):
        texts, missing = asyncio.run(sample(True))
        alone, missing_alone = asyncio.run(sample(False))
    assert texts == alone and len({text for pool in texts for text in pool}) > 20
    assert missing == [0] * 8
    assert max(missing_alone) > 16
