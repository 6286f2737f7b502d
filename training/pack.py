"""Pack a scorer for the package: its difference to the encoder as low-rank matrices, in a few megabytes.

    python -m training.pack SCORER OUT [--max-mb 10] [--dataset SET]

SCORER is a scorer of `cappy train` or `cappy adapt` (all weights, or adapters to a base) on an embedded encoder. The difference of each
matrix is approximated by its largest singular values, whose vectors are rounded to int8. The budget goes to the singular values that
reduce the squared error of the weights most for their bytes. With `--dataset`, the packed and the original scorer score the candidates of
train rows, and the bias of the head is corrected by the mean difference. Then they score candidates of validation rows, and `pack.json`
has the differences of these scores.
`cluster.packed_scorer` describes the files. Imports torch, no Ray.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster import models, packed_scorer, storage
from cluster.errors import CappyError, UsageError
from generation.dataset import RegressionSet
from training.scorer import Scorer
from training.validation import rank_agreement

_SCALE_BYTES = 4
# The card, the config and the headers of the tensors.
_RESERVED_BYTES = 200_000
_COPIED = ("selection.json",)
_VALIDATION_ROWS = 200
_CALIBRATION_ROWS = 100
_ENERGY = 1e-8
"""Singular values whose squares are below this share of the largest square are rounding, and are left out."""


def pack_scorer(
    scorer: str, out: Path, max_mb: float = 10.0, dataset: str | None = None, encoder: str = "minilm-l6", note: str | None = None
) -> dict[str, Any]:
    """Write the packed scorer to the folder `out`; return the content of its `pack.json`.

    Args:
        scorer: The scorer: a folder or an s3:// folder.
        out: The folder to write; files of an earlier pack are replaced.
        max_mb: Largest size of all files, in MB.
        dataset: A published set whose validation rows measure the difference of the scores; None measures nothing.
        encoder: The embedded encoder that the scorer was trained from.
        note: A paragraph for the start of the card.

    Raises:
        UsageError: if `max_mb` leaves no room for the head and the vectors.
        CappyError: if the scorer is not of this encoder, or cannot be loaded.
    """
    from safetensors.numpy import load_file, save

    original = Scorer.load(scorer, device="cpu", setting="SCORER", cpu_kernels=False)
    source = models.resolve(scorer, "SCORER", adapters=True)
    encoder_folder = models.resolve(encoder, "encoder")
    differences = _differences(original, load_file(encoder_folder / "model.safetensors"), scorer, encoder)
    delta, share = compress(differences, int(max_mb * 1e6) - _RESERVED_BYTES)
    out.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        (out / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    original.model.config.save_pretrained(out)
    (out / packed_scorer.DELTA).write_bytes(save(delta))
    facts = {
        "version": 1,
        "encoder": encoder,
        "encoder_sha256": packed_scorer.sha256(encoder_folder / "model.safetensors"),
        "max_length": original.max_length,
        "kept_energy": round(share, 6),
    }
    _write_json(out / packed_scorer.PACK, facts)
    if dataset is not None:
        with storage.temporary_folder("pack") as folder:
            packed_scorer.unpack(out, encoder_folder, folder)
            packed = Scorer.load(str(folder), device="cpu", cpu_kernels=False)
            _correct_bias(original, packed, delta, dataset)
            (out / packed_scorer.DELTA).write_bytes(save(delta))
            facts["agreement"] = compare_scores(original, packed, dataset)
        _write_json(out / packed_scorer.PACK, facts)
    if (source / "README.md").exists():
        text = (source / "README.md").read_text(encoding="utf-8")
        (out / "README.md").write_text(render_card(text, storage.absolute(scorer), out.name, facts, note), encoding="utf-8")
    return {**facts, "bytes": sum(file.stat().st_size for file in out.iterdir())}


def compress(differences: Mapping[str, np.ndarray], max_bytes: int) -> tuple[dict[str, np.ndarray], float]:
    """Return the tensors of `delta.safetensors` within `max_bytes`, and the share of the squared differences of matrices that they keep.

    Raises `UsageError` if the vectors alone exceed `max_bytes`.
    """
    delta = {f"{name}.delta": value.astype(np.float32) for name, value in differences.items() if value.ndim != 2 or 1 in value.shape}
    room = max_bytes - sum(value.nbytes for value in delta.values())
    if room < 0:
        raise UsageError(f"--max-mb is too small: the head and the vectors alone need {(max_bytes - room) / 1e6:.2f} MB; raise it")
    factors = {name: _decompose(value) for name, value in differences.items() if f"{name}.delta" not in delta}
    # The best sum of squares for the bytes: the singular values in the order of square / bytes.
    choices = [
        (float(values[index] ** 2) / (left.shape[0] + right.shape[1]), name, index)
        for name, (left, values, right) in factors.items()
        for index in range(int((values**2 > _ENERGY * values[0] ** 2).sum()))
    ]
    ranks = dict.fromkeys(factors, 0)
    for _, name, index in sorted(choices, reverse=True):
        left, _, right = factors[name]
        size = left.shape[0] + right.shape[1] + _SCALE_BYTES
        if size <= room and index == ranks[name]:
            ranks[name], room = index + 1, room - size
    kept = whole = 0.0
    for name, (left, values, right) in factors.items():
        rank = ranks[name]
        columns, left_scales = _round(left[:, :rank])
        rows, right_scales = _round(right[:rank].T)
        delta |= {f"{name}.left": columns, f"{name}.right": np.ascontiguousarray(rows.T)}
        delta[f"{name}.scale"] = (values[:rank] * left_scales * right_scales).astype(np.float32)
        kept, whole = kept + float((values[:rank] ** 2).sum()), whole + float((values**2).sum())
    return delta, kept / whole if whole else 1.0


def render_card(original: str, scorer: str, name: str, facts: Mapping[str, Any], note: str | None) -> str:
    """Return the card of a packed scorer: the original card without plots and local paths, with `note` and the packing.

    Args:
        original: The card of the scorer.
        scorer: The path of the scorer in it.
        name: The name of the packed scorer.
        facts: The content of `pack.json`.
        note: A paragraph for the start, or None.
    """
    text = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n\n?", "", original.replace(scorer, name), flags=re.MULTILINE)
    text = re.sub(r"of `/[^`]*`", "of a regression set", text)
    if note:
        text = re.sub(r"^(# .*\n)", rf"\1\n{note}\n", text, count=1, flags=re.MULTILINE)
    packing = (
        f"\n## Packing\n\nThe package has the difference to `{facts['encoder']}`: low-rank matrices in int8, which keep "
        f"{facts['kept_energy']:.1%} of its square.\n"
    )
    if found := facts.get("agreement"):
        packing += (
            f"On {found['pairs']:,} validation pairs the scores differ from the original ones by {found['mean']:.4f} on average and by at\n"
            f"most {found['max']:.4f}; the Spearman correlation is {found['spearman']:.4f}.\n"
        )
    return text.rstrip() + "\n" + packing


def compare_scores(original: Scorer, packed: Scorer, dataset: str, rows: int = _VALIDATION_ROWS) -> dict[str, float]:
    """Return the absolute differences of two scorers' scores (mean, maximum), and the Spearman correlation, on validation pairs."""
    one, other = _scores((original, packed), dataset, "validation", rows)
    return {
        "pairs": len(one),
        "mean": round(float(np.abs(one - other).mean()), 6),
        "max": round(float(np.abs(one - other).max()), 6),
        "spearman": round(rank_agreement(one, other)[0], 6),
    }


