"""The statistics of an evaluation: picks, averages over tasks, bootstrap intervals, best-of-k curves. Pure numpy: no Ray, no files.

Letters in names of arrays:

- R: instructions (rows).
- C: candidates of an instruction, padded to the longest; `present_RC` marks the real ones.
- M: methods or other columns.
- T: tasks.
- B: bootstrap resamples.
- K: pool sizes.

Rouge-L is in [0, 1] here; only displayed results are in points, 0 to 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

_DRAWS = 4_000_000  # row indices drawn per step, which limits their memory to 32 MB for a task of any size


def pick_best(scores_RC: Floats, present_RC: Booleans) -> Integers:
    """Return the index of the highest score of each row, [R]; of equal scores the first.

    Every row must have a candidate. With the scorer's scores this is the boosted decoding of the paper (Cappy, Tan et al. 2023). With
    log-probabilities it is the paper's self-score baseline.
    """
    return np.asarray(np.argmax(np.where(present_RC, scores_RC, -np.inf), axis=1), np.int64)


def task_averages(values_RM: Floats, tasks_R: Integers) -> Floats:
    """Return the mean of each column over the rows of each task, [T, M]; tasks are numbered 0 to T-1, each with at least one row."""
    sums_TM = np.zeros((int(tasks_R.max()) + 1, values_RM.shape[1]))
    np.add.at(sums_TM, tasks_R, values_RM)
    return sums_TM / np.bincount(tasks_R)[:, None]


def macro_average(values_RM: Floats, tasks_R: Integers) -> Floats:
    """Return the mean over tasks of the task averages, [M]: every task has the same weight, with any number of rows."""
    return np.asarray(task_averages(values_RM, tasks_R).mean(axis=0))


def bootstrap(values_RM: Floats, tasks_R: Integers, resamples: int, seed: int) -> Floats:
    """Return the task averages of `resamples` bootstrap samples, [B, T, M].

    Rows are drawn with replacement within each task: tasks keep their sizes and are fixed, not sampled from a population of tasks.
    All columns share the drawn rows, so differences between columns are paired. The draws of a task depend only on `seed` and the
    number of the task.
    """
    means_BTM = np.empty((resamples, int(tasks_R.max()) + 1, values_RM.shape[1]))
    for task in range(means_BTM.shape[1]):
        rows = values_RM[tasks_R == task]
        size = len(rows)
        rng = np.random.default_rng([seed, task])
        at_once = max(1, _DRAWS // size)
        for start in range(0, resamples, at_once):
            count = min(at_once, resamples - start)
            drawn = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
            times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
            means_BTM[start : start + count, task] = times @ rows / size
    return means_BTM


def bootstrap_tasks(points_TM: Floats, resamples: int, seed: int) -> Floats:
    """Return the averages over tasks of `resamples` bootstrap samples of the tasks, [B, M].

    Tasks are drawn with replacement from a population of tasks; the average of a task is taken as it is. The interval answers how the
    result would differ on other tasks of this kind, and `bootstrap` how it would differ on other rows of these tasks.
    """
    tasks = len(points_TM)
    drawn_BT = np.random.default_rng([seed, tasks]).integers(tasks, size=(resamples, tasks))
    return np.asarray(points_TM[drawn_BT].mean(axis=1))


def interval(samples_B: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Return the percentile interval (low, high) over the first axis; NaN samples are ignored.

    Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    low, high = np.nanquantile(samples_B, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def gap_closed(scorer: Floats, baseline: Floats, oracle: Floats) -> Floats:
    """Return (scorer - baseline) / (oracle - baseline): 0 is the baseline, 1 the oracle, a negative number a loss.

    NaN if the oracle is not better than the baseline: there is no gap to close.
    """
    gap = np.asarray(oracle - baseline, np.float64)
    return np.divide(scorer - baseline, gap, out=np.full_like(gap, np.nan), where=gap > 0)


def expected_best_of_k(scores_RC: Floats, values_RC: Floats, present_RC: Booleans, sizes: Sequence[int]) -> Floats:
    """Return the expected value of the pick by score from k random candidates of a row, [R, K], for each k in `sizes`.

    The value is exact, not sampled. Order the N candidates of a row by score, best first, equal scores by position. The candidate at
    rank j = 0..N-1 is the pick of a random k-subset if the subset contains it and none of the j better candidates:

        P(j | N, k) = C(N-1-j, k-1) / C(N, k),   so P(0) = k / N and P(j+1) / P(j) = (N-j-k) / (N-1-j)

    Rows with fewer than k candidates use all of them. With scores equal to the values the result is the oracle's curve. For k = 1 it is
    the mean of the row under any score, for k = N the value of the pick.
    """
    order = np.argsort(np.where(present_RC, -scores_RC, np.inf), axis=1, kind="stable")
    ranked_RC = np.take_along_axis(np.where(present_RC, values_RC, 0.0), order, axis=1)
    counts_R = present_RC.sum(axis=1)
    expected_RK = np.empty((len(scores_RC), len(sizes)))
    for count in np.unique(counts_R):
        rows = counts_R == count
        weights_KC = np.stack([_pick_probabilities(int(count), min(size, int(count))) for size in sizes])
        expected_RK[rows] = ranked_RC[rows, :count] @ weights_KC.T
    return expected_RK


def _pick_probabilities(count: int, size: int) -> Floats:
    """Return P(j | count, size) for j = 0..count-1, by the recurrence, which avoids overflowing binomials."""
    rank = np.arange(count - 1)
    ratio = np.maximum(count - rank - size, 0) / np.maximum(count - 1 - rank, 1)
    return size / count * np.concatenate([[1.0], np.cumprod(ratio)])


def calibration(scores: Floats, values: Floats, bins: int) -> list[dict[str, float]]:
    """Return mean score, mean value and count of `bins` groups of equal size by score, lowest first: `score`, `value`, `count`.

    Equal scores may be in adjacent groups. With fewer scores than `bins` there are fewer groups.
    """
    order = np.argsort(scores, kind="stable")
    groups = [group for group in np.array_split(order, min(bins, len(scores))) if len(group)]
    return [{"score": float(scores[g].mean()), "value": float(values[g].mean()), "count": len(g)} for g in groups]
