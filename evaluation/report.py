"""The evaluation as one self-contained HTML page: numbers, plots, worked examples, how it was made. No files, no network.

The page is a function of what `evaluate` publishes, `results.json` and `rows.parquet`. Everything a model or a data set wrote
is escaped.
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
_LONG_TEXT = 4000  # characters of an instruction or response shown


def render_report(results: dict[str, Any], rows: pa.Table, examples: int) -> str:
    """Return the page. `results` and `rows` are those of `evaluation.run`; `examples` rows are shown with their candidates."""
    candidates = pa.concat_arrays(rows["candidates"].chunks).flatten()
    label = candidates.field("label").to_numpy(zero_copy_only=False).astype(np.float64)
    score = candidates.field("score").to_numpy(zero_copy_only=False).astype(np.float64)
    picked = {name: rows[f"rouge_l_{name}"].to_numpy() for name in (results["best_baseline"], "scorer")}
    figures = {
        "bars": plots.plot_bars(results),
        "curves": plots.plot_curves(results),
        "scores": plots.plot_scores(score, label, results["calibration"]),
        "labels": plots.plot_labels(label, picked),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["signed"] = lambda value, digits=1: f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["fixed"] = lambda value, digits=1: f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["clip"] = lambda text: text if len(text) <= _LONG_TEXT else f"{text[:_LONG_TEXT]} … ({len(text):,} characters)"
    return environment.from_string(PAGE).render(
        results=results,
        figures={name: Markup(svg) for name, svg in figures.items()},
        names=plots.NAMES,
        best=results["best_baseline"],
        examples=choose_examples(rows, results["best_baseline"], examples, results["seed"]),
        interval=f"{results['confidence']:.0%}",
    )


def choose_examples(rows: pa.Table, baseline: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return up to `count` rows for showing: wins, losses and ties against `baseline` in turn, each drawn by seed and id.

    So the mix is even, not typical; where one kind runs out the others fill in. Each is a row's columns with `outcome`, the
    Rouge-L of `scorer`, `baseline` and `oracle`, and `candidates` with repeats of a response merged, best score first.
    """
    scorer, other = rows["rouge_l_scorer"].to_numpy(), rows[f"rouge_l_{baseline}"].to_numpy()
    drawn = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in rows["id"].to_pylist()]
    order = sorted(range(rows.num_rows), key=lambda at: drawn[at])
    waiting = {
        "win": [at for at in order if scorer[at] > other[at]],
        "loss": [at for at in order if scorer[at] < other[at]],
        "tie": [at for at in order if scorer[at] == other[at]],
    }
    chosen: list[tuple[str, int]] = []
    while len(chosen) < count and any(waiting.values()):
        for outcome in OUTCOMES:
            if waiting[outcome] and len(chosen) < count:
                chosen.append((outcome, waiting[outcome].pop(0)))
    return [_example(rows.slice(at, 1).to_pylist()[0], outcome, baseline) for outcome, at in chosen]


def _example(row: dict[str, Any], outcome: str, baseline: str) -> dict[str, Any]:
    merged: dict[str, dict[str, Any]] = {}
    for each in row["candidates"]:
        seen = merged.setdefault(each["response"], {**each, "times": 0, "decodings": [], "picks": []})
        seen["times"] += 1
        seen["picks"] += [method for method in each["picked_by"] if method not in seen["picks"]]
        if each["decoding"] not in seen["decodings"]:
            seen["decodings"].append(each["decoding"])
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
