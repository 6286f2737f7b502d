"""The vLLM engine, of sampling and of serving: decoder-only models, one engine a process. Knows no Ray.

It has no beam search: vLLM's is a loop over one-token requests outside its scheduler, each of them a prefill again. So the
default decodings draw a greedy candidate in place of the paper's beam, and `beams` above 1 is refused with the config.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster import models
from cluster.config import DecodingConfig, VLLMConfig
from cluster.cpu import lower_priority, openmp_environment
from cluster.errors import CappyError
from generation import prompts
from generation.engines import prompt_encoding
from generation.engines.contract import Candidate, OnCandidate, PromptTooLong, has_gpu


class VLLMEngine:
    """A vLLM `AsyncLLM` with the tokenizer beside it."""

    def __init__(self, model: str, config: VLLMConfig, setting: str = "sampler.model") -> None:
        folder = models.resolve(model, setting)
        gpu = has_gpu()
        set_environment(config, gpu)
        # Imported late: importing vLLM takes seconds and reads the environment set above.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        before = set(psutil.Process().children(recursive=True))
        try:
            alone = not gpu and config.tensor_parallel == 1
            arguments = engine_arguments(folder, config, gpu) | (prefill_sharing_arguments() if alone else {})
            self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except ValueError as error:
            raise CappyError(f"{setting}={model}: vLLM refused the model or its settings: {_first_line(error)}") from None
        if not gpu:
            lower_priority(set(psutil.Process().children(recursive=True)) - before)
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_model_len = config.max_model_len

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int, drop_shots: bool = True) -> list[int]:
        """Return the prompt's token ids, dropping shots from the front until `room` tokens are left for a candidate.

        Raises `PromptTooLong` when the instruction alone leaves less, or with `drop_shots=False` (a client's own conversation,
        which is not ours to shorten) when all turns together do.
        """
        limit = self.max_model_len - room
        ids = prompt_encoding.encode_prompt(self.tokenizer, turns, form, limit, drop_shots)
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
        """Return the `decoding.n` candidates of one prompt, without `logprobs` with None for theirs.

        Cancelling the call stops the engine's work on it.
        """
        # vLLM refuses an id it is still working on, and a request may be repeated while its first call winds up.
        unique = f"{request_id}-{uuid.uuid4().hex[:8]}"
        if on_candidate is None:
            return await self._request(token_ids, decoding, decoding.n, seed, unique, logprobs)

        async def one(draw: int, tell: OnCandidate) -> Candidate:
            own = None if seed is None else seed + draw
            (candidate,) = await self._request(token_ids, decoding, 1, own, f"{unique}-{draw}", logprobs)
            tell(candidate)
            return candidate

        # What vLLM makes of `n` itself, with the same seeds; but of its own it tells none before all are there. They begin in more than
        # one step of the engine, which takes 4 to 9 % more of its time, so it is done for those alone who listen.
        draws = [asyncio.ensure_future(one(draw, on_candidate)) for draw in range(decoding.n)]
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
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

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
        )
        (step,) = [step async for step in self.llm.generate(tokens_input(list(token_ids)), params, request_id)]
        return [
            Candidate(
                response=output.text.strip(),
                text=output.text,
                decoding=decoding.name,
                tokens=len(output.token_ids),
                finish_reason=output.finish_reason or "stop",
                logprob=float(output.cumulative_logprob or 0.0) if logprobs else None,
            )
            for output in sorted(step.outputs, key=lambda output: output.index)
        ]

    def max_cost(self, token_ids: Sequence[int], decoding: DecodingConfig) -> float:
        return 0.0

    def pop_cost(self, request_id: str) -> float:
        return 0.0

    def prompt_tokens(self, token_ids: Sequence[int], request_id: str) -> int:
        return len(token_ids)

    @property
    def dead(self) -> bool:
        """Whether the engine can never answer again; its process must be replaced."""
        return bool(self.llm.errored)

    def close(self) -> None:
        self.llm.shutdown()


def engine_arguments(folder: Path, config: VLLMConfig, gpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's engine for the model in `folder`, by the names its own server has them by."""
    eager = not config.compile if config.compile is not None else not gpu
    options: dict[str, Any] = {}
    if gpu:
        options["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:
        # A seeded prompt that chunked prefill splits kills the CPU engine, so there prompts are prefilled whole.
        # Only whole blocks of a prompt are shared between candidates; the CPU's default of 128 tokens makes each
        # candidate prefill most of a short prompt again.
        options["block_size"] = 32
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(2048, config.max_model_len)
    return {
        "model": str(folder),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "enable_prefix_caching": True,
        "enforce_eager": eager,
        "disable_log_stats": True,
        "trust_remote_code": False,
        **options,
    }


def set_environment(config: VLLMConfig, gpu: bool) -> None:
    """Set what vLLM reads when it is imported, where the user has not."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not gpu:
        # By default the CPU engine leaves one core idle and takes its cache size from the environment alone.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.cpu_kv_cache_gib))))
        if config.tensor_parallel == 1:
            # The model in the scheduler's own process: in one of its own, either spins on a core while it waits for the other.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        openmp_environment()
        # Ray gives every worker OMP_NUM_THREADS=1 for its own share; the engine is meant to have the machine.
        cores = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(min(config.cpu_threads or cores, cores))


def prefill_sharing_arguments() -> dict[str, Any]:
    """Have candidates of one prompt prefill it once (`vllm_prefill_sharing.py`)."""
    from vllm.config import KVTransferConfig

    connector = "generation.engines.vllm_prefill_sharing"
    return {
        "kv_transfer_config": KVTransferConfig(
            kv_connector="PrefillSharingConnector", kv_connector_module_path=connector, kv_role="kv_both"
        )
    }


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
