"""The candidate pools of a suite, and the value of each method on them. Pure: no Ray, no files, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.config import LabelConfig
from evaluation.methods import Method, Rank, fitted_rank, rank_by, sampled_methods
from evaluation.statistics import Floats, Integers
from training.selection import Selection

Row = dict[str, Any]


@dataclass(frozen=True)
class Pools:
    """The rows of a suite with their candidates, and the scorers that score them."""

    rows: list[Row]
    folds: Integers
    """Fold of each row, [R]."""
    decodings: list[dict[str, Any]]
    label: LabelConfig
    selections: dict[tuple[str, int], Selection | None]
    """The selection of the scorer of each (task, fold)."""
    zero_shot: Selection | None
    """The selection of the zero-shot scorer."""
    models: tuple[str, ...]
    """The methods with a trained scorer."""
    rivals: Mapping[str, str] = field(default_factory=dict)
    """The titles of the methods of other papers, by field of the candidates."""

    def methods(self, task: str, fold: int) -> list[Method]:
        """Return the methods for the rows of a task in a fold."""
        return sampled_methods(self.decodings, self.label, {name: self._rank(name, task, fold) for name in self.models}, self.rivals)

    def _rank(self, name: str, task: str, fold: int) -> Rank:
        if name == "scorer_fitted":
            return fitted_rank(self.zero_shot, "scorer")
        if name == "fitted_no_scorer":
            return fitted_rank(self.selections[task, fold], None)
        return fitted_rank(self.selections[task, fold], "adapted") if name == "fitted" else rank_by(name)


def pool_values(
    pools: Pools, rows: Sequence[Row], folds_R: Integers, candidates: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Floats]:
    """Return the value of each method on each row, [R], for the given candidates of the rows."""
    cache: dict[tuple[str, int], list[Method]] = {}
    found: dict[str, list[float]] = {}
    for row, fold, pool in zip(rows, folds_R.tolist(), candidates, strict=True):
        key = (row["dataset"], fold)
        if key not in cache:
            cache[key] = pools.methods(*key)
        labels_C = np.asarray([each["label"] for each in pool], np.float64)
        for method in cache[key]:
            found.setdefault(method.name, []).append(method.value(row["instruction"], pool, labels_C))
    return {name: np.asarray(values, np.float64) for name, values in found.items()}
