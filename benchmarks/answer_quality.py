"""Answer instructions whose references are hidden with `cappy answer`, then compare the answers with the references.

    python -m benchmarks.answer_quality --json -
    python -m benchmarks.answer_quality --rows 1000 --workspace s3://bucket/run --json -

The instructions are of the tasks of the BIG-bench suite, as many of each. `cappy answer` gets them as JSON lines without references, and
three worked examples of each task, which are not evaluated. The same candidates are picked by each baseline: greedy, one sample, the
highest sum and mean of log-probabilities, and consensus. Figures are Rouge-L in points, averaged over tasks, with paired intervals.
A run with `--workspace` resumes after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import Config, load
from cluster.progress import log
from evaluation import statistics
from evaluation.comparison import pick_baselines, responses
from generation import labels
from generation.sources.reader import read_rows
from generation.sources.row import Instruction
from serving.answer import run_answer

_SUITE = Path(__file__).parents[1] / "evaluation" / "suites" / "bigbench.yaml"
_EXAMPLES = 3
_RESAMPLES, _CONFIDENCE = 2000, 0.95


def hide_references(rows: Sequence[Instruction], per_task: int) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return the lines of the source, and the references of the hidden rows by their `key`. The first rows of a task are examples."""
    tasks: dict[str, list[Instruction]] = {}
    for row in rows:
        tasks.setdefault(row.dataset, []).append(row)
    lines, hidden = [], {}
    for task, members in tasks.items():
        for number, row in enumerate(members[: _EXAMPLES + per_task]):
            line: dict[str, Any] = {"dataset": task, "instruction": row.instruction, "key": f"{task}-{number}"}
            if number < _EXAMPLES:
                line["references"] = list(row.references)
            else:
                hidden[line["key"]] = list(row.references)
            lines.append(line)
    return lines, hidden


def compare(answers: Sequence[Mapping[str, Any]], hidden: Mapping[str, list[str]], config: Config) -> dict[str, Any]:
    """Return the points of each method and the gains of the selection over each baseline, with intervals."""
    rows = [{**row, "references": hidden[row["key"]]} for row in answers if row["key"] in hidden and row["response"] is not None]
    for row in rows:
        texts = [*responses(row), row["response"]]
        found = labels.compute_labels(pa.array([texts]), pa.array([row["references"]]), config.generate.label, [row["instruction"]])
        *own, row["selected"] = np.asarray(found, np.float64).tolist()
        row["candidates"] = [{**each, "label": label} for each, label in zip(row["candidates"], own, strict=True)]
    decodings = [each.model_dump() for each in config.sampler.decodings]
    baselines = pick_baselines(rows, decodings, config.generate.label)
    values = {
        name: [row["candidates"][pick]["label"] for row, pick in zip(baselines.rows, picks.tolist(), strict=True)]
        for name, picks in baselines.picks.items()
    }
    values["selected"] = [row["selected"] for row in baselines.rows]
    values["oracle"] = [max(each["label"] for each in row["candidates"]) for row in baselines.rows]
    tasks = [row["dataset"] for row in baselines.rows]
    points, gains = points_and_gains(
        values, tasks, {"selected": [name for name in values if name not in ("selected", "oracle")]}, config.seed
    )
    return {
        "rows": len(baselines.rows),
        "tasks": len(set(tasks)),
        "points": points,
        "gains": gains["selected"],
        "left_out": baselines.left_out,
    }


def points_and_gains(
    values: Mapping[str, Sequence[float]], tasks: Sequence[str], compared: Mapping[str, Sequence[str]], seed: int
) -> tuple[dict[str, float], dict[str, dict[str, dict[str, float]]]]:
    """Return the average of each method over tasks, and its gains over the methods in `compared`, with paired bootstrap intervals.

    Args:
        values: The labels of each method, in [0, 1], in the order of the rows. The results are in points, 0 to 100.
        tasks: The task of each row.
        compared: The baselines of each method.
        seed: Seed of the resamples.
    """
    names = list(values)
    values_RM = 100 * np.array([values[name] for name in names]).T
    _, tasks_R = np.unique(tasks, return_inverse=True)
    means_BM = statistics.bootstrap(values_RM, tasks_R, _RESAMPLES, seed).mean(axis=1)
    points = dict(zip(names, statistics.macro_average(values_RM, tasks_R).tolist(), strict=True))
    gains: dict[str, dict[str, dict[str, float]]] = {name: {} for name in compared}
    for name, baselines in compared.items():
        for other in baselines:
            low, high = statistics.interval(means_BM[:, names.index(name)] - means_BM[:, names.index(other)], _CONFIDENCE)
            gains[name][other] = {
                "mean": round(points[name] - points[other], 2),
                "low": round(float(low), 2),
                "high": round(float(high), 2),
            }
    return {name: round(value, 2) for name, value in points.items()}, gains


def read_answers(uri: str) -> list[dict[str, Any]]:
    """Return the published answers of `cappy answer`."""
    found: list[dict[str, Any]] = []
    for name in storage.list_files(uri):
        if name.startswith("data/") and name.endswith(".parquet"):
            fs, path = storage.filesystem(storage.join(uri, name))
            found += pq.read_table(path, filesystem=fs).to_pylist()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=260, help="instructions of all tasks together")
    parser.add_argument("--workspace", help="folder or s3:// prefix of the answers; default: a temporary folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a setting of the run")
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    suite = load(str(_SUITE))
    rows = [row for row in read_rows(suite.source, suite.seed) if isinstance(row, Instruction)]
    tasks = len({row.dataset for row in rows})
    lines, hidden = hide_references(rows, -(-options.rows // tasks))
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="cappy-benchmark-"))
        source = Path(folder, "prompts.jsonl")
        source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        workspace = options.workspace or folder
        if options.workspace:  # a resumed run must read the same file
            storage.write_bytes(storage.join(workspace, "prompts.jsonl"), source.read_bytes())
        given = {
            "workspace": workspace,
            "source": {"kind": "files", "path": storage.join(workspace, "prompts.jsonl"), "validation_fraction": 0},
            "sampler": suite.sampler.model_dump(mode="json"),
            "answer.keep_candidates": True,
        }
        config = load(load(None, given), options.settings)
        log(f"{len(hidden):,} instructions of {tasks} tasks without references, {len(lines) - len(hidden)} worked examples")
        summary = run_answer(config)
        result = compare(read_answers(config.answers_uri), hidden, config)
    counts = {name: summary[name] for name in ("answers", "candidates", "tokens", "cost", "dead_letters", "abstained", "seconds")}
    result |= {**counts, "rows_per_second": round(summary["answers"] / max(summary["seconds"], 1e-9), 2)}
    print(f"{result['rows']:,} answers of {result['tasks']} tasks; Rouge-L in points")
    for name, points in result["points"].items():
        gain = result["gains"].get(name)
        against = f"   selection {gain['mean']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain else ""
        print(f"{name:10} {points:6.1f}{against}")
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
