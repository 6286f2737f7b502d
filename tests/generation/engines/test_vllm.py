"""The vLLM engine: its settings, and vLLM in this process with the real small model."""

import asyncio
import math
import os
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest

from cluster.config import DecodingConfig, SamplerConfig, VLLMConfig, fingerprint
from cluster.errors import CappyError
from generation.engines import vllm
from generation.engines.vllm import TESTED_VERSIONS, VLLMEngine, to_candidate, use_prefill_sharing
from generation.prompts import messages

WARM = DecodingConfig(name="warm", n=4, max_tokens=24, stop=["."])


@pytest.mark.parametrize("version", [*TESTED_VERSIONS, f"{TESTED_VERSIONS[0]}+cpu"])
@pytest.mark.parametrize(("share_prefill", "used"), [(None, True), (True, True), (False, False)])
def test_prefill_sharing_follows_its_setting_with_a_tested_vllm_version(share_prefill, used, version, capsys):
    assert use_prefill_sharing(VLLMConfig(share_prefill=share_prefill), gpu=False, version=version) is used
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("share_prefill", "used", "message"),
    [
        (None, False, "sampler.engine.share_prefill is off: vLLM 0.33.1 is installed, sharing is tested with 0.32.0; set it to true"),
        (True, True, "sampler.engine.share_prefill=true: vLLM 0.33.1 is installed, sharing is tested with 0.32.0; set it to false"),
        (False, False, None),
    ],
)
def test_prefill_sharing_is_off_with_an_untested_vllm_version_and_one_line_reports_both_versions(share_prefill, used, message, capsys):
    assert use_prefill_sharing(VLLMConfig(share_prefill=share_prefill), gpu=False, version="0.33.1") is used
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (message is not None) and all(line.startswith(message) for line in lines)


def test_prefill_sharing_is_off_on_gpus_and_with_tensor_parallel_and_true_is_an_error_there(capsys):
    assert use_prefill_sharing(VLLMConfig(), gpu=True, version="0.32.0") is False
    assert use_prefill_sharing(VLLMConfig(tensor_parallel=2), gpu=False, version="0.32.0") is False
    assert capsys.readouterr().err == ""
    with pytest.raises(CappyError, match=r"sampler\.engine\.share_prefill=true: the engine runs on a GPU.*; set share_prefill to null"):
        use_prefill_sharing(VLLMConfig(share_prefill=True), gpu=True, version="0.32.0")
    with pytest.raises(ValueError, match=r"share_prefill=true with tensor_parallel=2: use tensor_parallel=1 or share_prefill=null"):
        VLLMConfig(share_prefill=True, tensor_parallel=2)


def test_share_prefill_stays_out_of_the_fingerprint_while_it_has_its_default():
    plain = SamplerConfig()
    assert "share_prefill" not in plain.model_dump()["engine"] and SamplerConfig(**plain.model_dump()) == plain
    assert VLLMConfig(share_prefill=False).model_dump()["share_prefill"] is False
    # The value of the commit before this setting.
    assert fingerprint(plain) == "e2c9e85e51a66424"


def output(text, finish_reason="stop", logprob=-1.5):
    """Return an output with the fields of vLLM's `CompletionOutput` that the engine reads."""
    return SimpleNamespace(text=text, token_ids=[1, 2], finish_reason=finish_reason, cumulative_logprob=logprob)


@pytest.mark.parametrize(
    ("finish_reason", "expected"), [("stop", "stop"), ("length", "length"), (None, "stop"), ("repetition_truncation", "length")]
)
def test_an_output_of_vllm_becomes_a_candidate_without_its_reasoning(finish_reason, expected):
    thought = output("<think>hm</think> fox", finish_reason)
    assert to_candidate(thought, WARM, logprobs=True, keep_reasoning=False) == {
        **{"response": "fox", "text": " fox", "decoding": "warm", "tokens": 2},
        **{"finish_reason": expected, "logprob": -1.5},
    }
    assert to_candidate(thought, WARM, logprobs=True, keep_reasoning=True)["text"] == thought.text


