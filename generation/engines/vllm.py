"""The vLLM engine for decoder-only models, used for sampling and serving. One engine per process; imports no Ray.

It has no beam search: vLLM runs beam search outside its scheduler, as a loop of one-token requests that each prefill again. So the
default decodings use a greedy candidate instead of the paper's beam search, and the config check rejects `beams` above 1.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster import models
from cluster.config import DecodingConfig, VLLMConfig
from cluster.cpu import lower_priority, multiplies_bfloat16, openmp_environment
from cluster.errors import CappyError, first_line
from cluster.progress import log
from generation import prompts
from generation.engines import prompt_encoding
from generation.engines.contract import Candidate, ConstraintRefused, OnCandidate, PromptTooLong, RequestDecoding, has_gpu
from generation.engines.finish_reasons import read_end
from generation.engines.reasoning import strip_reasoning
from generation.logprobs import finite_or_none

TESTED_VERSIONS = ("0.32.0",)
"""vLLM versions that `vllm_prefill_sharing.py` and `vllm_top_p.py` are tested with: they depend on details of its scheduler and sampler."""


class VLLMEngine:
    """A vLLM `AsyncLLM` and its tokenizer."""

    def __init__(
        self,
        model: str,
        config: VLLMConfig,
        setting: str = "sampler.model",
        *,
        keep_reasoning: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: an embedded name, a hub name, a local folder or an s3:// folder.
            config: the settings of the engine.
            setting: name of the setting that `model` comes from, for error messages.
            keep_reasoning: whether responses keep the reasoning that the model writes into them.
            template_kwargs: variables of the chat template.

        Raises `CappyError` if vLLM rejects the model or a setting.
        """
        self._keep_reasoning, self._template_kwargs = keep_reasoning, template_kwargs
        folder = models.resolve(model, setting)
        gpu = has_gpu()
        set_environment(config, gpu)
        # Imported late: the import takes seconds, and it reads the environment set above.
        from vllm import __version__ as vllm_version
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        before = set(psutil.Process().children(recursive=True))
        try:
            arguments = engine_arguments(folder, config, gpu)
            if use_prefill_sharing(config, gpu, vllm_version):
                arguments |= prefill_sharing_arguments()
            if not gpu and is_tested(vllm_version):
                arguments["worker_extension_cls"] = "generation.engines.vllm_top_p.TopPByRow"
            self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except ValueError as error:
            raise CappyError(f"{setting}={model}: vLLM rejected the model or an engine setting: {first_line(error)}") from None
        if not gpu:
            lower_priority(set(psutil.Process().children(recursive=True)) - before)
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_model_len = config.max_model_len

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int, drop_shots: bool = True) -> list[int]:
        """Return the token ids of a prompt, with shots dropped from the front until `room` tokens are left for a candidate.

        With `drop_shots=False` no turn is dropped: the conversation of a client must not be shortened. Raises `PromptTooLong` if
        fewer than `room` tokens are left.
        """
        limit = self.max_model_len - room
        ids = prompt_encoding.encode_prompt(self.tokenizer, turns, form, limit, drop_shots, self._template_kwargs)
        if len(ids) > limit:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens and leaves less than {room} of max_model_len={self.max_model_len} for a candidate; "
                f"shorten the instruction or raise sampler.engine.max_model_len"
            )
        return ids

    async def sample(
        self,
        token_ids: Sequence[int],
        decoding: DecodingConfig,
        seed: int | None,
        request_id: str,
        *,
        logprobs: bool = True,
        on_candidate: OnCandidate | None = None,
    ) -> list[Candidate]:
        """Return the `decoding.n` candidates of one prompt; without `logprobs` their `logprob` is None.

        A call that is cancelled also aborts its requests in the engine.
        """
        # vLLM rejects an id that is still running, and a retry may start before the first call has ended.
        unique = f"{request_id}-{uuid.uuid4().hex[:8]}"
        if on_candidate is None:
            return await self._request(token_ids, decoding, decoding.n, seed, unique, logprobs)

        async def sample_one(draw: int, report: OnCandidate) -> Candidate:
            own_seed = None if seed is None else seed + draw
            (candidate,) = await self._request(token_ids, decoding, 1, own_seed, f"{unique}-{draw}", logprobs)
            report(candidate)
            return candidate

        # vLLM itself splits `n` into single requests with the same seeds, but returns no candidate before all have finished.
        # Requests sent here may start in different engine steps, which costs engine time; so only calls with a callback do this.
        draws = [asyncio.ensure_future(sample_one(draw, on_candidate)) for draw in range(decoding.n)]
        try:
            return list(await asyncio.gather(*draws))
        finally:
            for draw in draws:
                draw.cancel()

    async def _request(
        self, token_ids: Sequence[int], decoding: DecodingConfig, n: int, seed: int | None, request_id: str, logprobs: bool
    ) -> list[Candidate]:
        """Return the candidates of one request to vLLM."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        constraints: dict[str, Any] = {}
        if isinstance(decoding, RequestDecoding):
            if decoding.stop_token_ids:
                constraints["stop_token_ids"] = list(decoding.stop_token_ids)
            if decoding.structured_outputs is not None:
                constraints["structured_outputs"] = StructuredOutputsParams(**decoding.structured_outputs)
        params = SamplingParams(
            n=n,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k or 0,
            min_tokens=decoding.min_tokens,
            max_tokens=decoding.max_tokens,
            stop=list(decoding.stop) or None,
            seed=seed,
            logprobs=0 if logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **constraints,
        )
        try:
            (step,) = [step async for step in self.llm.generate(tokens_input(list(token_ids)), params, request_id)]
            return [
                to_candidate(output, decoding, logprobs, self._keep_reasoning)
                for output in sorted(step.outputs, key=lambda output: output.index)
            ]
        except (ValueError, VLLMClientError, RuntimeError) as error:
            # vLLM checks the constraints of a request first, and stops a request that no text can satisfy.
            if not constraints or self.dead:
                raise
            raise ConstraintRefused(f"{' and '.join(constraints)}: {first_line(error)[:200]}; correct it or leave it out") from None

    def max_cost(self, token_ids: Sequence[int], decoding: DecodingConfig) -> float:
        """Return 0.0: a local engine costs no money."""
        return 0.0

    def pop_cost(self, request_id: str) -> float:
        """Return 0.0: a local engine costs no money."""
        return 0.0

    def prompt_tokens(self, token_ids: Sequence[int], request_id: str) -> int:
        """Return the number of prompt tokens."""
        return len(token_ids)

    @property
    def dead(self) -> bool:
        """Whether the engine has failed for good; its process must be replaced."""
        return bool(self.llm.errored)

    def close(self) -> None:
        """Stop the engine and its processes."""
        self.llm.shutdown()


def to_candidate(output: Any, decoding: DecodingConfig, logprobs: bool, keep_reasoning: bool) -> Candidate:
    """Return the candidate of an output of vLLM (`CompletionOutput`). Raises `RuntimeError` if vLLM stopped it before its end."""
    end = read_end(output.finish_reason)
    if end == "failed":
        raise RuntimeError(f"vLLM stopped the request before its end: {output.finish_reason}")
    text = output.text if keep_reasoning else strip_reasoning(output.text)
    return Candidate(
        response=text.strip(),
        text=text,
        decoding=decoding.name,
        tokens=len(output.token_ids),
        finish_reason="length" if end == "length" else "stop",
        logprob=finite_or_none(output.cumulative_logprob or 0.0) if logprobs else None,
    )


def engine_arguments(folder: Path, config: VLLMConfig, gpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's engine for the model in `folder`, named as in vLLM's own server."""
    eager = not config.compile if config.compile is not None else not gpu
    options: dict[str, Any] = {}
    if gpu:
        options["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:
        # The CPU engine crashes on a seeded prompt that chunked prefill splits, so prompts are prefilled whole.
        # Candidates share only whole blocks of a prompt. With the default of 128 tokens on CPU, each candidate would prefill most of a
        # short prompt again.
        options["block_size"] = 32
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(2048, config.max_model_len)
    return {
        "model": str(folder),
        "dtype": "float32" if config.dtype == "auto" and not gpu and not multiplies_bfloat16() else config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "enable_prefix_caching": True,
        "enforce_eager": eager,
        "disable_log_stats": True,
        "trust_remote_code": False,
        # With the default, vLLM loads pickled .bin files if a folder has no safetensors.
        "load_format": "safetensors",
        **options,
    }


def set_environment(config: VLLMConfig, gpu: bool) -> None:
    """Set the environment variables that vLLM reads at import; values set by the user stay, except OMP_NUM_THREADS on CPU."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not gpu:
        # By default the CPU engine leaves one core idle. It takes the size of its cache from the environment only.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.cpu_kv_cache_gib))))
        if config.tensor_parallel == 1:
            # Run the model in the scheduler's process: as two processes, each would busy-wait on a core for the other.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        openmp_environment()
        # Ray sets OMP_NUM_THREADS=1 in each worker for its share of the machine; the engine may use all cores.
        cores = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(min(config.cpu_threads or cores, cores))


def is_tested(version: str) -> bool:
    """Return whether a vLLM version is in `TESTED_VERSIONS`. A CPU build may have a local version: 0.32.0+cpu is 0.32.0."""
    return version.split("+")[0] in TESTED_VERSIONS


def use_prefill_sharing(config: VLLMConfig, gpu: bool, version: str) -> bool:
    """Return whether the engine shares the prefill of a prompt between its candidates (`vllm_prefill_sharing.py`).

    Args:
        config: the settings of the engine.
        gpu: whether the engine runs on a GPU, where sharing is never used.
        version: the installed vLLM version. If it is not in `TESTED_VERSIONS`, sharing needs `share_prefill=true`; one log
            line reports the versions.

    Raises `CappyError` for `share_prefill=true` on a GPU.
    """
    if config.share_prefill is False or (config.share_prefill is None and (gpu or config.tensor_parallel > 1)):
        return False
    if gpu:
        raise CappyError("sampler.engine.share_prefill=true: the engine runs on a GPU, and sharing is CPU only; set share_prefill to null")
    if not is_tested(version):
        tested = f"vLLM {version} is installed, sharing is tested with {', '.join(TESTED_VERSIONS)}"
        if config.share_prefill is None:
            log(f"sampler.engine.share_prefill is off: {tested}; set it to true to use it without a test")
            return False
        log(f"sampler.engine.share_prefill=true: {tested}; set it to false if the engine fails")
    return True


def prefill_sharing_arguments() -> dict[str, Any]:
    """Return the engine arguments that load `vllm_prefill_sharing.PrefillSharingConnector`."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="PrefillSharingConnector",
        kv_connector_module_path="generation.engines.vllm_prefill_sharing",
        kv_role="kv_both",
    )
    return {"kv_transfer_config": transfer}
