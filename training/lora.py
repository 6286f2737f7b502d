"""Low-rank adapters to a published scorer: added to its model, saved without it, merged into it again. Torch and peft, no Ray.

A folder of adapters holds peft's `adapter_config.json` and `adapter_model.safetensors`, and `base.json`: the scorer they are
for and the SHA-256 of its weights, without which they mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster import models
from cluster.config import LoraConfig
from cluster.errors import CappyError, UsageError

BASE = "base.json"
_WEIGHTS = "adapter_model.safetensors"


def add_adapters(model: Any, settings: LoraConfig, seed: int) -> Any:
    """Return peft's model around a scorer's: adapters beside its linear layers, all else frozen but its head.

    The layers of `model` itself are exchanged, so that it runs, trains and scores with the adapters too. Their first weights
    are drawn from `seed`. Raises `UsageError` where `settings.targets` names no layer of it.
    """
    import peft

    targets = list(settings.targets or linear_layers(model))
    options = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,  # which also trains the head and saves it with the adapters
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, options)
        except ValueError:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)}))
            raise UsageError(f"adapt.lora.targets={targets}: the base has no such layers; its linear layers are {known}") from None


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in a model's repeated blocks, whatever the family calls them."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{block}.") for block in blocks)
    ]


def save_adapters(wrapped: Any, base: dict[str, Any], folder: Path) -> None:
    """Write the adapters and the head; `base` has the scorer's `uri`, the `sha256` of its weights and its manifest's `writer`."""
    wrapped.peft_config["default"].base_model_name_or_path = base["uri"]
    # What this would look for in the vocabulary has not changed, and it would ask the hub.
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def read_base(folder: Path) -> dict[str, Any]:
    """Return what a folder of adapters says of its base: `uri`, and where `save` wrote it `sha256` and `writer`."""
    if (folder / BASE).exists():
        return dict(json.loads((folder / BASE).read_text(encoding="utf-8")))
    return {"uri": json.loads((folder / models.ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]}


def merge_adapters(model: Any, folder: Path, setting: str) -> Any:
    """Return the base's model with the adapters of a folder added into its weights, so that it is as fast as the base.

    Raises `CappyError` naming `setting` (a key and its value) where they do not fit it.
    """
    import peft

    if not (folder / _WEIGHTS).exists():  # peft would look for a pickle next
        raise CappyError(f"{setting}: the folder of adapters has no {_WEIGHTS}; save it as safetensors")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise CappyError(f"{setting}: its adapters do not fit their base ({str(error).splitlines()[0][:200]}); adapt it again") from None


def weights_sha256(folder: Path) -> str:
    """Return one SHA-256 over the safetensors files of a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
