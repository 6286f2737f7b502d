"""Low-rank adapters (LoRA) on a published scorer: add, save and merge them. Torch and peft, no Ray.

A folder of adapters has peft's `adapter_config.json` and `adapter_model.safetensors`. Its `base.json` has the base scorer's URI and
the SHA-256 of the base's weights.
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
from cluster.errors import CappyError, UsageError, first_line

BASE = "base.json"
_WEIGHTS = "adapter_model.safetensors"


def add_adapters(model: Any, settings: LoraConfig, seed: int) -> Any:
    """Add adapters to the linear layers of a scorer's model and return peft's model around it.

    The adapters and the head are trainable, all other weights are frozen. The layers of `model` are replaced in place, so `model`
    itself trains and scores with the adapters. Their initial weights are drawn from `seed`.

    Raises `UsageError` when the model has no layer of `settings.targets`.
    """
    import peft

    targets = list(settings.targets or linear_layers(model))
    options = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,  # also trains and saves the head
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
            raise UsageError(f"adapt.lora.targets={targets}: the base has no such layers; choose among {known}") from None


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in a model's repeated blocks, for any model family."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{block}.") for block in blocks)
    ]


def save_adapters(wrapped: Any, base: dict[str, Any], folder: Path) -> None:
    """Write the adapters, the head and `base.json`.

    `base` has the base scorer's `uri`, the `sha256` of its weights and the `writer` of its manifest.
    """
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path, config.revision = models.split_revision(base["uri"])
    # The vocabulary is unchanged; without this argument peft would compare it with the base's, on the hub.
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def read_base(folder: Path) -> dict[str, Any]:
    """Return the base of a folder of adapters: its `uri` and, when `save_adapters` wrote the folder, `sha256` and `writer`."""
    if (folder / BASE).exists():
        return dict(json.loads((folder / BASE).read_text(encoding="utf-8")))
    config = json.loads((folder / models.ADAPTER).read_text(encoding="utf-8"))
    name, revision = config["base_model_name_or_path"], config.get("revision")
    return {"uri": f"{name}@{revision}" if revision and "@" not in name else name}


def merge_adapters(model: Any, folder: Path, setting: str) -> Any:
    """Merge the adapters of a folder into the base's weights and return the model. It is as fast as the base.

    Raises `CappyError`, which names `setting` (a key and its value), when the adapters do not fit the base.
    """
    import peft

    if not (folder / _WEIGHTS).exists():  # peft would load a pickle instead
        raise CappyError(f"{setting}: the folder of adapters has no {_WEIGHTS}; save it as safetensors")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise CappyError(f"{setting}: its adapters do not fit their base ({first_line(error)[:200]}); adapt it again") from None


def weights_sha256(folder: Path) -> str:
    """Return one SHA-256 over the safetensors files of a model's folder, as hex digits."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
