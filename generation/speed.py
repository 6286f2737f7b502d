"""Speed of decoding, prefill and training from the size of a model and the speed of a device. Pure: no files, no torch.

The shares and the time between steps are assumptions. With them the formulas agree with these measurements within a factor of two:

- SmolLM2-1.7B, about 9,200 tokens/s on an H100 (FinePhrase),
- SmolLM2-135M, 285 to 319 tokens/s on 2 CPU cores (vLLM),
- training of MiniLM, 19.5 pairs/s of 190.6 tokens on 2 CPU cores.

Scoring with MiniLM ran at 43 pairs/s on one core of another CPU, and the formula gives 20 pairs/s for a core here. A poor setup is not
covered: Gemma-3-1B ran at about 730 tokens/s per H100.

B: candidates that are decoded at a time; L: tokens of their context.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.hardware import Device

COMPUTE_SHARE = 0.5
"""Share of a device's FLOP/s that products reach."""
MEMORY_SHARE = 0.6
"""Share of a device's memory bandwidth that decoding reaches."""
PREFILL_TOKENS = 2048
"""Prompt tokens of a step of the engine."""
STEP_S = {"vllm": 0.003, "transformers": 0.03}
"""Time of a step on a GPU apart from the products and the memory traffic, in seconds, by engine."""


@dataclass(frozen=True)
class LLMSize:
    """The size of an LLM, for one token of one candidate."""

    parameters: float
    """Parameters that process a token."""
    kv_bytes: float
    """Bytes of the KV cache for a token of the context."""
    bytes_per_parameter: float = 2.0

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.bytes_per_parameter


@dataclass(frozen=True)
class EncoderSize:
    """The size of the encoder of a scorer."""

    layers: int
    hidden: int
    intermediate: int

    @property
    def parameters(self) -> int:
        """Return the weights of the matrices: four of the attention and two of the feed-forward part of each layer."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)


def guess_kv_bytes(parameters: float) -> float:
    """Return bytes of KV cache per token for a decoder of unknown shape: 131 kB at 8G parameters (Llama 3), with the square root."""
    return float(131e3 * (parameters / 8e9) ** 0.5)


def batch_size(size: LLMSize, memory: float | None, most: int, context: float) -> int:
    """Return B: at most `most`, and as many as have room for `context` tokens in `memory` bytes beside the weights; at least 1.

    With `memory` None only `most` counts.
    """
    if memory is None:
        return most
    return max(1, min(most, int((memory - size.weight_bytes) / max(size.kv_bytes * context, 1.0))))


def decoded_tokens_per_second(size: LLMSize, device: Device, batch: int, context: float, step_s: float = 0.0) -> float:
    """Return the tokens/s of decoding: B / (memory traffic + products + time between steps).

    A step reads all weights once, and the KV cache of L tokens for each candidate. It takes 2 operations per parameter and candidate.
    """
    traffic = (size.weight_bytes + batch * context * size.kv_bytes) / (MEMORY_SHARE * device.bandwidth)
    products = 2 * size.parameters * batch / (COMPUTE_SHARE * device.flops)
    return batch / (traffic + products + step_s)


def prefilled_tokens_per_second(size: LLMSize, device: Device, step_s: float = 0.0) -> float:
    """Return the prompt tokens/s: T / (products + time between steps), with T = `PREFILL_TOKENS` tokens of prompts in a step.

    The tokens of a step share the read of the weights, so the products take the time: 2 operations per parameter and token.
    """
    return PREFILL_TOKENS / (PREFILL_TOKENS * 2 * size.parameters / (COMPUTE_SHARE * device.flops) + step_s)


def pair_flops(size: EncoderSize, tokens: float) -> float:
    """Return the operations of a forward pass for a pair of `tokens` tokens.

    2 per weight of a matrix and token, and 4 per layer, unit of the hidden size and pair of tokens in the attention. A training step
    takes three times as many (`training.flops.FlopCounter` counts those of a real model).
    """
    return 2.0 * size.parameters * tokens + 4.0 * size.layers * size.hidden * tokens**2


def trained_pairs_per_second(size: EncoderSize, device: Device, tokens: float) -> float:
    """Return the pairs/s of training without padding, on pairs of `tokens` tokens: the device's FLOP/s x `COMPUTE_SHARE`."""
    return scored_pairs_per_second(size, device, tokens) / 3


def scored_pairs_per_second(size: EncoderSize, device: Device, tokens: float) -> float:
    """Return the pairs/s of scoring, as `trained_pairs_per_second` for a forward pass."""
    return COMPUTE_SHARE * device.flops / pair_flops(size, tokens)
