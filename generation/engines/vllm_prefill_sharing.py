"""A prompt's candidates prefill it once: the end of it, which vLLM's prefix cache does not share, is copied from one to the others.

vLLM shares a prompt's whole blocks between requests. What is left at its end, half a block on average, each of its candidates computes
again: on CPU, where a block is 32 tokens, about a third of the engine's work for short candidates (docs/guides/serve.md, Load). Here the
first one computes it, and the others begin one step later with a copy. Candidates are the same ones.

It is an extension by vLLM's own interface for KV caches from elsewhere: `get_num_new_matched_tokens` and the like are called by its
scheduler, `start_load_kv` by its worker before a step, in the same process or not. For models whose layers all attend to everything;
others stay as they are. On GPUs a block is 16 tokens and prefilling costs little, so it is not used there.
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
    """Blocks to copy before a step."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


class PrefillSharingConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One in the scheduler, which decides what is copied, and one in the worker, which copies it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        self._applies = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
        self._blocks = kv_cache_config.num_blocks
        self._block_size = vllm_config.cache_config.block_size
        # By prompt and request: those that have blocks, and these.
        self._begun: dict[tuple[int, ...], dict[str, tuple[Any, list[int]]]] = {}
        # Source by request, from the question whether there is one to the answer that it has its blocks.
        self._sources: dict[str, int] = {}
        # Source by target, of the step that is being scheduled.
        self._copies: dict[int, int] = {}
        self._caches: list[torch.Tensor] = []

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many of a request's tokens beyond those vLLM itself has are to be copied; None for a step later."""
        prompt = self._prompt(request)
        rest = len(prompt) - 1 - num_computed_tokens  # the last one is computed by each: it gives the first token's probabilities
        # Where more than the end is missing there is no sibling, or vLLM shares nothing with it.
        if request.num_output_tokens or not 0 < rest < self._block_size:
            return 0, False
        begins = False
        for sibling, blocks in self._begun.get(prompt, {}).values():
            if sibling.status != RequestStatus.RUNNING:  # its blocks were taken from it
                continue
            if sibling.num_computed_tokens >= len(prompt) - 1:
                source = blocks[num_computed_tokens // self._block_size]
                # The sibling may itself get a copy in this step.
                self._sources[request.request_id] = self._copies.get(source, source)
                return rest, False
            begins = True
        return (None if begins else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Take note of the blocks a request got; `num_external_tokens` of its tokens are to be copied."""
        prompt = self._prompt(request)
        source = self._sources.pop(request.request_id, None)
        if not prompt:
            return
        ids = list(blocks.get_block_ids()[0])
        self._begun.setdefault(prompt, {})[request.request_id] = (request, ids)
        if num_external_tokens and source is not None:
            self._copies[ids[(len(prompt) - 2) // self._block_size]] = source

    def build_connector_meta(self, scheduler_output: Any) -> BlockCopies:
        """Return the copies of the step that was scheduled."""
        copies, self._copies = self._copies, {}
        return BlockCopies(list(copies.values()), list(copies))

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Forget a request; its blocks may be freed at once."""
        self._sources.pop(request.request_id, None)
        prompt = self._prompt(request)
        siblings = self._begun.get(prompt, {})
        siblings.pop(request.request_id, None)
        if not siblings:
            self._begun.pop(prompt, None)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """As `request_finished`, for models with several kinds of layers."""
        return self.request_finished(request, block_ids)

    def _prompt(self, request: Any) -> tuple[int, ...]:
        """Return a request's prompt; nothing where it alone does not say what its keys and values are."""
        if not self._applies or request.mm_features or request.lora_request or request.cache_salt:
            return ()
        return tuple(request.prompt_token_ids or ())

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the layers' caches; the first dimension is the block. Raises `ValueError` where it is not."""
        if self._applies and any(len(cache) != self._blocks for cache in kv_caches.values()):
            raise ValueError(f"KV caches of shapes {[tuple(cache.shape) for cache in kv_caches.values()]} for {self._blocks} blocks")
        self._caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy the blocks of this step. What a target has beyond the copied tokens is overwritten before it is read."""
        copies = self._get_connector_metadata()
        if copies.targets:
            sources, targets = torch.tensor(copies.sources), torch.tensor(copies.targets)
            for cache in self._caches:
                cache[targets] = cache[sources]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are there when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing goes elsewhere."""

    def wait_for_save(self) -> None:
        """Nothing goes elsewhere."""
