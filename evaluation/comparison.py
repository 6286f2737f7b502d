"""Compare methods of picking one of an instruction's candidates: from scored rows to results. Pure: no Ray, no files.

A row is a row of the regression set, with only the sampled candidates in `candidates`. In a scored row every candidate also has a
`score`. Letters in names of arrays are those of `statistics`: R rows, C candidates (padded), M methods, T tasks, B resamples, K pool
sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.config import EvaluationConfig, LabelConfig
from cluster.errors import CappyError
from evaluation import statistics
from evaluation.statistics import Booleans, Floats, Integers
from generation.logprobs import are_of_several_llms, comparable_logprobs, mean_logprobs
from training.consensus import DEFAULT_METRIC, consensus
from training.selection import Pool, Selection, signals
from training.validation import rank_agreement

BASELINES = ("greedy", "sample", "self_sum", "self_mean", "consensus")
"""Methods without a scorer: the greedy candidate, one sample, the highest sum or mean of log-probabilities, the highest mean agreement
with the other candidates (`training.consensus`)."""
NO_SCORER = "fitted_no_scorer"
METHODS = (*BASELINES, "scorer", "blend", NO_SCORER, "fitted", "oracle")
"""All methods in display order. `blend` adds the LLM's log-probability to the scorer's score (`training.blend`). `fitted` ranks by the
fitted selection of the scorer (`training.selection`), and `fitted_no_scorer` by its variants without the score, so the difference of the
two is the contribution of the scorer."""
_CURVE_POINTS = 32
_CALIBRATION_BINS = 10

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison."""

    results: dict[str, Any]
    """JSON values; Rouge-L in points, 0 to 100. See `compare_methods`."""
    picks: dict[str, Integers]
    """Index of the picked candidate, [R], by method."""


@dataclass(frozen=True)
class Baselines:
    """The picks of the baselines on the rows that all of them can use."""

    rows: list[Row]
    picks: dict[str, Integers]
    """Index of the picked candidate, [R], by baseline."""
    left_out: dict[str, str]
    """Baselines that no row allows, with the reason."""
    incomplete: int
    """Number of rows left out because a baseline of `picks` has no candidate there."""


def pick_baselines(rows: Sequence[Row], decodings: Sequence[Mapping[str, Any]], metric: LabelConfig = DEFAULT_METRIC) -> Baselines:
    """Pick a candidate of every row by each baseline.

    The greedy baseline takes the decoding with temperature 0. The sample baseline takes the first candidate of the first decoding
    above 0. A baseline is left out if no row allows it (no such decoding, no log-probabilities). So are the self-scores if a row has
    candidates of several LLMs. A row is left out if one of the remaining baselines has no candidate there, so that all methods are
    compared on the same rows.

    Args:
        rows: the rows.
        decodings: the decodings of the set's sampler, with `name` and `temperature`.
        metric: the metric that compares two responses in the consensus.

    Raises `CappyError` if no row is left.
    """
    greedy = next((each["name"] for each in decodings if each["temperature"] == 0), None)
    sampling = next((each["name"] for each in decodings if each["temperature"] > 0), None)
    logprobs_RC, present_RC = pad_field(rows, "logprob")
    tokens_RC, _ = pad_field(rows, "tokens")
    several_llms = any(are_of_several_llms(row["candidates"]) for row in rows)
    known_R = ~(np.isnan(logprobs_RC) & present_RC).any(axis=1) & (not several_llms)
    sized_R = known_R & ~(np.isnan(tokens_RC) & present_RC).any(axis=1)
    picks = {
        "greedy": _first_of(rows, greedy),
        "sample": _first_of(rows, sampling),
        "self_sum": np.where(known_R, statistics.pick_best(logprobs_RC, present_RC), -1),
        "self_mean": np.where(sized_R, statistics.pick_best(mean_logprobs(logprobs_RC, tokens_RC), present_RC), -1),
        "consensus": np.array([consensus(responses(row), metric).argmax() for row in rows], np.int64),
    }
    missing = {
        "greedy": f"no candidate of a decoding with temperature 0 (decodings: {', '.join(each['name'] for each in decodings)})",
        "sample": f"no candidate of a decoding with temperature above 0 (decodings: {', '.join(each['name'] for each in decodings)})",
        "self_sum": "the candidates have no log-probabilities",
        "self_mean": "the candidates have no log-probabilities or token counts",
    }
    if several_llms:
        missing |= dict.fromkeys(
            ("self_sum", "self_mean"), "the candidates are of several LLMs, whose log-probabilities are not comparable"
        )
    left_out = {name: reason for name, reason in missing.items() if (picks[name] < 0).all()}
    possible = {name: picks[name] for name in BASELINES if name not in left_out}
    keep = np.stack(list(possible.values())).min(axis=0) >= 0
    if not keep.any():
        raise CappyError(f"no row has candidates for all of {', '.join(possible)}; generate the set with one sampler config")
    kept = [row for row, wanted in zip(rows, keep, strict=True) if wanted]
    return Baselines(kept, {name: each[keep] for name, each in possible.items()}, left_out, int((~keep).sum()))


