"""The state of a training run as files: weights and optimizer moments as safetensors, the books as JSON. No Ray; nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write weights, optimizer moments and `progress` (anything JSON holds) as safetensors and JSON into a folder."""
    save_file({name: value.detach().cpu().contiguous() for name, value in _weights(model).items()}, folder / "weights.safetensors")
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{key}/{name}"] = value.detach().cpu().contiguous()
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "progress.json").write_text(json.dumps(progress), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save_state` wrote and return its `progress`."""
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    moments = load_file(folder / "optimizer.safetensors")
    parameters = dict(model.named_parameters())
    for key, value in moments.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # The step counter is read as a plain float32 scalar on the parameter's device by the fused kernel.
        optimizer.state[parameter][kind] = value.to(parameter.device)
    return dict(json.loads((folder / "progress.json").read_text(encoding="utf-8")))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, each tensor that several names share once (safetensors holds no aliases)."""
    unique: dict[tuple[int, int], str] = {}
    state = model.state_dict()
    for name, value in state.items():
        unique.setdefault((value.data_ptr(), value.numel()), name)
    return {name: state[name] for name in unique.values()}
