"""What stands beside a trained model: its card (README.md) and the plot of its loss."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from cluster.config import Config, ObjectiveConfig


def plot_loss(metrics: Sequence[dict[str, Any]]) -> bytes:
    """Return an SVG of the training loss, smoothed and raw, and the validation MSE, over optimizer steps.

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
    validated = [line for line in metrics if line.get("validation", {}).get("mse") is not None]
    axes.plot(
        [line["step"] for line in validated], [line["validation"]["mse"] for line in validated], "o", color="#c8552d", label="validation"
    )
    axes.set(xlabel="optimizer step", ylabel="loss; validation: mean squared error")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def plot_calibration(groups: Sequence[dict[str, float]]) -> bytes:
    """Return an SVG of mean label against mean score of groups of validation pairs, with counts; `groups` are `Fit.calibration`'s."""
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


_FIGURES = (
    ("mse", "MSE, validation"),
    ("spearman", "Spearman within instruction, validation"),
    ("pairwise_accuracy", "Pairwise accuracy within instruction, validation"),
    ("selection", "Mean label of the best-scored sampled candidate"),
    ("random", "... of a random one"),
    ("greedy", "... of the greedy one"),
    ("self_sum", "... of the likeliest by sum of log-probabilities"),
    ("self_mean", "... of the likeliest by mean log-probability"),
    ("oracle", "... of the best one"),
    ("accuracy", "Accuracy of the best-scored choice"),
)


def render_card(config: Config, summary: dict[str, Any], dataset: dict[str, Any]) -> str:
    """Return the model card as Markdown; `dataset` is the manifest of the set it was trained on."""
    validation = summary["validation"]
    rows = [
        ("MSE, train (last epoch)", summary["train_mse"]),
        *((title, validation.get(name)) for name, title in _FIGURES),
    ]
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in rows if value is not None)
    training = config.training
    best, blend, loss = summary["best"], summary["blend"], describe_objective(training.objective)
    chosen = f"the best of the validated states by {best['metric']}, step {best['step']:,}" if best["metric"] else "the last state"
    calibration = (
        """Validation pairs in groups by score: an answer with a score on the grey line is as good as its score says.

![calibration](calibration.svg)

"""
        if summary["calibration"]
        else ""
    )
    blended = (
        f"""Where the LLM gives log-probabilities, candidates can be chosen by score + {blend["logprob_weight"]:g} x mean log-probability
per token. The weight was fitted on {blend["rows"]:,} train rows: mean label {blend["selection_train"]:.4f} by the score alone,
{blend["selection_train_blend"]:.4f} so.

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

Reads an instruction and a response and gives one number, about 0 for a wrong and 1 for a right response: the raw logit,
without a sigmoid. Among several responses of an LLM the one with the highest score is taken.

```python
from training.scorer import Scorer
scorer = Scorer.load("{summary["uri"]}")
scorer.best("Translate to French: cat", ["chien", "chat"]).response
```

It is also a plain `AutoModelForSequenceClassification` with one label; its tokenizer takes the pair (instruction, response).
Where a pair has more than {config.scorer.max_length} tokens the instruction is cut, not the response.

| Measure | Value |
| --- | --: |
{table}

![loss](loss.svg)

{calibration}{blended}Trained on
{summary["pairs"]:,} pairs ({summary["cut_pairs"]:,} cut to {config.scorer.max_length} tokens) of `{config.dataset_uri}`
(written by {dataset.get("code_version", "unknown code")}): {summary["epochs"]} epochs, {summary["steps"]:,} steps of
{training.batch_size} pairs, AdamW at {training.learning_rate:g} with a {training.schedule} schedule. Loss: {loss}.
Published is {chosen}.
`config.yaml` holds every setting, `metrics.jsonl` every logged step.
"""


def render_adapted_card(config: Config, result: dict[str, Any]) -> str:
    """Return the model card of a scorer adapted to one task; `result` is its outcome, see `adapt.adapt`."""
    figures, base = result["figures"], result["base"]
    shown = ("before", "after", "random", "self", "oracle")
    table = "\n".join(f"| {name} | {figures[name]:.1f} |" for name in shown if figures and figures[name] is not None)
    seen = "none of them decided whether it is published" if figures and figures["apart"] else "the same rows decided that it is published"
    measured = (
        "It had no validation rows, so nothing is known of what it gains."
        if figures is None
        else f"""Mean {result["label"]} of the picks (accuracy, where there are answer choices), in points, on
{figures["rows"]} validation rows; {seen}:

| picked by | points |
| --- | --: |
{table}

`before` is the base's pick, `self` the likeliest answer by mean log-probability, `oracle` the best there is."""
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

Reads an instruction and a response and gives one number, about 0 for a wrong and 1 for a right response. Adapted from
`{base["name"]}` on the task's own instructions.

```python
from training.scorer import Scorer
scorer = Scorer.load("{result["uri"]}")
```

{measured}

![loss](loss.svg)

Trained {trained} on {result["pairs"]:,} pairs ({result["distinct_pairs"]:,} distinct ones, of {result["train_rows"]:,} train rows):
{result["steps"]:,} steps of {config.adapt.batch_size} pairs, AdamW at {result["learning_rate"]:g}. `config.yaml` holds every setting,
`results.json` the figures.
"""


def describe_objective(config: ObjectiveConfig) -> str:
    """The objective in words."""
    terms = (("mean squared error on the raw logit", config.mse), ("pairwise", config.pairwise), ("listwise", config.listwise))
    weighted = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in terms if weight]
    towards = {"plain": "labels", "power": f"labels to the power of {config.power:g}", "rank": "ranks of labels within the instruction"}
    temperature = f" (temperature {config.temperature:g})" if config.pairwise or config.listwise else ""
    return f"{' + '.join(weighted)}{temperature}, towards {towards[config.labels]}"
