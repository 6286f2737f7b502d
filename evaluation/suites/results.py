"""The results of a suite from the values of each method on each row. Pure: no Ray, no files, no model.

Letters in names of arrays are those of `statistics`: R rows, M methods, T tasks, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import CappyError
from evaluation import statistics
from evaluation.methods import Method
from evaluation.statistics import Floats, Integers

BEST = "best_baseline"
"""The baseline that is best on average on the train rows of a row's task and fold. Its value is that baseline's value on the row."""
MIN_TASK_ROWS = 50
"""Tasks with fewer rows are not counted in `not_below`."""


@dataclass(frozen=True)
class Values:
    """The values of all methods on the rows that all of them can rank."""

    rows: Integers
    """Positions of these rows among the given ones, [R]."""
    by_method: dict[str, Floats]
    """Expected label of the selected candidate, in [0, 1], [R], by method in display order."""
    left_out: dict[str, str]
    """Methods that no row allows, with the reason."""


def complete_values(methods: Sequence[Method], by_method: Mapping[str, Floats]) -> Values:
    """Return the values without methods that no row allows, on the rows that all other methods allow.

    `by_method` has NaN where a method cannot rank a row. Raises `CappyError` if no row is left.
    """
    kept = {each.name: by_method[each.name] for each in methods if not np.isnan(by_method[each.name]).all()}
    left_out = {each.name: "no row has a field that it reads" for each in methods if each.name not in kept}
    complete = ~np.isnan(np.stack(list(kept.values()))).any(axis=0)
    if not complete.any():
        raise CappyError(f"no row has candidates for all of {', '.join(kept)}; generate the set with one sampler config")
    return Values(np.flatnonzero(complete), {name: values[complete] for name, values in kept.items()}, left_out)


def best_baseline_values(
    baselines: Mapping[str, Floats], tasks_R: Integers, folds_R: Integers
) -> tuple[Floats, dict[tuple[int, int], str]]:
    """Return the values of the best baseline on each row, [R], and its name by (task, fold).

    The rows of a task in the other folds are the train rows of a fold: they choose its baseline, never the rows that report.
    """
    names = list(baselines)
    values_RM = np.stack([baselines[name] for name in names], axis=1)
    chosen_R = np.empty(len(tasks_R))
    chosen: dict[tuple[int, int], str] = {}
    for task, fold in sorted(set(zip(tasks_R.tolist(), folds_R.tolist(), strict=True))):
        rows = (tasks_R == task) & (folds_R == fold)
        train = (tasks_R == task) & (folds_R != fold)
        best = int(values_RM[train if train.any() else rows].mean(axis=0).argmax())
        chosen_R[rows] = values_RM[rows, best]
        chosen[task, fold] = names[best]
    return chosen_R, chosen


def compare(
    by_method: Mapping[str, Floats],
    roles: Mapping[str, str],
    names: Sequence[str],
    tasks_R: Integers,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Compare methods on the rows of some tasks.

    Args:
        by_method: value of each method on each row, in [0, 1], [R].
        roles: `baseline`, `ours` or `oracle`, by method.
        names: the tasks.
        tasks_R: number of the task of each row.
        resamples: number of bootstrap resamples.
        confidence: level of the intervals.
        seed: seed of the resamples.

    Returns these keys. All figures are in points (0 to 100), averages over tasks with equal weights:

    - `averages`: by method; the interval is over rows within tasks.
    - `per_task`: the same for each task, with `gains` and outcomes of trained methods against each baseline.
    - `gains`: for each of trained methods and each baseline the paired difference. `low` and `high` resample rows within tasks,
      `low_tasks` and `high_tasks` resample tasks. `outcomes` counts rows; `tasks` counts tasks with a higher, equal or lower average;
      `not_below` counts the tasks with at least `MIN_TASK_ROWS` rows whose average is not below.
    - `oracle_gap`: for each of trained methods and each baseline (trained - baseline) / (oracle - baseline) of the averages, with both
      intervals; null if the oracle is not above the baseline.
    """
    methods = list(by_method)
    column = {method: index for index, method in enumerate(methods)}
    values_RM = np.stack([by_method[method] for method in methods], axis=1)
    points_TM = 100 * statistics.task_averages(values_RM, tasks_R)
    points_BTM = 100 * statistics.bootstrap(values_RM, tasks_R, resamples, seed)
    points_M, rows_BM = points_TM.mean(axis=0), points_BTM.mean(axis=1)
    tasks_BM = statistics.bootstrap_tasks(points_TM, resamples, seed)
    sizes_T = np.bincount(tasks_R, minlength=len(names))
    trained = [method for method in methods if roles[method] == "trained"]
    baselines = [method for method in methods if roles[method] == "baseline"]

    def estimate(mean: Floats | float, samples_B: Floats) -> dict[str, float]:
        low, high = statistics.interval(samples_B, confidence)
        return {"mean": float(mean), "low": float(low), "high": float(high)}

    def both(mean: Floats | float, of_rows_B: Floats, of_tasks_B: Floats) -> dict[str, float]:
        low, high = statistics.interval(of_tasks_B, confidence)
        return {**estimate(mean, of_rows_B), "low_tasks": float(low), "high_tasks": float(high)}

    def gain(method: str, baseline: str) -> dict[str, Any]:
        one, other = column[method], column[baseline]
        difference_T = points_TM[:, one] - points_TM[:, other]
        large = sizes_T >= MIN_TASK_ROWS
        return {
            **both(points_M[one] - points_M[other], rows_BM[:, one] - rows_BM[:, other], tasks_BM[:, one] - tasks_BM[:, other]),
            "outcomes": outcomes(values_RM[:, one] - values_RM[:, other]),
            "tasks": outcomes(difference_T),
            "not_below": {"tasks": int((difference_T[large] >= -1e-9).sum()), "of": int(large.sum()), "min_rows": MIN_TASK_ROWS},
        }

    def of_task(task: int) -> dict[str, Any]:
        rows_RM = values_RM[tasks_R == task]

        def task_gain(one: int, other: int) -> dict[str, Any]:
            samples_B = points_BTM[:, task, one] - points_BTM[:, task, other]
            found = estimate(points_TM[task, one] - points_TM[task, other], samples_B)
            return {**found, "outcomes": outcomes(rows_RM[:, one] - rows_RM[:, other])}

        return {
            "rows": len(rows_RM),
            "methods": {method: estimate(points_TM[task, index], points_BTM[:, task, index]) for method, index in column.items()},
            "gains": {method: {each: task_gain(column[method], column[each]) for each in baselines} for method in trained},
        }

    def share(method: str, baseline: str) -> dict[str, float] | None:
        used = [column[method], column[baseline], column["oracle"]]
        mean = statistics.gap_closed(*points_M[used])
        if np.isnan(mean):
            return None
        return both(mean, *(statistics.gap_closed(*samples_BM[:, used].T) for samples_BM in (rows_BM, tasks_BM)))

    return {
        "rows": len(tasks_R),
        "tasks": len(names),
        "averages": {method: estimate(points_M[column[method]], rows_BM[:, column[method]]) for method in methods},
        "per_task": {name: of_task(task) for task, name in enumerate(names)},
        "gains": {method: {baseline: gain(method, baseline) for baseline in baselines} for method in trained},
        "oracle_gap": {method: {baseline: share(method, baseline) for baseline in baselines} for method in trained}
        if "oracle" in column
        else {},
        "resamples": resamples,
        "confidence": confidence,
        "seed": seed,
    }


def outcomes(differences: Floats) -> dict[str, int]:
    """Return the numbers of positive, zero and negative differences; differences below 1e-9 count as zero."""
    wins, losses = int((differences > 1e-9).sum()), int((differences < -1e-9).sum())
    return {"wins": wins, "ties": len(differences) - wins - losses, "losses": losses}