def responses(row: Row) -> list[str]:
    """Return the responses of the candidates of a row."""
    return [each["response"] for each in row["candidates"]]


def pool_of(row: Row) -> Pool:
    """Return the candidates of a scored row as a pool."""
    fields = {name: [each[name] for each in row["candidates"]] for name in ("score", "tokens")}
    return Pool(responses(row), fields["score"], comparable_logprobs(row["candidates"]), fields["tokens"], row["instruction"])


def pick_selected(rows: Sequence[Row], selections: Sequence[Selection | None], scored: bool = True) -> Integers | None:
    """Return the index of the candidate that the selection of each scored row picks, [R]; where it is None the highest score is picked.

    With `scored=False` the selections do not see the scores, and where one is None the highest consensus is picked.

    Returns None if no selection has a variant for the signals of its row.
    """
    pools = [pool_of(row) if scored else replace(pool_of(row), scores=None) for row in rows]
    usable = any(each and each.variant(signals(pool, each.metric)) for pool, each in zip(pools, selections, strict=True))
    unfitted = Selection(())  # picks by score or consensus
    picks = [int((each or unfitted).rank(pool).argmax()) for pool, each in zip(pools, selections, strict=True)] if usable else []
    return np.array(picks, np.int64) if usable else None


def _first_of(rows: Sequence[Row], decoding: str | None) -> Integers:
    """Return the index of each row's first candidate of a decoding, [R]; -1 if it has none."""
    indices = [next((index for index, each in enumerate(row["candidates"]) if each["decoding"] == decoding), -1) for row in rows]
    return np.asarray(indices if decoding else [-1] * len(rows), np.int64)


def pad_field(rows: Sequence[Row], field: str) -> tuple[Floats, Booleans]:
    """Return a numeric field of every candidate, [R, C], NaN if unknown or padding, and a mask of the real candidates, [R, C]."""
    sizes_R = np.asarray([len(row["candidates"]) for row in rows])
    present_RC = np.arange(sizes_R.max()) < sizes_R[:, None]
    values_RC = np.full(present_RC.shape, np.nan)
    values = [each[field] for row in rows for each in row["candidates"]]
    values_RC[present_RC] = np.asarray([np.nan if value is None else value for value in values], np.float64)
    return values_RC, present_RC


