"""Count the floating-point operations of training, and give the peak of a GPU. Torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cluster import hardware
from training import encoder_kernels


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU by its name; None for an unknown GPU."""
    gpu = hardware.find_gpu(device_name)
    return gpu.flops if gpu else None


def device_peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device; None for a CPU or an unknown GPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class FlopCounter:
    """Count the floating-point operations of a forward and backward pass of an encoder.

    Padding is not counted. Layers that read one token of each pair are not counted either: the pooler, the head, and most of a last
    layer with `encoder_kernels.compute_first_token_only`.
    """

    def __init__(self, model: Any) -> None:
        blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        matrices = {id(each): _passes(each) * each.numel() for block in blocks for each in block.parameters() if each.ndim >= 2}
        layers = [layer for block in blocks for layer in block if len(block) == getattr(model.config, "num_hidden_layers", 0)]
        if encoder_kernels.computes_first_token_only(model):
            last = layers.pop()
            of_all_tokens = (last.attention.self.key.weight, last.attention.self.value.weight)
            for each in last.parameters():
                matrices.pop(id(each), None)
            matrices |= {id(each): _passes(each) * each.numel() for each in of_all_tokens}
        self._matrices = sum(matrices.values())
        passes = sum(_passes(next(layer.parameters())) for layer in layers)
        self._attention = passes * int(getattr(model.config, "hidden_size", 0))

    def __call__(self, tokens: float, squared_lengths: float) -> float:
        """Return the operations for pairs with `tokens` tokens in all; `squared_lengths` sums the squares of the pairs' lengths.

        2 per weight of a matrix and token, and 4 per layer and unit of the hidden size for each pair of tokens in attention. Layers that
        are trained need three times as many, because of the backward pass.
        """
        return float(2.0 * self._matrices * tokens + 4.0 * self._attention * squared_lengths)


def _passes(parameter: nn.Parameter) -> int:
    """Return how often the product with a weight is computed: once forward, and twice backward unless it is frozen."""
    return 3 if parameter.requires_grad else 1
