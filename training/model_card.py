"""Render the model card (README.md) of a scorer and the plots beside it. No torch, no Ray, no files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, Literal

from cluster.config import Config, ObjectiveConfig
from training.records import CalibrationGroup, MetricsLine, Outcome, SelectionSummary, TrainSummary


def plot_loss(metrics: Sequence[MetricsLine]) -> bytes:
    """Return an SVG with the training loss, raw and smoothed, and the validation MSE over the optimizer steps.

    `metrics` are the lines of metrics.jsonl.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    trained = [line for line in metrics if "loss" in line]
    steps, losses = [line["step"] for line in trained], [line["loss"] for line in trained]
    smooth, average = [], losses[0] if losses else 0.0
    for loss in losses:
        average = 0.9 * average + 0.1 * loss
        smooth.append(average)
    axes.plot(steps, losses, color="#b9c6d8", linewidth=0.8, label="train")
    axes.plot(steps, smooth, color="#1f5fa8", label="train, smoothed")
    validated = [(line["step"], error) for line in metrics if (error := line.get("validation", {}).get("mse")) is not None]
    axes.plot([step for step, _ in validated], [error for _, error in validated], "o", color="#c8552d", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss; validation: mean squared error")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def plot_calibration(groups: Sequence[CalibrationGroup]) -> bytes:
    """Return an SVG with the mean label over the mean score of groups of validation pairs, and the number of pairs of each."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    scores, labels = [group["score"] for group in groups], [group["label"] for group in groups]
    axes.plot([0, 1], [0, 1], color="#b9c6d8", linewidth=0.8)
    axes.plot(scores, labels, "o-", color="#1f5fa8")
    axes.set(ylabel="mean label", ylim=(-0.03, 1.03))
    counts.bar(scores, [group["count"] for group in groups], width=0.06, color="#b9c6d8")
    for group in groups:
        counts.annotate(f"{group['count']:,.0f}", (group["score"], group["count"]), ha="center", va="bottom", fontsize=7)
    counts.set(xlabel="score, mean of the group", ylabel="pairs")
    counts.margins(y=0.25)
    for each in (axes, counts):
        each.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


_METRICS = (
    ("mse", "MSE, validation"),
    ("spearman", "Spearman within instruction, validation"),
    ("pairwise_accuracy", "Pairwise accuracy within instruction, validation"),
    ("selection", "Mean label of the best-scored sampled candidate"),
    ("random", "Mean label of a random sampled candidate"),
    ("greedy", "Mean label of the greedy candidate"),
    ("self_sum", "Mean label of the candidate with the highest sum of log-probabilities"),
    ("self_mean", "Mean label of the candidate with the highest mean log-probability"),
    ("oracle", "Mean label of the best candidate (oracle)"),
    ("accuracy", "Accuracy of the best-scored choice"),
)
_INPUTS = {
    "pair": "Its tokenizer takes the pair (instruction, response).",
    "chat": """Its input is the chat template of its tokenizer, with the instruction as the turn of the user and the response
as that of the assistant.""",
}


def render_card(config: Config, summary: TrainSummary, dataset: dict[str, Any], format: Literal["pair", "chat"] = "pair") -> str:
    """Return the model card as Markdown. `dataset` is the manifest of the training set."""
    validation = summary["validation"]
    rows = [
        ("MSE, train (last epoch)", summary["train_mse"]),
        *((title, validation.get(name)) for name, title in _METRICS),
    ]
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in rows if value is not None)
    training = config.training
    best, blend, loss = summary["best"], summary["blend"], describe_objective(training.objective)
    chosen = f"step {best['step']:,}, the best validation by {best['metric']}" if best["metric"] else "the last step"
    calibration = (
        """Validation pairs grouped by score. On the grey line the mean label equals the mean score.

![calibration](calibration.svg)

"""
        if summary["calibration"]
        else ""
    )
    blended = (
        f"""With log-probabilities of the LLM, candidates can be chosen by score + {blend["logprob_weight"]:g} x mean log-probability
per token. The weight was fitted on {blend["rows"]:,} train rows. There the mean label of the picks is {blend["selection_train"]:.4f} by
score alone, and {blend["selection_train_blend"]:.4f} with the log-probability.

"""
        if blend
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
base_model: {json.dumps(config.scorer.encoder)}
tags: [cappy-ray, scorer, regression]
---

# A Cappy scorer on {config.scorer.encoder}

The scorer reads an instruction and a response and returns one number, about 0 for a wrong and about 1 for a right response. The
number is the raw logit, without a sigmoid. Among several responses of an LLM, take the one with the highest score.

```python
from training.scorer import Scorer

scorer = Scorer.load("{summary["uri"]}")
scorer.best("Translate to French: cat", ["chien", "chat"]).response
```

It is also a plain `AutoModelForSequenceClassification` with one label. {_INPUTS[format]}
In a pair of more than {config.scorer.max_length} tokens the instruction is cut, not the response.

| Measure | Value |
| --- | --: |
{table}

![loss](loss.svg)

{calibration}{blended}{describe_selection(summary.get("selection"))}Trained on
{summary["pairs"]:,} pairs ({summary["cut_pairs"]:,} cut to {config.scorer.max_length} tokens) of `{config.dataset_uri}`
(written by {dataset.get("code_version", "unknown code")}): {summary["epochs"]} epochs, {summary["steps"]:,} steps of
{training.batch_size} pairs, AdamW at {training.learning_rate:g} with a {training.schedule} schedule. Loss: {loss}.
The published weights are those of {chosen}.
`config.yaml` has all settings, `metrics.jsonl` all logged steps.
"""


def describe_selection(fitted: SelectionSummary | None) -> str:
    """Return the paragraph of a card on the fitted selection, with its table; an empty text without one."""
    if not fitted:
        return ""
    measured = fitted["cross_validated"]
    rows = "".join(
        f"| {name} | {weight:.3f} | {100 * measured[name]:.1f} |\n" if measured else f"| {name} | {weight:.3f} | |\n"
        for name, weight in fitted["weights"].items()
    )
    total = (
        f"""By cross-validation the picks of all signals together have a mean label of {100 * measured["fitted"]:.1f}
points, random picks {100 * measured["random"]:.1f}, and the best candidates {100 * measured["oracle"]:.1f}.

"""
        if measured
        else ""
    )
    return f"""`selection.json` ranks candidates by several signals. It was fitted on {fitted["rows"]:,} train rows, with scores of scorers
that were not trained on them.

| signal | weight | mean label of its picks, in points |
| --- | --: | --: |
{rows}
{total}"""


def render_adapted_card(config: Config, result: Outcome) -> str:
    """Return the model card, as Markdown, of a scorer adapted to one task."""
    figures, base = result["figures"], result["base"]
    shown = ("before", "after", "fitted", "random", "self", "oracle")
    values: dict[str, Any] = dict(figures or {})
    table = "\n".join(f"| {name} | {values[name]:.1f} |" for name in shown if values.get(name) is not None)
    used = "The gate did not use these rows" if figures and figures["apart"] else "The gate used the same rows"
    measured = (
        "The task had no validation rows, so the gain was not measured."
        if figures is None
        else f"""Mean {result["label"]} of the picks (accuracy for answer choices), in points, on
{figures["rows"]} validation rows. {used}.

| picked by | points |
| --- | --: |
{table}

`before` is the pick of the base, `after` that of this scorer, `fitted` that of its selection. `self` is the candidate with the highest
mean log-probability, `oracle` the best candidate."""
    )
    decision = result.get("gate")
    kept = (
        "These are the weights of the base: in the cross-validation the trained ones were not better. The selection is fitted to the task. "
        if decision and decision.get("weights") == "base"
        else ""
    )
    trained = (
        f"{result['trained_parameters']:,} parameters in low-rank adapters of rank {config.adapt.lora.rank} and the head"
        if result["method"] == "lora"
        else "all parameters"
    )
    return f"""---
library_name: {"peft" if result["method"] == "lora" else "transformers"}
pipeline_tag: text-classification
base_model: {json.dumps(base["name"])}
tags: [cappy-ray, scorer, regression]
---

# A Cappy scorer adapted to {result["task"]}

The scorer reads an instruction and a response and returns one number, about 0 for a wrong and about 1 for a right response. It was
adapted from `{base["name"]}` on instructions of this task.

```python
from training.scorer import Scorer

scorer = Scorer.load("{result["uri"]}")
```

{measured}

{describe_selection(result.get("selection"))}![loss](loss.svg)

{kept}Trained {trained} on {result["pairs"]:,} pairs ({result["distinct_pairs"]:,} distinct, of {result["train_rows"]:,} train rows):
{result["steps"]:,} steps of {config.adapt.batch_size} pairs, AdamW at {result["learning_rate"]:g}. `config.yaml` has all settings,
`results.json` the measurements.
"""


def describe_objective(config: ObjectiveConfig) -> str:
    """Return the objective in words, for the model card."""
    terms = (("mean squared error on the raw logit", config.mse), ("pairwise", config.pairwise), ("listwise", config.listwise))
    weighted = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in terms if weight]
    towards = {"plain": "labels", "power": f"labels to the power of {config.power:g}", "rank": "ranks of labels within the instruction"}
    temperature = f" (temperature {config.temperature:g})" if config.pairwise or config.listwise else ""
    return f"{' + '.join(weighted)}{temperature}, towards {towards[config.labels]}"
