"""How well a scorer does on labelled candidates, from arrays alone: pure numpy, no model, no Ray, no files.

`measure` gives sums that add up exactly over batches and workers; `Fit.metrics` turns them into figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Fit:
    """How well scores fit labels, as sums that add up over batches and workers."""

    sums: np.ndarray
    """float64 (6,): pairs, squared errors, instructions ranked, their Spearman sum, ordered pairs of candidates, those right."""

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.sums + other.sums)

    def metrics(self) -> dict[str, float | None]:
        """`mse`; `spearman` (within instruction, mean, in [-1, 1]); `pairwise_accuracy` (in [0, 1], ties in score half right)."""
        pairs, errors, ranked, spearman, ordered, right = self.sums.tolist()
        return {
            "pairs": int(pairs),
            "mse": errors / pairs if pairs else None,
            "spearman": spearman / ranked if ranked else None,
            "pairwise_accuracy": right / ordered if ordered else None,
        }


NOTHING = Fit(np.zeros(6))


def measure(scores: Floats, labels: Floats, groups: np.ndarray) -> Fit:
    """Compare scores with labels; rank only within an instruction (`groups`), and only where its labels differ.

    All three arrays are (pairs,).
    """
    errors = float(np.square(scores.astype(np.float64) - labels).sum())
    ranked = spearman = ordered = right = 0.0
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        correlation, here, won = rank_agreement(scores[rows], labels[rows])
        if here:
            ranked += 1
            spearman += correlation
            ordered += here
            right += won
    return Fit(np.array([len(scores), errors, ranked, spearman, ordered, right]))


def rank_agreement(scores_C: Floats, labels_C: Floats) -> tuple[float, int, float]:
    """Return Spearman's rank correlation of one instruction's scores, its pairs of candidates of different labels, those right.

    Equal values share their average rank; equal scores are half right. Constant scores have correlation 0, and so have
    constant labels, which leave nothing to rank: no pair.
    """
    above_scores, above_labels = (np.sign(np.subtract.outer(each, each)) for each in (scores_C, labels_C))
    differ = above_labels != 0
    right = float(((1 + above_scores * above_labels) / 2)[differ].sum()) / 2  # each pair stands there twice
    # The sum of signs over the others is twice the average rank, centred at zero.
    ranks_scores, ranks_labels = above_scores.sum(axis=1), above_labels.sum(axis=1)
    norm = float(np.sqrt((ranks_scores**2).sum() * (ranks_labels**2).sum()))
    return (float(ranks_scores @ ranks_labels) / norm if norm else 0.0), int(differ.sum()) // 2, right
