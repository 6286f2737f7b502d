"""vLLM itself, in this process, with the real small model."""

import asyncio
import os
from itertools import pairwise
from unittest import mock

import pytest

from cluster.config import DecodingConfig, VLLMConfig
from generation.engines.vllm import VLLMEngine
from generation.prompts import messages

WARM = DecodingConfig(name="warm", n=4, max_tokens=24, stop=["."])


@pytest.mark.slow
def test_candidates_are_told_as_they_end_and_are_those_of_vllms_own_n():
    async def sample():
        engine = VLLMEngine("smollm2-135m-instruct", VLLMConfig(max_model_len=256, dtype="float32"))
        try:
            ids = engine.encode(messages("Name an animal and say in a sentence what it likes to eat."), "chat", 24)
            told = []
            candidates = await engine.sample(ids, WARM, 7, "row", on_candidate=told.append)
            return candidates, told, await own(engine.llm, ids)
        finally:
            engine.close()

    async def own(llm, ids):
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(n=4, temperature=1, max_tokens=24, stop=["."], seed=7, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = [step.outputs async for step in llm.generate(TokensPrompt(prompt_token_ids=ids), params, "own")][-1]
        return [output.text.strip() for output in sorted(outputs, key=lambda output: output.index)]

    with mock.patch.dict(os.environ):  # which the engine adds to
        candidates, told, own_n = asyncio.run(sample())
    responses = [each["response"] for each in candidates]
    assert responses == own_n and len(set(responses)) > 1
    # The shorter ones first, whatever their place; they may begin some steps of the engine apart.
    lengths = [each["tokens"] for each in told]
    assert sorted(each["response"] for each in told) == sorted(responses)
    assert all(one <= two + 4 for one, two in pairwise(lengths)) and lengths[0] < lengths[-1]
