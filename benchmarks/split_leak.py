"""Measure the share of validation rows that overlap train rows, for each key that the split can hash.

    python -m benchmarks.split_leak --data ROWS.parquet

Without `--data` the rows come from BIG-bench tasks.

A validation instruction leaks if it shares a run of 13 words with a train instruction of its dataset. Runs in more than a fifth of a
template's rows belong to the template and do not count.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.pairs import Row, read_rows
from generation.sources.decontaminate import NgramIndex
from generation.sources.split import assign_split, longest_sentence

KEYS: dict[str, Callable[[dict[str, str]], str]] = {
    "whole instruction": lambda row: row["instruction"].strip(),
    "longest sentence": lambda row: longest_sentence(row["instruction"]),
    "dataset": lambda row: row["dataset"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="?", type=Path, help="the same as --data")
    parser.add_argument(
        "--data", type=Path, help="Parquet file with dataset, template, instruction; rows of BIG-bench tasks (from PyPI) by default"
    )
    parser.add_argument("--fraction", type=float, default=0.2)
    arguments = parser.parse_args()
    rows = read_rows(arguments.data or arguments.rows, ("dataset", "template", "instruction"))
    datasets: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        datasets[row["dataset"]].append(row)
    leaks = {name: Counter[str]() for name in KEYS}
    for group in datasets.values():
        runs = own_runs(group)
        for name, key in KEYS.items():
            sides = [assign_split(key(row), arguments.fraction) for row in group]
            train = [each for each, at in zip(runs, sides, strict=True) if at == "train"]
            seen = np.unique(np.concatenate(train)) if train else np.empty(0, np.uint64)
            held_out = [each for each, at in zip(runs, sides, strict=True) if at == "validation"]
            leaks[name]["validation"] += len(held_out)
            leaks[name]["leaking"] += sum(overlaps(each, seen) for each in held_out)
    for name, counts in leaks.items():
        share = counts["leaking"] / max(counts["validation"], 1)
        print(f"{name:20} {counts['validation']:6} validation rows, {100 * share:5.1f} % leak")
    print(json.dumps({name: dict(counts) for name, counts in leaks.items()}))


def overlaps(runs: np.ndarray, seen: np.ndarray) -> bool:
    """Return whether any of `runs` is in `seen`, which is sorted."""
    if not len(seen):
        return False
    places = np.minimum(np.searchsorted(seen, runs), len(seen) - 1)
    return bool((seen[places] == runs).any())


def own_runs(group: list[dict[str, str]]) -> list[np.ndarray]:
    """Return the hashed word runs of each row of a dataset, without the runs of its template."""
    hasher = NgramIndex([], 13)
    runs = [np.unique(hasher.hash_ngrams(row["instruction"])) for row in group]
    templates = defaultdict(list)
    for row, each in zip(group, runs, strict=True):
        templates[row["template"]].append(each)
    common = [np.empty(0, np.uint64)]
    for of_template in templates.values():
        values, counts = np.unique(np.concatenate(of_template), return_counts=True)
        common.append(values[counts > 0.2 * len(of_template)])
    return [np.setdiff1d(each, np.concatenate(common)) for each in runs]


if __name__ == "__main__":
    main()
