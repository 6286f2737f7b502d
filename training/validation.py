"""How well a scorer does on rows of a set: figures from scores, labels and log-probabilities. No model, no Ray, no files.

`measure` gives sums that add up exactly over batches and workers; `Fit.metrics` turns them into figures. Means are over
instructions, not over tasks: `cappy evaluate` averages over tasks and adds intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from generation.dataset import Pairs, explode
from generation.logprobs import mean_logprobs

Floats = NDArray[np.floating]
Row = Mapping[str, Any]

METRICS: dict[str, Literal["lower", "higher"]] = {
    "mse": "lower",
    "spearman": "higher",
    "pairwise_accuracy": "higher",
    "selection": "higher",
    "accuracy": "higher",
}
"""The figures a checkpoint can be chosen by, and which way is better."""

_SUMS = ("pairs", "squared_errors", "ranked", "spearman", "ordered", "right")
# Of instructions with sampled candidates: how many, and the labels of the picks; a method some of them do not allow has fewer.
_PICKS = ("selection", "random", "oracle", "greedy", "self_sum", "self_mean")
_CLASSIFIED = ("classified", "accurate")
# Scores in tenths from 0 to 1, one group below and one above.
_EDGES = np.linspace(0, 1, 11)
_SIZE = len(_SUMS) + 2 * len(_PICKS) + len(_CLASSIFIED) + 3 * (len(_EDGES) + 1)


@dataclass(frozen=True)
class ValidationSums:
    """How well scores fit labels, as sums that add up over batches and workers."""

    sums: np.ndarray
    """float64 (`NOTHING`'s size,)."""

    def __add__(self, other: ValidationSums) -> ValidationSums:
        return ValidationSums(self.sums + other.sums)

    def metrics(self) -> dict[str, float | None]:
        """Return the figures; null where no row allows one.

        `pairs`; `mse`; `spearman` (within instruction, mean, in [-1, 1]); `pairwise_accuracy` (in [0, 1], ties in score half
        right). Over instructions with sampled candidates, the mean label of the best-scored one, `selection`, and of `random`
        (its expectation), `oracle`, `greedy`, `self_sum` and `self_mean` (the likeliest, by sum and by mean log-probability).
        Over classification instructions, `accuracy`: the best-scored choice is right.
        """
        pairs, errors, ranked, spearman, ordered, right = self.sums[: len(_SUMS)].tolist()
        picks = self.sums[len(_SUMS) :][: 2 * len(_PICKS)].reshape(-1, 2)
        classified, accurate = self.sums[len(_SUMS) + 2 * len(_PICKS) :][: len(_CLASSIFIED)].tolist()
        selected = picks[0, 0]
        return {
            "pairs": int(pairs),
            "mse": errors / pairs if pairs else None,
            "spearman": spearman / ranked if ranked else None,
            "pairwise_accuracy": right / ordered if ordered else None,
            # A method that only some rows allow would be compared on other rows than the rest.
            **{
                name: float(total / count) if count and count == selected else None
                for name, (count, total) in zip(_PICKS, picks, strict=True)
            },
            "accuracy": accurate / classified if classified else None,
        }

    def calibration(self) -> list[dict[str, float]]:
        """Return the groups of pairs by score, lowest first, empty ones left out: `count`, mean `score`, mean `label`."""
        groups = self.sums[-3 * (len(_EDGES) + 1) :].reshape(-1, 3).tolist()
        return [{"count": int(count), "score": score / count, "label": label / count} for count, score, label in groups if count]


EMPTY_SUMS = ValidationSums(np.zeros(_SIZE))


def measure_scores(table: pa.Table, score: Callable[[Sequence[str], Sequence[str]], Floats], greedy: str | None = None) -> ValidationSums:
    """Score the candidates of a table of rows (`instruction`, `candidates`), each distinct response once, and compare with the labels.

    `score` takes instructions and responses, `greedy` is the name of the decoding without chance, if there is one.
    """
    pairs = explode(table)
    scores = np.asarray(score(pairs.instructions, pairs.responses), np.float64)
    sums = _compare(scores, pairs.labels, pairs.groups)
    picks = np.zeros((len(_PICKS), 2))
    classified = np.zeros(2)
    for row, score_of in zip(table.select(["candidates"]).to_pylist(), scores_by_row(len(table), pairs, scores), strict=True):
        sampled = [each for each in row["candidates"] if each["source"] == "sampled"]
        if sampled:
            picks += _pick_labels(sampled, np.array([score_of[each["response"]] for each in sampled]), greedy)
        elif any(each["source"] == "choice" for each in row["candidates"]):
            best = max(row["candidates"], key=lambda each: score_of[each["response"]])
            classified += 1, best["label"] == 1
    groups = np.searchsorted(_EDGES, scores, side="right")
    calibration = np.zeros((len(_EDGES) + 1, 3))
    np.add.at(calibration, groups, np.stack([np.ones_like(scores), scores, pairs.labels], axis=1))
    return ValidationSums(np.concatenate([sums, picks.ravel(), classified, calibration.ravel()]))


def scores_by_row(rows: int, pairs: Pairs, scores: Floats) -> Iterator[dict[str, float]]:
    """Yield each row's scores by response; `pairs` are those of a table of `rows` rows."""
    by_row: list[dict[str, float]] = [{} for _ in range(rows)]
    for row, response, value in zip(pairs.groups.tolist(), pairs.responses, scores.tolist(), strict=True):
        by_row[row][response] = value
    yield from by_row


def _pick_labels(sampled: Sequence[Row], scores_C: Floats, greedy: str | None) -> Floats:
    """Return (1, label of the pick) by each of `_PICKS`, or (0, 0) where the candidates do not allow it, [len(_PICKS), 2]."""
    labels_C = np.array([each["label"] for each in sampled], np.float64)
    logprobs_C, means_C = log_probabilities(sampled)
    first = next((at for at, each in enumerate(sampled) if greedy is not None and each["decoding"] == greedy), None)
    picked: list[float | None] = [
        labels_C[scores_C.argmax()],
        labels_C.mean(),
        labels_C.max(),
        None if first is None else labels_C[first],
        None if logprobs_C is None else labels_C[logprobs_C.argmax()],
        None if means_C is None else labels_C[means_C.argmax()],
    ]
    return np.array([(0.0, 0.0) if label is None else (1.0, label) for label in picked])


def log_probabilities(sampled: Sequence[Row]) -> tuple[Floats | None, Floats | None]:
    """Return the candidates' log-probabilities in nats, summed and per token; None where one of them is not known."""
    if any(each["logprob"] is None for each in sampled):
        return None, None
    sums_C = np.array([each["logprob"] for each in sampled], np.float64)
    if any(each["tokens"] is None for each in sampled):
        return sums_C, None
    return sums_C, mean_logprobs(sums_C, [each["tokens"] for each in sampled])


def _compare(scores: Floats, labels: Floats, groups: np.ndarray) -> Floats:
    """Return the sums of `_SUMS`; ranks are compared within a group only, and only where its labels differ. All are (pairs,)."""
    errors = float(np.square(scores - labels).sum())
    ranked = spearman = ordered = right = 0.0
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        correlation, here, won = rank_agreement(scores[rows], labels[rows])
        if here:
            ranked += 1
            spearman += correlation
            ordered += here
            right += won
    return np.array([len(scores), errors, ranked, spearman, ordered, right])


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


def is_better(metric: str, value: float | None, best: float | None) -> bool:
    """Return whether `value` of a metric of `METRICS` is better than the best so far; the first known value is."""
    if value is None or best is None:
        return value is not None
    return value < best if METRICS[metric] == "lower" else value > best
