"""Scorers that ship with the package: the difference to an embedded encoder, as low-rank matrices. numpy only, no torch.

`python -m training.pack` writes such a folder. Its files:

- `delta.safetensors`: for each weight of the scorer the difference to the encoder. That of a matrix is the product of `NAME.left`
  (int8), the diagonal `NAME.scale` (float32) and `NAME.right` (int8). That of a vector, and each weight of the head, is `NAME.delta`
  (float32);
- `pack.json`: the encoder, the SHA-256 of its weights, and how well the packed scorer agrees with the original one;
- `config.json`, `README.md` (the card) and, if one was fitted, `selection.json`: the files of the scorer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import CappyError

FOLDER = Path(__file__).parent / "packaged"
"""The packed scorers of this version, one folder each."""
DELTA = "delta.safetensors"
PACK = "pack.json"
_WEIGHTS = "model.safetensors"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

Tensors = Mapping[str, np.ndarray]


def version(packed: Path) -> str:
    """Return 16 hex digits of the SHA-256 over the files of a packed scorer. The name of its unpacked copy contains them."""
    digest = hashlib.sha256()
    for file in sorted(packed.iterdir()):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def encoder_weight(encoder: Tensors, name: str) -> np.ndarray | None:
    """Return the weight of the encoder for a weight of the scorer; None for the head, which the encoder does not have.

    A scorer's weights have the prefix of its model family, e.g. `bert.`; an encoder's may not.
    """
    return encoder.get(name, encoder.get(name.partition(".")[2]))


def add_delta(encoder: Tensors, delta: Tensors) -> dict[str, np.ndarray]:
    """Return the weights of a scorer, float32: the weights of its encoder plus the difference.

    Raises `KeyError` or `ValueError` if the difference does not fit the encoder.
    """
    weights = {}
    for name in sorted({key.rpartition(".")[0] for key in delta}):
        if f"{name}.delta" in delta:
            difference = delta[f"{name}.delta"].astype(np.float32)
        else:
            left, right = (delta[f"{name}.{side}"].astype(np.float32) for side in ("left", "right"))
            difference = left * delta[f"{name}.scale"] @ right
        base = encoder_weight(encoder, name)
        weights[name] = difference if base is None else base.astype(np.float32) + difference
    return weights


def unpack(packed: Path, encoder_folder: Path, target: Path) -> None:
    """Write the whole scorer to the folder `target`; transformers load it as any other model.

    Raises `CappyError` if the weights of the encoder have changed since the scorer was packed.
    """
    from safetensors.numpy import load_file, save

    facts = json.loads((packed / PACK).read_text(encoding="utf-8"))
    found = sha256(encoder_folder / _WEIGHTS)
    if found != facts["encoder_sha256"]:
        raise CappyError(
            f"{packed.name}: the weights of its encoder {facts['encoder']} have SHA-256 {found[:12]}, not {facts['encoder_sha256'][:12]}; "
            f"delete {encoder_folder} and run the command again"
        )
    weights = add_delta(load_file(encoder_folder / _WEIGHTS), load_file(packed / DELTA))
    (target / _WEIGHTS).write_bytes(save(weights, {"format": "pt"}))
    for name in _TOKENIZER:
        if (encoder_folder / name).exists():
            shutil.copyfile(encoder_folder / name, target / name)
    _limit_tokens(target / "tokenizer_config.json", facts["max_length"])
    for file in packed.iterdir():
        if file.name not in (DELTA, PACK):
            shutil.copyfile(file, target / file.name)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, as hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _limit_tokens(file: Path, max_length: int) -> None:
    """Set the length limit of a tokenizer, which is the limit of a scorer's input in tokens."""
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "model_max_length": max_length}, indent=2) + "\n", encoding="utf-8")
