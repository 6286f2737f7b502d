"""The fitted selection on published sets: held-out picks within each task and across tasks, without single signals, and the baselines.

    python -m benchmarks.selection SET [SET ...] [--rows 200] [--json -]

Within a task, cross-validation is over its rows, as for `cappy adapt`. Across tasks it is over datasets, as for a selection that is used
without training on the task. No scorer is used: the signals are the log-probabilities and those of the texts. The table has the mean
label of the picks in points, averaged over the tasks with at least `--rows-min` rows whose candidates have different labels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo import demo_set
from generation.dataset import RegressionSet
from training.selection import LOGPROB_SIGNALS, TEXT_SIGNALS, Floats, Pool, lower_empty, signals
from training.selection_fit import fit_selection

SIGNALS = (*LOGPROB_SIGNALS, *TEXT_SIGNALS)
BASELINES = ("consensus", "logprob_mean", "logprob_sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help="published sets; default: the demo's set, generated if it is missing")
    parser.add_argument("--rows", type=int, default=200, help="largest number of rows of a task, in the order of the set")
    parser.add_argument("--rows-min", type=int, default=30, help="smallest number of rows of a task")
    parser.add_argument("--json", help="file for the result; - prints it")
    options = parser.parse_args()
    tasks = read_tasks(options.sets or [demo_set()], options.rows, options.rows_min)
    result = compare(tasks)
    for name, points in result["points"].items():
        print(f"{name:<28}{np.mean(list(points.values())):6.2f}")
    if options.json:
        text = json.dumps(result) + "\n"
        Path(options.json).write_text(text, encoding="utf-8") if options.json != "-" else sys.stdout.write(text)


def read_tasks(sets: Sequence[str], most: int, least: int) -> dict[str, list[tuple[Pool, Floats]]]:
    """Return the pools of each dataset with the labels of their draws, (C,). Pools with one label are left out."""
    found: dict[str, dict[str, tuple[Pool, Floats]]] = {}
    for uri in sets:
        opened = RegressionSet(uri)
        for split in opened.manifest["counts"]:
            for table in opened.batches(split, columns=["id", "dataset", "instruction", "candidates"]):
                for row in table.to_pylist():
                    drawn = [each for each in row["candidates"] if each["source"] == "sampled"]
                    labels_C = np.array([each["label"] for each in drawn], np.float64)
                    of_task = found.setdefault(row["dataset"], {})
                    if len(of_task) < most and len({each["label"] for each in drawn if each["response"]}) > 1:
                        columns: dict[str, list[Any]] = {name: [each[name] for each in drawn] for name in ("response", "logprob", "tokens")}
                        pool = Pool(columns["response"], None, columns["logprob"], columns["tokens"], row["instruction"])
                        of_task[row["id"]] = (pool, labels_C)
    return {name: list(rows.values()) for name, rows in sorted(found.items()) if len(rows) >= least}


def compare(tasks: dict[str, list[tuple[Pool, Floats]]]) -> dict[str, Any]:
    """Return the points of each method on each task, and the rows of each task."""
    points: dict[str, dict[str, float]] = {}
    for name in BASELINES:
        points[name] = {task: _mean_pick(rows, name) for task, rows in tasks.items()}
    points["random"] = {task: 100 * float(np.mean([labels_C.mean() for _, labels_C in rows])) for task, rows in tasks.items()}
    points["oracle"] = {task: 100 * float(np.mean([labels_C.max() for _, labels_C in rows])) for task, rows in tasks.items()}
    for title, left_out in (("fitted", ()), *((f"fitted without {name}", (name,)) for name in SIGNALS)):
        names = tuple(name for name in SIGNALS if name not in left_out)
        points[f"{title}, within"] = {task: _within(rows, names) for task, rows in tasks.items()}
        points[f"{title}, across"] = _across(tasks, names)
    return {"rows": {task: len(rows) for task, rows in tasks.items()}, "points": points}


def _mean_pick(rows: Sequence[tuple[Pool, Floats]], name: str) -> float:
    picks = [labels_C[lower_empty(signals(pool)[name], pool.responses).argmax()] for pool, labels_C in rows]
    return 100 * float(np.mean(picks))


def _within(rows: Sequence[tuple[Pool, Floats]], names: tuple[str, ...]) -> float:
    pools, labels = [pool for pool, _ in rows], [labels_C for _, labels_C in rows]
    fitted = fit_selection(pools, labels, [pool.instruction for pool in pools], variants=(names,))
    assert fitted is not None  # a task has enough rows
    return 100 * float(fitted.picked.mean())


def _across(tasks: dict[str, list[tuple[Pool, Floats]]], names: tuple[str, ...]) -> dict[str, float]:
    rows = [(task, pool, labels_C) for task, of_task in tasks.items() for pool, labels_C in of_task]
    fitted = fit_selection(
        [pool for _, pool, _ in rows], [labels_C for *_, labels_C in rows], [task for task, *_ in rows], variants=(names,)
    )
    assert fitted is not None
    of_row = np.array([task for task, *_ in rows])
    return {task: 100 * float(fitted.picked[of_row == task].mean()) for task in tasks}


if __name__ == "__main__":
    main()
