"""Choosing by the scorer and the LLM together: score + weight * mean log-probability per token. No model, no Ray, no files.

The scorer knows what right answers look like, the LLM what it finds likely; they err on different instructions. The weight,
in units of label per nat, comes from a grid and is chosen on train rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from generation.dataset import explode
from training.validation import Floats, log_probabilities, scores_by_row

WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""The grid. 0 is the scorer alone."""

EMPTY_TALLY = np.zeros(1 + len(WEIGHTS))
"""The tally of no rows."""


def blend_scores(scores_C: Floats, mean_logprobs_C: Floats, weight: float) -> Floats:
    """Return what candidates are chosen by, highest first: scores plus `weight` times their mean log-probability in nats per token."""
    return scores_C + weight * mean_logprobs_C


def tally_picks(table: pa.Table, score: Callable[[Sequence[str], Sequence[str]], Floats]) -> np.ndarray:
    """Return how many rows can be blended and, for each of `WEIGHTS`, the sum of the labels of their picks; adds up over tables.

    Rows without sampled candidates, or with one whose log-probability or tokens are not known, are left out.
    """
    rows = table.select(["candidates"]).to_pylist()
    pairs = explode(table)
    scores = np.asarray(score(pairs.instructions, pairs.responses), np.float64)
    sums = EMPTY_TALLY.copy()
    for row, score_of in zip(rows, scores_by_row(len(rows), pairs, scores), strict=True):
        sampled = [each for each in row["candidates"] if each["source"] == "sampled"]
        _, means_C = log_probabilities(sampled)
        if not sampled or means_C is None:
            continue
        labels_C = np.array([each["label"] for each in sampled])
        scores_C = np.array([score_of[each["response"]] for each in sampled])
        sums[0] += 1
        sums[1:] += [labels_C[blend_scores(scores_C, means_C, weight).argmax()] for weight in WEIGHTS]
    return sums


def fit_weight(tally: np.ndarray) -> float | None:
    """Return the weight whose picks have the highest labels, the smallest of equals; None where no row can be blended."""
    return WEIGHTS[int(tally[1:].argmax())] if tally[0] else None


def mean_label(tally: np.ndarray, weight: float | None) -> float | None:
    """Return the mean label of the picks at one of `WEIGHTS`; None where no row can be blended."""
    return None if weight is None or not tally[0] else float(tally[1 + WEIGHTS.index(weight)] / tally[0])
