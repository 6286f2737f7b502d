"""Prefill sharing: the candidates of a prompt prefill its last, partial block once. Imports vLLM; imports no Ray.

vLLM's prefix cache shares only whole blocks of a prompt between requests. Each candidate computes the rest of the prompt again: half a
block on average. On CPU a block has 32 tokens, so this is a large part of the work for short candidates (figures: `docs/results.md`).
With this connector the first candidate computes the rest. The others start one step later with a copy of its block. The candidates are
the same as without it.

It is a KV connector, vLLM's interface for external KV caches. The scheduler of vLLM calls `get_num_new_matched_tokens`,
`update_state_after_alloc`, `build_connector_meta` and `request_finished`. The worker calls `start_load_kv` before each step, in the
same process or in another one. Only models with full attention in all layers are supported; other models run without sharing. It is
not used on GPUs: a block there has 16 tokens and prefill is cheap.

`sampler.engine.share_prefill` controls it; `vllm.TESTED_VERSIONS` lists the tested vLLM versions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, SupportsHMA
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import RequestStatus


@dataclass
class BlockCopies(KVConnectorMetadata):  # type: ignore[misc]
    """Blocks of the KV cache to copy before a step: `sources[i]` to `targets[i]`."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class PrefillSharingConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The KV connector. The instance in the scheduler selects the blocks to copy, the instance in the worker copies them."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        self._full_attention = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
        self._num_blocks = kv_cache_config.num_blocks
        self._block_size = vllm_config.cache_config.block_size
        # Requests that have blocks: prompt -> request id -> (request, its block ids).
        self._allocated: dict[tuple[int, ...], dict[str, tuple[Any, list[int]]]] = {}
        # Request id -> source block, from `get_num_new_matched_tokens` to `update_state_after_alloc` of the same request.
        self._sources: dict[str, int] = {}
        # Target block -> source block, for the step that is being scheduled.
        self._copies: dict[int, int] = {}
        self._caches: list[torch.Tensor] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return `(tokens to copy, False)` of a request, beyond `num_computed_tokens` that vLLM has already cached.

        None tokens makes vLLM repeat the call in the next step: another candidate is computing the block now.
        """
        prompt = self._shareable_prompt(request)
        # Each request computes the last prompt token itself, because that gives the probabilities of the first sampled token.
        rest = len(prompt) - 1 - num_computed_tokens
        # If more than a partial block is missing, no other candidate has started or vLLM shares no blocks with it.
        if request.num_output_tokens or not 0 < rest < self._block_size:
            return 0, False
        in_progress = False
        for other, blocks in self._allocated.get(prompt, {}).values():
            if other.status != RequestStatus.RUNNING:  # vLLM preempted it and freed its blocks
                continue
            if other.num_computed_tokens >= len(prompt) - 1:
                source = blocks[num_computed_tokens // self._block_size]
                # The block of the other candidate may itself be the target of a copy in this step.
                self._sources[request.request_id] = self._copies.get(source, source)
                return rest, False
            in_progress = True
        return (None if in_progress else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Record the blocks that vLLM allocated for a request, and the copy if `num_external_tokens` is above 0."""
        prompt = self._shareable_prompt(request)
        source = self._sources.pop(request.request_id, None)
        if not prompt:
            return
        ids = list(blocks.get_block_ids()[0])
        self._allocated.setdefault(prompt, {})[request.request_id] = (request, ids)
        if num_external_tokens and source is not None:
            self._copies[ids[(len(prompt) - 2) // self._block_size]] = source

    def build_connector_meta(self, scheduler_output: Any) -> BlockCopies:
        """Return the copies of the step that was scheduled, and clear them."""
        copies, self._copies = self._copies, {}
        return BlockCopies(list(copies.values()), list(copies))

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Remove a finished request. Returns `(False, None)`: vLLM may free its blocks immediately."""
        self._sources.pop(request.request_id, None)
        prompt = self._shareable_prompt(request)
        candidates = self._allocated.get(prompt, {})
        candidates.pop(request.request_id, None)
        if not candidates:
            self._allocated.pop(prompt, None)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Remove a finished request like `request_finished`; vLLM calls this method for models with several KV cache groups."""
        return self.request_finished(request, block_ids)

    def _shareable_prompt(self, request: Any) -> tuple[int, ...]:
        """Return the prompt token ids of a request, or () if its KV cache depends on more than these ids."""
        if not self._full_attention or request.mm_features or request.lora_request or request.cache_salt:
            return ()
        return tuple(request.prompt_token_ids or ())

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Store the KV caches of the layers, [blocks, ...]. Raises `ValueError` if the first dimension is not the number of blocks."""
        if self._full_attention and any(len(cache) != self._num_blocks for cache in kv_caches.values()):
            shapes = [tuple(cache.shape) for cache in kv_caches.values()]
            raise ValueError(
                f"KV caches have shapes {shapes}, but the first dimension must be num_blocks={self._num_blocks}; "
                f"set sampler.engine.share_prefill=false"
            )
        self._caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy the blocks of this step. vLLM overwrites the rest of a target block before it reads it."""
        copies = self._get_connector_metadata()
        if copies.targets:
            sources, targets = torch.tensor(copies.sources), torch.tensor(copies.targets)
            for cache in self._caches:
                cache[targets] = cache[sources]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: `start_load_kv` has copied all layers."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: no block is saved outside vLLM."""

    def wait_for_save(self) -> None:
        """Do nothing: no block is saved outside vLLM."""
