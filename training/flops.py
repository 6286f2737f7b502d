"""How well the hardware is used: floating-point operations of training, and the peaks of GPUs. Torch alone."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from training import encoder_kernels

# Dense bfloat16 FLOP/s by the makers' data sheets, in what `torch.cuda.get_device_name` says; the first that matches counts.
_PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU, or None where they are not known."""
    return next((flops for name, flops in _PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def device_peak_flops(device: torch.device) -> float | None:
    """Return `peak` of a device; None for anything but a GPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class FlopCounter:
    """The floating-point operations of a forward and backward pass of an encoder.

    Left out are padding, and what reads one token of each pair: pooler, head, and most of a last layer made `lean`.
    """

    def __init__(self, model: Any) -> None:
        blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        matrices = {id(each): each.numel() for block in blocks for each in block.parameters() if each.ndim >= 2}
        layers = int(getattr(model.config, "num_hidden_layers", 0))
        if encoder_kernels.computes_first_token_only(model):
            last = model.base_model.encoder.layer[-1]
            of_all_tokens = (last.attention.self.key.weight, last.attention.self.value.weight)
            for each in last.parameters():
                matrices.pop(id(each), None)
            matrices |= {id(each): each.numel() for each in of_all_tokens}
            layers -= 1
        self._matrices = sum(matrices.values())
        self._attention = layers * int(getattr(model.config, "hidden_size", 0))

    def __call__(self, tokens: float, attended: float) -> float:
        """`tokens` of all pairs, and the sum of the squares of their lengths: what attention looks at."""
        return float(6.0 * self._matrices * tokens + 12.0 * self._attention * attended)
