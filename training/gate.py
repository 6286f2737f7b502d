"""The gate of `cappy adapt`: compare the base and the adapted scorer, and decide. No torch, no Ray, no files.

The comparison is the cross-validation on the train rows (`training.cross_fit`). For each row, a scorer and a selection that were fitted
without it pick a candidate. Its label is compared with that of the pick of the base. The scorer is published when the mean gain is above
0 and at least `adapt.min_gain`. If a selection fitted to the scores of the base picks better, the base is published with this selection.
The interval is reported and does not decide: `python -m benchmarks.gate` shows that a rule on its lower end rejects most scorers that
gain, and costs more points than it saves. With `adapt.folds: 0` the mean on a share of the validation rows decides.

Shapes: C candidates of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config import AdaptConfig
from generation.logprobs import comparable_logprobs
from training.records import GateDecision, Metrics, TaskPoints
from training.selection import Pool, Selection
from training.validation import Floats, Row, rank_agreement

CONFIDENCE = 0.8
_NORMAL_QUANTILE = 1.2816  # of 0.9, so that 80 % are within +- that many standard errors


def row_values(rows: pa.Table, scores: Sequence[Floats], metric: str, fitted: Selection | None = None) -> Floats:
    """Return the metric of each row, float64 (rows,) in [0, 1]; NaN for a row that does not allow it.

    `selection` is the label of the sampled candidate that `fitted` picks, or of the one with the best score. In a row with answer
    choices only, it is 1 if the choice with the best score is right, else 0. `pairwise_accuracy` is the share of candidate pairs that
    the scores have in the right order, ties counted half.

    Args:
        rows: rows with column `candidates`.
        scores: the scores of the candidates of each row, (C,), as `cross_fit` returns them.
        metric: `selection` or `pairwise_accuracy`.
        fitted: the selection of the scorer; None picks by score.
    """
    columns = zip(rows["instruction"].to_pylist(), rows["candidates"].to_pylist(), scores, strict=True)
    if metric == "selection":
        return np.array([_selection(instruction, row, scores_C, fitted) for instruction, row, scores_C in columns], np.float64)
    return np.array([_pairwise_accuracy(row, scores_C) for _, row, scores_C in columns], np.float64)


def decide_on_rows(before: Floats, after: Floats, settings: AdaptConfig, base_fitted: Floats | None = None) -> GateDecision:
    """Return the decision on the paired values of train rows, (rows,) each, as `row_values` returns them.

    The adapted weights pass if they gain and are better than the base with a fitted selection. If they do not pass, the base passes if it
    gains by the fitted selection. The interval is mean +- 1.28 standard errors of the paired differences; it is None for one row.

    Args:
        before: the values of the base.
        after: those of the scorers and selections of the folds.
        base_fitted: those of the base with the selections of the folds; None without one.
    """
    adapted = _compare(before, after, settings)
    if base_fitted is None:
        return adapted
    base = _compare(before, base_fitted, settings)
    if base["passed"] and not (adapted["passed"] and adapted["after"] > base["after"]):  # type: ignore[operator]
        return {**base, "weights": "base"}
    return adapted


def _compare(before: Floats, after: Floats, settings: AdaptConfig) -> GateDecision:
    """Return the comparison over the rows that have both values."""
    both = np.isfinite(before) & np.isfinite(after)
    gains = 100 * (after[both] - before[both])
    rows = len(gains)
    if not rows:
        return {"metric": settings.metric, "before": None, "after": None, "gain": None, "passed": False, "rows": 0, "split": "train"}
    gain = float(gains.mean())
    reach = _NORMAL_QUANTILE * float(gains.std(ddof=1)) / math.sqrt(rows) if rows > 1 else None
    return {
        "metric": settings.metric,
        "before": 100 * float(before[both].mean()),
        "after": 100 * float(after[both].mean()),
        "gain": gain,
        "passed": _passes(gain, settings),
        "rows": rows,
        "split": "train",
        "folds": settings.folds,
        "low": None if reach is None else gain - reach,
        "high": None if reach is None else gain + reach,
        "confidence": CONFIDENCE,
    }


def decide_gate(before: Metrics, after: Metrics, settings: AdaptConfig) -> GateDecision:
    """Return the decision on the metrics of the base and of the adapted scorer on the gate's validation rows.

    The gain is None, and does not pass, when the rows have no candidates with different labels.
    """
    old, new = _points(before, settings.metric), _points(after, settings.metric)
    gain = None if old is None or new is None else new - old
    return {"metric": settings.metric, "before": old, "after": new, "gain": gain, "passed": gain is not None and _passes(gain, settings)}


def split_validation_rows(rows: pa.Table, fraction: float) -> tuple[pa.Table, pa.Table]:
    """Split validation rows into the rows of the gate, the first `fraction`, and the rows of the reported results.

    The rows are already in the order of a hash. When the gate takes all rows, both parts are all rows.
    """
    deciding = math.ceil(fraction * len(rows))
    return rows[:deciding], rows[deciding:] if deciding < len(rows) else rows


def summarise_points(before: Metrics, after: Metrics, fitted: Floats | None = None) -> TaskPoints:
    """Return the reported results from the metrics of the base and of the adapted scorer.

    `fitted` has the values of the picks of the published selection, (rows,), as `row_values` returns them.
    """
    known = fitted[np.isfinite(fitted)] if fitted is not None else np.empty(0)
    return {
        "before": _points(before, "selection"),
        "after": _points(after, "selection"),
        "fitted": 100 * float(known.mean()) if len(known) else None,
        "random": _points(after, "random"),
        "self": _points(after, "self_mean"),
        "oracle": _points(after, "oracle"),
        "pairwise_accuracy": {"before": _points(before, "pairwise_accuracy"), "after": _points(after, "pairwise_accuracy")},
    }


def _passes(gain: float, settings: AdaptConfig) -> bool:
    return gain > 0 and gain >= settings.min_gain


def _selection(instruction: str, candidates: Sequence[Row], scores_C: Floats, fitted: Selection | None) -> float:
    sampled = [index for index, each in enumerate(candidates) if each["source"] == "sampled"]
    if sampled:
        values_C: NDArray[np.float64] = scores_C[sampled].astype(np.float64)
        if fitted is not None:
            kept = [candidates[index] for index in sampled]
            fields = {name: [each[name] for each in kept] for name in ("response", "tokens")}
            values_C = fitted.rank(Pool(fields["response"], values_C, comparable_logprobs(kept), fields["tokens"], instruction))
        return float(candidates[sampled[int(values_C.argmax())]]["label"])
    if any(each["source"] == "choice" for each in candidates):
        return float(candidates[int(scores_C.argmax())]["label"] == 1)
    return math.nan


def _pairwise_accuracy(candidates: Sequence[Row], scores_C: Floats) -> float:
    labels: dict[str, float] = {}
    score_of: dict[str, float] = {}
    for each, score in zip(candidates, scores_C.tolist(), strict=True):
        labels[each["response"]] = max(each["label"], labels.get(each["response"], 0.0))
        score_of[each["response"]] = score
    _, pairs, right = rank_agreement(np.array(list(score_of.values())), np.array(list(labels.values())))
    return right / pairs if pairs else math.nan


def _points(metrics: Metrics, name: str) -> float | None:
    """Return a metric in points (0 to 100). For a task with answer choices only, `selection` is the accuracy."""
    value = metrics["accuracy"] if name == "selection" and metrics["selection"] is None else metrics[name]
    return None if value is None else 100 * value