def compare_methods(
    rows: Sequence[Row],
    baseline_picks: Mapping[str, Integers],
    settings: EvaluationConfig,
    seed: int,
    selections: Mapping[str, Sequence[Selection | None]] | None = None,
) -> Comparison:
    """Compare the picks by `score` with those of the baselines and the oracle on scored rows.

    `selections` are further methods, `blend`, `fitted_no_scorer` and `fitted`: the selection of each row, [R]. See `pick_selected`.

    Keys of `results`, all Rouge-L in points (0 to 100) with bootstrap intervals:

    - `averages`: mean over tasks, by method.
    - `per_task`: the same for each task; `gains` of the scorer and each further method over the best baseline.
    - `best_baseline`: the baseline with the highest average.
    - `gain`: scorer minus that baseline, paired by row.
    - `gains`: the same for the scorer and each further method against each baseline, and for `fitted` against `fitted_no_scorer`.
    - `gap_closed`: the share of the oracle's lead over that baseline that the scorer gains; null without a lead.
    - `outcomes`: rows that the scorer wins, ties and loses against that baseline.
    - `curves`: average against the number of candidates.
    - `quality` and `calibration`: agreement of the scores with Rouge-L.
    """
    labels_RC, present_RC = pad_field(rows, "label")
    scores_RC, _ = pad_field(rows, "score")
    picks = {
        **baseline_picks,
        "scorer": statistics.pick_best(scores_RC, present_RC),
    }
    for method, each in (selections or {}).items():
        selected = pick_selected(rows, each, scored=method != NO_SCORER)
        if selected is not None:
            picks[method] = selected
    trained = [method for method in picks if method not in baseline_picks]
    picks["oracle"] = statistics.pick_best(labels_RC, present_RC)
    methods = list(picks)
    values_RM = np.stack([labels_RC[np.arange(len(rows)), picks[method]] for method in methods], axis=1)
    names, tasks_R = np.unique([row["dataset"] for row in rows], return_inverse=True)
    points_TM = 100 * statistics.task_averages(values_RM, tasks_R)
    points_BTM = 100 * statistics.bootstrap(values_RM, tasks_R, settings.resamples, seed)
    points_M, points_BM = points_TM.mean(axis=0), points_BTM.mean(axis=1)

    column_of = {method: column for column, method in enumerate(methods)}
    best = max(baseline_picks, key=lambda method: points_M[column_of[method]])
    share = statistics.gap_closed(*(points_M[column_of[method]] for method in ("scorer", best, "oracle")))
    shares_B = statistics.gap_closed(*(points_BM[:, column_of[method]] for method in ("scorer", best, "oracle")))
    difference_R = values_RM[:, column_of["scorer"]] - values_RM[:, column_of[best]]
    quality_R = np.asarray([_quality(row) for row in rows])
    unique = [each for row in rows for each in _distinct(row)]
    results = {
        "instructions": len(rows),
        "tasks": len(names),
        "candidates": int(present_RC.sum()),
        "distinct_candidates": len(unique),
        "methods": methods,
        "averages": {
            method: _estimate(points_M[column], points_BM[:, column], settings.confidence) for column, method in enumerate(methods)
        },
        "per_task": {
            str(name): {
                "instructions": int((tasks_R == task).sum()),
                "methods": {
                    method: _estimate(points_TM[task, column], points_BTM[:, task, column], settings.confidence)
                    for column, method in enumerate(methods)
                },
                "gains": {
                    method: _estimate(
                        points_TM[task, column_of[method]] - points_TM[task, column_of[best]],
                        points_BTM[:, task, column_of[method]] - points_BTM[:, task, column_of[best]],
                        settings.confidence,
                    )
                    for method in trained
                },
                "quality": _average_quality(quality_R[tasks_R == task]),
            }
            for task, name in enumerate(names)
        },
        "best_baseline": best,
        "gain": _estimate(
            points_M[column_of["scorer"]] - points_M[column_of[best]],
            points_BM[:, column_of["scorer"]] - points_BM[:, column_of[best]],
            settings.confidence,
        ),
        "gains": {
            method: {
                baseline: _estimate(
                    points_M[column_of[method]] - points_M[column_of[baseline]],
                    points_BM[:, column_of[method]] - points_BM[:, column_of[baseline]],
                    settings.confidence,
                )
                for baseline in [*baseline_picks, *({NO_SCORER} & picks.keys() if method == "fitted" else ())]
            }
            for method in trained
        },
        "gap_closed": None if np.isnan(share) else _estimate(share, shares_B, settings.confidence),
        "outcomes": {
            "wins": int((difference_R > 0).sum()),
            "ties": int((difference_R == 0).sum()),
            "losses": int((difference_R < 0).sum()),
        },
        "quality": _average_quality(np.stack([_means(quality_R[tasks_R == task]) for task in range(len(names))])),
        "curves": _curves(rows, tasks_R, settings, seed),
        "calibration": statistics.calibration(
            np.asarray([each["score"] for each in unique], np.float64),
            np.asarray([each["label"] for each in unique], np.float64),
            _CALIBRATION_BINS,
        ),
        "confidence": settings.confidence,
        "resamples": settings.resamples,
        "seed": seed,
    }
    return Comparison(results, picks)


