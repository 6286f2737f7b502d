"""`cappy compare A B`: paired differences of two published evaluations or suites on their common rows. Imports no Ray and no torch."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, storage
from cluster.errors import CappyError, UsageError
from evaluation import statistics
from evaluation.statistics import Floats
from evaluation.suites.results import outcomes

_PREFIXES = ("value_", "rouge_l_")
_ROWS = "rows.parquet"


def run_compare(
    first: str, second: str, *, methods: tuple[str, ...] = (), resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Compare two evaluations, method by method; return the paired differences `second` - `first`. Writes nothing.

    Args:
        first: URI of a published evaluation.
        second: URI of another one.
        methods: the methods to compare; empty compares all methods that both have.
        resamples: bootstrap resamples for each interval.
        confidence: level of the intervals.
        seed: seed of the resamples.

    Returns these keys, in points (0 to 100):

    - `rows`: number of common rows; `only_first` and `only_second` count the others.
    - `other_candidates`: number of common rows whose candidates differ.
    - `methods`: for each method `first` and `second`, the averages over tasks. Their `difference` has `low` and `high` over rows, and
      `low_tasks` and `high_tasks` over tasks. `outcomes` counts rows. `per_task` has the same for each task.

    Raises `CappyError` if one of them is not a published evaluation or is damaged. Raises `UsageError` if they have no row or method in
    common.
    """
    tables = [_read_rows(uri, setting) for uri, setting in ((first, "A"), (second, "B"))]
    columns = [_methods(table) for table in tables]
    common = [name for name in columns[0] if name in columns[1]]
    unknown = [name for name in methods if name not in common]
    if unknown or not common:
        raise UsageError(
            f"--method {', '.join(unknown)}: not in both evaluations; they share: {', '.join(common)}"
            if unknown
            else f"A={first} and B={second} have no method in common: {', '.join(columns[0])}, and {', '.join(columns[1])}"
        )
    places = [{row_id: index for index, row_id in enumerate(table["id"].to_pylist())} for table in tables]
    ids = [row_id for row_id in places[0] if row_id in places[1]]
    if not ids:
        raise UsageError(f"A={first} and B={second} have no row in common; compare evaluations of the same rows")
    parts = [table.take([place[row_id] for row_id in ids]) for table, place in zip(tables, places, strict=True)]
    names, tasks_R = np.unique(parts[0]["dataset"].to_pylist(), return_inverse=True)
    tasks = [str(task) for task in names]
    found: dict[str, Any] = {}
    for name in methods or common:
        values = [part[column[name]].to_numpy() for part, column in zip(parts, columns, strict=True)]
        found[name] = _compare(values[0], values[1], tasks, tasks_R, resamples, confidence, seed)
    return {
        "first": first,
        "second": second,
        "rows": len(ids),
        "tasks": len(names),
        "only_first": len(places[0]) - len(ids),
        "only_second": len(places[1]) - len(ids),
        "other_candidates": sum(one != other for one, other in zip(*map(_responses, parts), strict=True)),
        "methods": found,
        "confidence": confidence,
        "resamples": resamples,
        "seed": seed,
    }


def _read_rows(uri: str, setting: str) -> pa.Table:
    """Return `rows.parquet` of an evaluation, checked against its SHA-256."""
    uri = storage.check_uri(uri, setting)
    manifest = artifacts.read_manifest(uri, "evaluation", "evaluate")
    place = storage.join(uri, _ROWS)
    if _ROWS not in manifest["files"] or storage.sha256(place) != manifest["files"][_ROWS]["sha256"]:
        raise CappyError(f"{setting}={uri}: {_ROWS} does not match the manifest; copy it or run `cappy evaluate` again")
    return pq.read_table(io.BytesIO(storage.read_bytes(place)), page_checksum_verification=True)


def _methods(table: pa.Table) -> dict[str, str]:
    """Return the columns with the value of each method on each row, by method."""
    return {name.removeprefix(prefix): name for prefix in _PREFIXES for name in table.column_names if name.startswith(prefix)}


def _responses(table: pa.Table) -> list[list[str]]:
    return [[each["response"] for each in row] for row in table["candidates"].to_pylist()]


def _compare(
    first_R: Floats, second_R: Floats, names: list[str], tasks_R: np.ndarray, resamples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Return the averages of one method in both evaluations, and their paired difference, in points."""
    values_R2 = np.stack([first_R, second_R], axis=1)
    points_T2 = 100 * statistics.task_averages(values_R2, tasks_R)
    samples_BT2 = 100 * statistics.bootstrap(values_R2, tasks_R, resamples, seed)
    by_rows_BT = samples_BT2[:, :, 1] - samples_BT2[:, :, 0]
    difference_T = points_T2[:, 1] - points_T2[:, 0]
    low, high = statistics.interval(by_rows_BT.mean(axis=1), confidence)
    low_tasks, high_tasks = statistics.interval(statistics.bootstrap_tasks(difference_T[:, None], resamples, seed)[:, 0], confidence)
    low_T, high_T = statistics.interval(by_rows_BT, confidence)
    return {
        "first": float(points_T2[:, 0].mean()),
        "second": float(points_T2[:, 1].mean()),
        "difference": {
            "mean": float(difference_T.mean()),
            "low": float(low),
            "high": float(high),
            "low_tasks": float(low_tasks),
            "high_tasks": float(high_tasks),
        },
        "outcomes": outcomes(second_R - first_R),
        "per_task": {
            name: {
                "rows": int((tasks_R == task).sum()),
                "first": float(points_T2[task, 0]),
                "second": float(points_T2[task, 1]),
                "difference": {"mean": float(difference_T[task]), "low": float(low_T[task]), "high": float(high_T[task])},
                "outcomes": outcomes(second_R[tasks_R == task] - first_R[tasks_R == task]),
            }
            for task, name in enumerate(names)
        },
    }
