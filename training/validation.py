"""Metrics of scores against labels: error, rank agreement, selection and calibration. No model, no Ray, no files.

`measure_scores` returns sums, which add up exactly over batches and workers. `ValidationSums.metrics` turns them into metrics. The
means are over instructions, not over tasks: `cappy evaluate` averages over tasks and adds confidence intervals.

Shapes: C candidates of one instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from generation.dataset import Pairs, explode
from generation.logprobs import comparable_logprobs, mean_logprobs
from training.records import CalibrationGroup, Metrics

Floats = NDArray[np.floating]
Row = Mapping[str, Any]

METRICS: dict[str, Literal["lower", "higher"]] = {
    "mse": "lower",
    "spearman": "higher",
    "pairwise_accuracy": "higher",
    "selection": "higher",
    "accuracy": "higher",
}
"""The metrics that can select a checkpoint, and the direction that is better."""

_SUMS = ("pairs", "squared_errors", "ranked", "spearman", "ordered", "right")
# For each method two sums over instructions with sampled candidates: the instructions that allow it, and the labels of its picks.
_PICKS = ("selection", "random", "oracle", "greedy", "self_sum", "self_mean")
_CLASSIFIED = ("classified", "accurate")
# Calibration groups: tenths of the score from 0 to 1, one group below 0 and one from 1 up.
_EDGES = np.linspace(0, 1, 11)
_SIZE = len(_SUMS) + 2 * len(_PICKS) + len(_CLASSIFIED) + 3 * (len(_EDGES) + 1)


@dataclass(frozen=True)
class ValidationSums:
    """Sums over scored rows. They add up over batches and workers."""

    values: np.ndarray
    """float64 (sums,): the sums of `_SUMS`, `_PICKS`, `_CLASSIFIED` and of the calibration groups, in this order."""

    def __add__(self, other: ValidationSums) -> ValidationSums:
        return ValidationSums(self.values + other.values)

    def metrics(self) -> Metrics:
        """Return the metrics; None if no row allows one.

        - `pairs`: number of pairs.
        - `mse`: mean squared error between score and label.
        - `spearman`: Spearman's rank correlation within an instruction, mean over instructions, in [-1, 1].
        - `pairwise_accuracy`: share of candidate pairs in the right order, in [0, 1]; a tie in score counts half.
        - The mean label of the picked candidates over instructions with sampled candidates. `selection` picks the highest score,
          `random` any candidate (its expectation), `oracle` the highest label, `greedy` the candidate of the greedy decoding.
          `self_sum` and `self_mean` pick the highest sum and mean of log-probabilities.
        - `accuracy`: share of classification instructions whose best-scored choice is right.
        """
        pairs, errors, ranked, spearman, ordered, right = self.values[: len(_SUMS)].tolist()
        picks = self.values[len(_SUMS) :][: 2 * len(_PICKS)].reshape(-1, 2)
        classified, accurate = self.values[len(_SUMS) + 2 * len(_PICKS) :][: len(_CLASSIFIED)].tolist()
        selected = picks[0, 0]
        return {
            "pairs": int(pairs),
            "mse": errors / pairs if pairs else None,
            "spearman": spearman / ranked if ranked else None,
            "pairwise_accuracy": right / ordered if ordered else None,
            # Methods are comparable only over the same instructions, so a method that some of them do not allow is None.
            **{
                name: float(total / count) if count and count == selected else None
                for name, (count, total) in zip(_PICKS, picks, strict=True)
            },
            "accuracy": accurate / classified if classified else None,
        }

    def calibration(self) -> list[CalibrationGroup]:
        """Return the pairs grouped by score, lowest first, without empty groups."""
        groups = self.values[-3 * (len(_EDGES) + 1) :].reshape(-1, 3).tolist()
        return [{"count": int(count), "score": score / count, "label": label / count} for count, score, label in groups if count]


EMPTY_SUMS = ValidationSums(np.zeros(_SIZE))


def measure_scores(table: pa.Table, score: Callable[[Sequence[str], Sequence[str]], Floats], greedy: str | None = None) -> ValidationSums:
    """Score the candidates of a table of rows, each distinct response once, and compare the scores with the labels.

    Args:
        table: rows with columns `instruction` and `candidates`.
        score: takes instructions and responses, returns a score for each pair.
        greedy: name of the greedy decoding, or None.
    """
    pairs = explode(table)
    scores = np.asarray(score(pairs.instructions, pairs.responses), np.float64)
    sums = _sum_over_pairs(scores, pairs.labels, pairs.groups)
    picks = np.zeros((len(_PICKS), 2))
    classified = np.zeros(2)
    for row, score_of in zip(table.select(["candidates"]).to_pylist(), scores_by_row(len(table), pairs, scores), strict=True):
        sampled = [each for each in row["candidates"] if each["source"] == "sampled"]
        if sampled:
            picks += _labels_of_picks(sampled, np.array([score_of[each["response"]] for each in sampled]), greedy)
        elif any(each["source"] == "choice" for each in row["candidates"]):
            best = max(row["candidates"], key=lambda each: score_of[each["response"]])
            classified += 1, best["label"] == 1
    groups = np.searchsorted(_EDGES, scores, side="right")
    calibration = np.zeros((len(_EDGES) + 1, 3))
    np.add.at(calibration, groups, np.stack([np.ones_like(scores), scores, pairs.labels], axis=1))
    return ValidationSums(np.concatenate([sums, picks.ravel(), classified, calibration.ravel()]))


def scores_by_row(rows: int, pairs: Pairs, scores: Floats) -> Iterator[dict[str, float]]:
    """Yield the scores of each row by response. `pairs` are the pairs of a table with `rows` rows."""
    by_row: list[dict[str, float]] = [{} for _ in range(rows)]
    for row, response, value in zip(pairs.groups.tolist(), pairs.responses, scores.tolist(), strict=True):
        by_row[row][response] = value
    yield from by_row


def _labels_of_picks(sampled: Sequence[Row], scores_C: Floats, greedy: str | None) -> Floats:
    """Return (1, label of the pick) for each method of `_PICKS`, or (0, 0) where the candidates do not allow it; (methods, 2)."""
    labels_C = np.array([each["label"] for each in sampled], np.float64)
    logprobs_C, means_C = log_probabilities(sampled)
    first_greedy = next((at for at, each in enumerate(sampled) if greedy is not None and each["decoding"] == greedy), None)
    picked: list[float | None] = [
        labels_C[scores_C.argmax()],
        labels_C.mean(),
        labels_C.max(),
        None if first_greedy is None else labels_C[first_greedy],
        None if logprobs_C is None else labels_C[logprobs_C.argmax()],
        None if means_C is None else labels_C[means_C.argmax()],
    ]
    return np.array([(0.0, 0.0) if label is None else (1.0, label) for label in picked])


def log_probabilities(sampled: Sequence[Row]) -> tuple[Floats | None, Floats | None]:
    """Return the log-probabilities of candidates in nats, (C,): the sum and the mean per token.

    None if one of them is unknown, or if the candidates are of several LLMs: these are not comparable.
    """
    values = comparable_logprobs(sampled)
    if None in values:
        return None, None
    sums_C = np.array(values, np.float64)
    if any(each["tokens"] is None for each in sampled):
        return sums_C, None
    return sums_C, mean_logprobs(sums_C, [each["tokens"] for each in sampled])


def _sum_over_pairs(scores: Floats, labels: Floats, groups: np.ndarray) -> Floats:
    """Return the sums of `_SUMS`. Arguments are (pairs,). Ranks are compared within a group whose labels differ."""
    errors = float(np.square(scores - labels).sum())
    ranked = spearman = ordered = right = 0.0
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        correlation, pairs, in_order = rank_agreement(scores[rows], labels[rows])
        if pairs:
            ranked += 1
            spearman += correlation
            ordered += pairs
            right += in_order
    return np.array([len(scores), errors, ranked, spearman, ordered, right])


def rank_agreement(scores_C: Floats, labels_C: Floats) -> tuple[float, int, float]:
    """Compare the order of one instruction's candidates by score and by label.

    Returns Spearman's rank correlation, the number of candidate pairs with different labels, and how many of them are in the right
    order by score. Equal values share their average rank; a tie in score counts half. The correlation is 0 when all scores or all
    labels are equal. With equal labels there is no pair.
    """
    above_scores, above_labels = (np.sign(np.subtract.outer(each, each)) for each in (scores_C, labels_C))
    differ = above_labels != 0
    right = float(((1 + above_scores * above_labels) / 2)[differ].sum()) / 2  # the matrix has each pair twice
    # The sum of signs over the others is twice the average rank, centred at zero.
    ranks_scores, ranks_labels = above_scores.sum(axis=1), above_labels.sum(axis=1)
    norm = float(np.sqrt((ranks_scores**2).sum() * (ranks_labels**2).sum()))
    return (float(ranks_scores @ ranks_labels) / norm if norm else 0.0), int(differ.sum()) // 2, right


def is_better(metric: str, value: float | None, best: float | None) -> bool:
    """Return whether `value` of a metric of `METRICS` is better than `best`. A value is better than None."""
    if value is None or best is None:
        return value is not None
    return value < best if METRICS[metric] == "lower" else value > best