def _scores(scorers: Sequence[Scorer], dataset: str, split: str, rows: int) -> list[np.ndarray]:
    """Return the scores of each scorer for the pairs of the first rows of a split; of the other split if it has no rows."""
    opened = RegressionSet(dataset, "--dataset")
    splits = [each for each in (split, "validation", "train") if opened.rows(each)]
    if not splits:
        raise UsageError(f"--dataset={dataset} has no rows; give another set")
    pairs = next(opened.pairs(splits[0], rows))
    return [each.score(pairs.instructions, pairs.responses).astype(np.float64) for each in scorers]


def _correct_bias(original: Scorer, packed: Scorer, delta: dict[str, np.ndarray], dataset: str) -> None:
    """Add the mean difference of the scores on train pairs to the bias of the head, in `delta` and in `packed`."""
    biases = [name for name, value in delta.items() if name.endswith(".delta") and value.shape == (1,)]
    if len(biases) != 1:  # a head without a bias
        return
    one, other = _scores((original, packed), dataset, "train", _CALIBRATION_ROWS)
    shift = float((one - other).mean())
    delta[biases[0]] += np.float32(shift)
    packed.model.get_parameter(biases[0].removesuffix(".delta")).data += shift


def _round(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each column to int8; return the integers and the scale of each column."""
    scales = np.abs(columns).max(axis=0, initial=0.0).clip(min=np.finfo(np.float32).tiny) / 127
    # safetensors writes the memory of an array as it is, so the rows must follow each other there.
    return np.ascontiguousarray(np.rint(columns / scales), np.int8), scales


def _decompose(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the singular value decomposition of a matrix, as `np.linalg.svd(matrix, full_matrices=False)` does.

    The eigenvectors of the smaller Gram matrix give it. That is much faster for the 30,000 rows of word embeddings, and exact enough:
    `compress` leaves out small singular values.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _decompose(matrix.T)
        return right.T, values, left.T
    wide = matrix.astype(np.float64)
    squares, vectors = np.linalg.eigh(wide.T @ wide)
    order = squares.argsort()[::-1]
    values, vectors = np.sqrt(squares[order].clip(min=0.0)), vectors[:, order]
    return wide @ vectors / np.maximum(values, np.finfo(float).tiny), values, vectors.T


def _write_json(file: Path, tree: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _differences(scorer: Scorer, encoder: Mapping[str, np.ndarray], name: str, encoder_name: str) -> dict[str, np.ndarray]:
    """Return the difference of each weight of a scorer to the encoder's; the weights of the head are returned as they are."""
    weights = {key: value.float().numpy() for key, value in scorer.model.state_dict().items() if value.is_floating_point()}
    differences = {}
    known = 0
    for key, value in weights.items():
        base = packed_scorer.encoder_weight(encoder, key)
        if base is not None and base.shape != value.shape:
            raise CappyError(f"SCORER={name}: {key} has the shape {value.shape}, and {encoder_name} has {base.shape}; give its encoder")
        known += base is not None
        differences[key] = value if base is None else value - base.astype(np.float32)
    if not known:
        raise CappyError(f"SCORER={name}: no weight is one of {encoder_name}; give a scorer that was trained from it")
    return differences


def main() -> None:
    """Parse the arguments, pack the scorer and print the result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m training.pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("scorer", metavar="SCORER", help="a published scorer")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--max-mb", type=float, default=10.0, help="largest size of all files (default: 10)")
    parser.add_argument("--dataset", help="a published set whose validation pairs are scored by both scorers")
    parser.add_argument("--encoder", default="minilm-l6", help="the embedded encoder of the scorer (default: minilm-l6)")
    parser.add_argument("--note", help="a paragraph for the start of the card")
    given = parser.parse_args()
    try:
        print(json.dumps(pack_scorer(given.scorer, given.out, given.max_mb, given.dataset, given.encoder, given.note)))
    except CappyError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