@pytest.mark.parametrize(("logprob", "expected"), [(math.nan, None), (-math.inf, None), (-20_000.0, -20_000.0)])
def test_a_log_probability_of_vllm_that_is_not_finite_is_null(logprob, expected):
    assert to_candidate(output("fox", logprob=logprob), WARM, logprobs=True, keep_reasoning=False)["logprob"] == expected


@pytest.mark.parametrize("finish_reason", ["abort", "error"])
def test_an_output_that_vllm_broke_off_is_not_a_candidate(finish_reason):
    with pytest.raises(RuntimeError, match=f"vLLM stopped the request before its end: {finish_reason}"):
        to_candidate(output("fo", finish_reason), WARM, logprobs=True, keep_reasoning=False)


def test_vllm_loads_safetensors_only(tmp_path):
    assert vllm.engine_arguments(tmp_path, VLLMConfig(), gpu=False)["load_format"] == "safetensors"


@pytest.mark.parametrize(
    ("dtype", "native", "gpu", "expected"),
    [
        ("auto", False, False, "float32"),
        ("auto", True, False, "auto"),
        ("auto", False, True, "auto"),
        ("bfloat16", False, False, "bfloat16"),
    ],
)
def test_auto_is_float32_on_a_cpu_without_native_bfloat16(dtype, native, gpu, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "multiplies_bfloat16", lambda: native)
    assert vllm.engine_arguments(tmp_path, VLLMConfig(dtype=dtype), gpu=gpu)["dtype"] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("tested", "loaded"), [(TESTED_VERSIONS, True), (("0.31.0",), False)])
def test_the_engine_loads_its_extensions_only_with_a_tested_version(tested, loaded, monkeypatch):
    from vllm.engine.arg_utils import AsyncEngineArgs

    class Loaded(Exception):
        """Ends the start of the engine when its arguments are complete."""

    def stop(**arguments):
        raise Loaded(arguments)

    monkeypatch.setattr(vllm, "TESTED_VERSIONS", tested)
    monkeypatch.setattr(AsyncEngineArgs, "__init__", lambda self, **arguments: stop(**arguments))
    with mock.patch.dict(os.environ), pytest.raises(Loaded) as caught:
        VLLMEngine("smollm2-135m-instruct", VLLMConfig(max_model_len=256))
    transfer = caught.value.args[0].get("kv_transfer_config")
    assert (transfer is not None) is ("worker_extension_cls" in caught.value.args[0]) is loaded
    assert not loaded or transfer.kv_connector == "PrefillSharingConnector"


@pytest.mark.slow
def test_candidates_are_reported_as_they_finish_and_equal_those_of_vllms_own_n():
    async def sample():
        engine = VLLMEngine("smollm2-135m-instruct", VLLMConfig(max_model_len=256, dtype="float32"))
        try:
            ids = engine.encode(messages("Name an animal and say in a sentence what it likes to eat."), "chat", 24)
            reported = []
            candidates = await engine.sample(ids, WARM, 7, "row", on_candidate=reported.append)
            return candidates, reported, await sample_with_vllm(engine.llm, ids)
        finally:
            engine.close()

    async def sample_with_vllm(llm, ids):
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(n=4, temperature=1, max_tokens=24, stop=["."], seed=7, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = [step.outputs async for step in llm.generate(TokensPrompt(prompt_token_ids=ids), params, "own")][-1]
        return [output.text.strip() for output in sorted(outputs, key=lambda output: output.index)]

    with mock.patch.dict(os.environ):  # the engine sets variables
        candidates, reported, expected = asyncio.run(sample())
    responses = [each["response"] for each in candidates]
    assert responses == expected and len(set(responses)) > 1
    # Shorter candidates come first; the requests may start up to a few engine steps apart.
    lengths = [each["tokens"] for each in reported]
    assert sorted(each["response"] for each in reported) == sorted(responses)
    assert all(one <= two + 4 for one, two in pairwise(lengths)) and lengths[0] < lengths[-1]
