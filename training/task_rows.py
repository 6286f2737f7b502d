"""The rows and pairs of a task: choose them by hash, and leave rows out for cross-validation. Reads a set; no torch, no Ray.

The selection of rows and pairs is a function of the seed and the texts. So the order of the rows of a set does not matter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from generation.dataset import Pairs, RegressionSet, explode
from generation.schema import DATASET

_COLUMNS = ("id", "dataset", "instruction", "candidates")
T = TypeVar("T")


@dataclass(frozen=True)
class LeftOut:
    """The part of a task that a training of cross-validation does not see."""

    instructions: frozenset[str]
    """Rows with these instructions are left out."""
    references: frozenset[str]
    """Mismatched candidates with these texts are left out. They are references of left-out rows only. With label 0 in other rows they
    would teach that the right answer of a left-out row is wrong."""

    def remove(self, table: pa.Table) -> pa.Table:
        """Return the rows of a table, and the candidates of each, that are not left out."""
        rows = [row for row in table.to_pylist() if row["instruction"] not in self.instructions]
        for row in rows:
            row["candidates"] = [
                each for each in row["candidates"] if each["source"] != "mismatched" or each["response"] not in self.references
            ]
        return pa.Table.from_pylist(rows, table.schema)


def only_references(dataset: RegressionSet, only: str | None, instructions: frozenset[str]) -> frozenset[str]:
    """Return the references of the train rows with these instructions that are not references of other train rows of the task."""
    of_part: set[str] = set()
    of_others: set[str] = set()
    for table in dataset.batches("train", columns=["dataset", "instruction", "candidates"], only=only):
        for row in table.to_pylist():
            found = of_part if row["instruction"] in instructions else of_others
            found.update(each["response"] for each in row["candidates"] if each["source"] == "reference")
    return frozenset(of_part - of_others)


def collect_pairs(
    dataset: RegressionSet, only: str | None, size: int, seed: int, left_out: LeftOut | None = None, *, whole: bool = False
) -> tuple[Pairs, int]:
    """Return at most `size` distinct train pairs of a task, chosen and ordered by hash, and the number of its train rows.

    Rows of `left_out` are not counted. A pair that is in several rows gets its highest label. With `whole`, instructions are chosen
    with all their pairs, for an objective that compares them; only the last instruction may be cut. Holds at most twice `size` pairs,
    plus one batch, in memory.
    """
    found: dict[bytes, tuple[str, str, float]] = {}
    seen = 0
    for table in dataset.batches("train", columns=_COLUMNS, only=only):
        if left_out:
            table = left_out.remove(table)
        seen += table.num_rows
        exploded = explode(table)
        for instruction, response, label in zip(exploded.instructions, exploded.responses, exploded.labels.tolist(), strict=True):
            key = _hash_key(seed, instruction, response)
            key = _hash_key(seed, instruction) + key if whole else key
            found[key] = (instruction, response, max(label, found[key][2] if key in found else 0.0))
        if len(found) > 2 * size:
            found = _first_by_hash(found, size)
    chosen = list(_first_by_hash(found, size).values())
    instructions = [instruction for instruction, _, _ in chosen]
    numbers = {instruction: number for number, instruction in enumerate(dict.fromkeys(instructions))}
    groups = np.fromiter((numbers[instruction] for instruction in instructions), np.int64, len(instructions))
    labels = np.array([label for _, _, label in chosen], np.float32)
    return Pairs(instructions, [response for _, response, _ in chosen], labels, groups), seen


def candidate_rows(dataset: RegressionSet, split: str, only: str | None, size: int, seed: int) -> pa.Table:
    """Return at most `size` rows of a task in a split, chosen and ordered by hash.

    Only rows with candidates to choose from count: samples of the LLM or answer choices.
    """
    found: dict[bytes, dict[str, Any]] = {}
    for table in dataset.batches(split, columns=_COLUMNS, only=only):
        for row in table.to_pylist():
            if any(each["source"] in ("sampled", "choice") for each in row["candidates"]):
                found[_hash_key(seed, row["id"])] = row
        if len(found) > 2 * size:
            found = _first_by_hash(found, size)
    return pa.Table.from_pylist(list(_first_by_hash(found, size).values()), pa.schema([DATASET.field(name) for name in _COLUMNS]))


def _hash_key(seed: int, *texts: str) -> bytes:
    return hashlib.blake2b("\0".join([str(seed), *texts]).encode(), digest_size=12).digest()


def _first_by_hash(found: dict[bytes, T], size: int) -> dict[bytes, T]:
    return dict(sorted(found.items())[:size])


def epoch_order(distinct: int, count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch, int64 (count,): shuffled positions of the `distinct` items, repeated until there are `count`."""
    draw = np.random.default_rng([seed, epoch, 4])
    return np.concatenate([draw.permutation(distinct) for _ in range(-(-count // distinct))])[:count]
