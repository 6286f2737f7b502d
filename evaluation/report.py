"""The evaluation as one self-contained HTML page: numbers, plots, examples, provenance. Uses no files and no network.

The page is a function of the published `results.json` and `rows.parquet`. All text from a model or a data set is escaped.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup

from evaluation import plots
from evaluation.comparison import METHODS
from evaluation.report_template import PAGE
from generation.logprobs import mean_logprob

OUTCOMES = ("win", "loss", "tie")
_MAX_TEXT = 4000  # characters of an instruction or response on the page


def render_report(results: dict[str, Any], rows: pa.Table, examples: int) -> str:
    """Return the page for the `results` and `rows` of `evaluation.evaluate`, with up to `examples` rows and their candidates."""
    candidates = pa.concat_arrays(rows["candidates"].chunks).flatten()
    label = candidates.field("label").to_numpy(zero_copy_only=False).astype(np.float64)
    score = candidates.field("score").to_numpy(zero_copy_only=False).astype(np.float64)
    picked = {name: rows[f"rouge_l_{name}"].to_numpy() for name in (results["best_baseline"], "scorer")}
    headline = "fitted" if "fitted" in results["methods"] else "scorer"
    gains = {task: entry["gains"][headline] for task, entry in results["per_task"].items()}
    figures = {
        "gains": plots.plot_gains(gains),
        "bars": plots.plot_bars(results),
        "curves": plots.plot_curves(results),
        "scores": plots.plot_scores(score, label, results["calibration"]),
        "labels": plots.plot_labels(label, picked),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["signed"] = lambda value, digits=1: f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["fixed"] = lambda value, digits=1: f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["clip"] = lambda text: text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} … ({len(text):,} characters)"
    return environment.from_string(PAGE).render(
        results=results,
        figures={name: Markup(svg) for name, svg in figures.items()},
        names=plots.NAMES,
        best=results["best_baseline"],
        headline=headline,
        examples=choose_examples(rows, results["best_baseline"], examples, results["seed"]),
        interval=f"{results['confidence']:.0%}",
    )


def choose_examples(rows: pa.Table, baseline: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return up to `count` example rows: wins, losses and ties against `baseline` in turn, in an order drawn from seed and row id.

    The mix is even, not representative. If one outcome runs out, the others fill its share. An example has the row's columns,
    `outcome`, the Rouge-L of `scorer`, `baseline` and `oracle` in points, and `candidates` with repeated responses merged, best score
    first.
    """
    scorer, other = rows["rouge_l_scorer"].to_numpy(), rows[f"rouge_l_{baseline}"].to_numpy()
    sort_keys = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in rows["id"].to_pylist()]
    order = sorted(range(rows.num_rows), key=lambda index: sort_keys[index])
    remaining = {
        "win": [index for index in order if scorer[index] > other[index]],
        "loss": [index for index in order if scorer[index] < other[index]],
        "tie": [index for index in order if scorer[index] == other[index]],
    }
    chosen: list[tuple[str, int]] = []
    while len(chosen) < count and any(remaining.values()):
        for outcome in OUTCOMES:
            if remaining[outcome] and len(chosen) < count:
                chosen.append((outcome, remaining[outcome].pop(0)))
    return [_example(rows.slice(index, 1).to_pylist()[0], outcome, baseline) for outcome, index in chosen]


def _example(row: dict[str, Any], outcome: str, baseline: str) -> dict[str, Any]:
    merged: dict[str, dict[str, Any]] = {}
    for each in row["candidates"]:
        entry = merged.setdefault(each["response"], {**each, "times": 0, "decodings": [], "picks": []})
        entry["times"] += 1
        entry["picks"] += [method for method in each["picked_by"] if method not in entry["picks"]]
        if each["decoding"] not in entry["decodings"]:
            entry["decodings"].append(each["decoding"])
    for each in merged.values():
        each["picks"].sort(key=METHODS.index)
        each["mean_logprob"] = mean_logprob(each["logprob"], each["tokens"])
    return {
        "outcome": outcome,
        "dataset": row["dataset"],
        "instruction": row["instruction"],
        "references": row["references"],
        "scorer": 100 * row["rouge_l_scorer"],
        "baseline": 100 * row[f"rouge_l_{baseline}"],
        "oracle": 100 * row["rouge_l_oracle"],
        "candidates": sorted(merged.values(), key=lambda each: -each["score"]),
    }