def _estimate(mean: Floats | float, samples_B: Floats, confidence: float) -> dict[str, float]:
    low, high = statistics.interval(samples_B, confidence)
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _distinct(row: Row) -> list[dict[str, Any]]:
    """Return the candidates of a row without repeated responses."""
    return list({each["response"]: each for each in reversed(row["candidates"])}.values())[::-1]


def _quality(row: Row) -> tuple[float, float, float]:
    """Return Spearman's correlation, pairwise accuracy and mean squared error of the scores of a row's distinct candidates.

    The first two are NaN if no two candidates differ in Rouge-L.
    """
    distinct = _distinct(row)
    scores = np.asarray([each["score"] for each in distinct], np.float64)
    labels = np.asarray([each["label"] for each in distinct], np.float64)
    spearman, pairs, right = rank_agreement(scores, labels)
    ranked = (spearman, right / pairs) if pairs else (float("nan"), float("nan"))
    return (*ranked, float(((scores - labels) ** 2).mean()))


def _means(quality_R: Floats) -> Floats:
    """Return the means of the columns of `_quality` over rows, without NaN values; NaN if a column has no other values."""
    known = ~np.isnan(quality_R)
    means = np.full(quality_R.shape[1], np.nan)
    np.divide(np.where(known, quality_R, 0).sum(axis=0), known.sum(axis=0), out=means, where=known.any(axis=0))
    return means


def _average_quality(quality_R: Floats) -> dict[str, float | None]:
    named = zip(("spearman", "pairwise_accuracy", "mse"), _means(quality_R), strict=True)
    return {name: None if np.isnan(value) else float(value) for name, value in named}


def _curves(rows: Sequence[Row], tasks_R: Integers, settings: EvaluationConfig, seed: int) -> dict[str, Any]:
    """Return the average points of picks from k random candidates of the pool, for several k; for the scorer with its interval."""
    labels_RC, present_RC = pad_field(rows, "label")
    scores_RC, _ = pad_field(rows, "score")
    logprobs_RC, _ = pad_field(rows, "logprob")
    tokens_RC, _ = pad_field(rows, "tokens")
    largest = labels_RC.shape[1]
    if largest > _CURVE_POINTS:
        sizes = sorted({round(size) for size in np.geomspace(1, largest, _CURVE_POINTS)})
    else:
        sizes = list(range(1, largest + 1))
    rankings = {
        "oracle": labels_RC,
        "scorer": scores_RC,
        "self_sum": logprobs_RC,
        "self_mean": mean_logprobs(logprobs_RC, tokens_RC),
    }
    curves: dict[str, Any] = {"k": sizes}
    for name, ranking_RC in rankings.items():
        if np.isnan(ranking_RC[present_RC]).any():
            continue  # no log-probabilities; `Baselines.left_out` has the reason
        expected_RK = statistics.expected_best_of_k(ranking_RC, labels_RC, present_RC, sizes)
        curves[name] = {"mean": (100 * statistics.macro_average(expected_RK, tasks_R)).tolist()}
        if name == "scorer":
            samples_BK = 100 * statistics.bootstrap(expected_RK, tasks_R, settings.resamples, seed).mean(axis=1)
            low_K, high_K = statistics.interval(samples_BK, settings.confidence)
            curves[name] |= {"low": low_K.tolist(), "high": high_K.tolist()}
    random_R = np.where(present_RC, labels_RC, 0).sum(axis=1) / present_RC.sum(axis=1)
    curves["random"] = {"mean": [float(100 * statistics.macro_average(random_R[:, None], tasks_R)[0])] * len(sizes)}
    return curves
