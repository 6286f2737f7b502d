"""Choose candidates by score + weight * mean log-probability per token of the LLM. No model, no Ray, no files.

The scorer and the LLM err on different instructions. The weight, in units of score per nat, is chosen from a grid on train rows.

Shapes: C sampled candidates of one instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from generation.dataset import explode
from training.validation import Floats, log_probabilities, scores_by_row

WEIGHTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""The grid of weights. With 0 the score alone decides."""

EMPTY_TALLY = np.zeros(1 + len(WEIGHTS))
"""The tally of no rows."""


def blend_scores(scores_C: Floats, mean_logprobs_C: Floats, weight: float) -> Floats:
    """Return scores plus `weight` times the mean log-probability in nats per token. The highest value is the pick."""
    return scores_C + weight * mean_logprobs_C


def tally_picks(table: pa.Table, score: Callable[[Sequence[str], Sequence[str]], Floats]) -> np.ndarray:
    """Return a tally of a table's rows: their number, then for each of `WEIGHTS` the sum of the labels of the picks.

    Tallies add up over tables. Rows without sampled candidates are skipped, and so are rows with a candidate whose log-probability
    or number of tokens is unknown. float64 (1 + weights,).
    """
    rows = table.select(["candidates"]).to_pylist()
    pairs = explode(table)
    scores = np.asarray(score(pairs.instructions, pairs.responses), np.float64)
    tally = EMPTY_TALLY.copy()
    for row, score_of in zip(rows, scores_by_row(len(rows), pairs, scores), strict=True):
        sampled = [each for each in row["candidates"] if each["source"] == "sampled"]
        _, means_C = log_probabilities(sampled)
        if not sampled or means_C is None:
            continue
        labels_C = np.array([each["label"] for each in sampled])
        scores_C = np.array([score_of[each["response"]] for each in sampled])
        tally[0] += 1
        tally[1:] += [labels_C[blend_scores(scores_C, means_C, weight).argmax()] for weight in WEIGHTS]
    return tally


def fit_weight(tally: np.ndarray) -> float | None:
    """Return the weight whose picks have the highest labels, the smallest weight of equals. None for an empty tally."""
    return WEIGHTS[int(tally[1:].argmax())] if tally[0] else None


def mean_label(tally: np.ndarray, weight: float | None) -> float | None:
    """Return the mean label of the picks with one of `WEIGHTS`, in [0, 1]. None for an empty tally or no weight."""
    return None if weight is None or not tally[0] else float(tally[1 + WEIGHTS.index(weight)] / tally[0])
