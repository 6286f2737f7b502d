"""The report's plots, as SVG text for an HTML page. Pure: numbers in, text out; no files, no pyplot state.

Labels stay text and use the font of the page. Colours that follow light and dark mode become `currentColor` and CSS variables
(`--plot-...`), which the page defines. matplotlib draws with the placeholder colours below.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.statistics import Floats

NAMES = {
    "greedy": "Greedy",
    "sample": "One sample",
    "self_sum": "Self-score, sum",
    "self_mean": "Self-score, mean",
    "scorer": "Scorer",
    "consensus": "Consensus",
    "blend": "Scorer + log-probability",
    "fitted_no_scorer": "Fitted selection, no scorer",
    "fitted": "Fitted selection",
    "oracle": "Oracle",
    "random": "Random pick",
}
# Placeholder colours; `_svg` replaces each with the CSS value in its comment.
_INK = "#010203"  # currentColor
_COLOURS = {name: f"#0a0b{index:02x}" for index, name in enumerate(NAMES)}  # var(--plot-{name})
_TASKS_PER_PANEL = 9
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.labelpad": 8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def plot_bars(results: dict[str, Any]) -> str:
    """Return a bar chart of every method's points, on average and on each task, with intervals, in panels of a few tasks."""
    groups = [("average", results["averages"])] + [(task, entry["methods"]) for task, entry in results["per_task"].items()]
    panels = -(-len(groups) // _TASKS_PER_PANEL)
    per_panel = -(-len(groups) // panels)
    methods = results["methods"]
    top = min(100.0, 1.05 * max(each["high"] for _, estimates in groups for each in estimates.values()) or 1.0)
    width = 0.82 / len(methods)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 0.6 + 3.4 * panels), layout="constrained")
        all_axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        for panel, axes in enumerate(all_axes):
            shown = groups[panel * per_panel : (panel + 1) * per_panel]
            for column, method in enumerate(methods):
                x = np.arange(len(shown)) + (column - (len(methods) - 1) / 2) * width
                mean, low, high = (np.asarray([estimates[method][key] for _, estimates in shown]) for key in ("mean", "low", "high"))
                hollow = {"facecolor": "none", "linewidth": 1.2} if method == "oracle" else {"facecolor": _COLOURS[method], "linewidth": 0}
                axes.bar(x, mean, width * 0.9, edgecolor=_COLOURS[method], label=NAMES[method], **hollow)
                axes.vlines(x, low, high, color=_INK, linewidth=0.9, alpha=0.65)
            axes.set_xticks(np.arange(len(shown)), [_wrap_name(name) for name, _ in shown])
            axes.set_xlim(-0.6, per_panel - 0.4)
            axes.set_ylim(0, top)
            axes.set_ylabel("Rouge-L, points")
            axes.tick_params(axis="x", length=0)
            _grid(axes)
            if panel == 0:
                axes.axvline(0.5, color=_INK, linewidth=0.8, alpha=0.25)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(methods), handlelength=1.0, columnspacing=1.4)
        return _svg(figure, "bars", "Rouge-L of each method on each task, with intervals")


def plot_curves(results: dict[str, Any]) -> str:
    """Return a line chart of the average points against the number of candidates to pick from."""
    series = results["curves"]
    sizes = series["k"]
    styles = {"oracle": "--", "scorer": "-", "self_mean": "-", "self_sum": "-", "random": ":"}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        axes = figure.subplots()
        ends = {}
        for name, line in styles.items():
            if name not in series:
                continue
            mean = series[name]["mean"]
            marker = "o" if len(sizes) <= 20 and name == "scorer" else ""
            axes.plot(sizes, mean, line, color=_COLOURS[name], linewidth=2.4 if name == "scorer" else 1.7, marker=marker, markersize=4)
            ends[name] = mean[-1]
        axes.fill_between(sizes, series["scorer"]["low"], series["scorer"]["high"], color=_COLOURS["scorer"], alpha=0.16, linewidth=0)
        if "greedy" in results["averages"]:
            ends["greedy"] = results["averages"]["greedy"]["mean"]
            axes.axhline(ends["greedy"], color=_COLOURS["greedy"], linewidth=1.4, linestyle=(0, (6, 2, 1, 2)))
        axes.set_xlim(sizes[0], max(sizes[-1], sizes[0] + 1))
        low, high = axes.get_ylim()
        low, distance = max(0.0, low - 0.05 * (high - low)), 0.06 * (high - low)
        for name, y in zip(ends, _spread_heights(list(ends.values()), distance), strict=True):
            position: dict[str, Any] = {"xy": (1.01, y), "xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
            axes.annotate(NAMES[name], color=_COLOURS[name], **position)
        axes.set_ylim(low, high)
        axes.set_xlabel("candidates to pick from")
        axes.set_ylabel("Rouge-L, points, average over tasks")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _grid(axes)
        return _svg(figure, "curves", "Rouge-L against the number of candidates, by method")


def plot_scores(score: Floats, label: Floats, calibration: Sequence[dict[str, float]]) -> str:
    """Return a density plot of candidates by score and true Rouge-L, with the mean Rouge-L of equal-sized groups by score."""
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("ink", [(*_rgb("self_sum"), 0.14), (*_rgb("self_sum"), 1.0)])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        left, right = min(0.0, float(score.min())), max(1.0, float(score.max()))
        extent = (left, right, 0.0, 1.0)
        cells = axes.hexbin(score, label, gridsize=(34, 16), extent=extent, mincnt=1, bins="log", cmap=shades, linewidths=0.1)
        cells.set_edgecolor("none")
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, alpha=0.5, linestyle="--", label="score = Rouge-L")
        x, y = ([group[key] for group in calibration] for key in ("score", "value"))
        axes.plot(x, y, color=_COLOURS["scorer"], marker="o", linewidth=2, markersize=5, label="mean of each tenth by score")
        axes.set_xlim(left - 0.03, right + 0.03)
        axes.set_ylim(-0.04, 1.06)
        axes.set_xlabel("score")
        axes.set_ylabel("true Rouge-L")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=1.6)
        _grid(axes)
        return _svg(figure, "scores", "Score against true Rouge-L of every distinct candidate")


def plot_labels(candidates: Floats, picked: dict[str, Floats]) -> str:
    """Return a histogram of Rouge-L over all candidates and over the picks of some methods, in percent of each."""
    edges = np.linspace(0, 1, 11)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        series = {"random": candidates, **picked}
        width = 0.084 / len(series)
        for column, (name, values) in enumerate(series.items()):
            share = np.histogram(values, edges)[0] / max(len(values), 1) * 100
            x = edges[:-1] + 0.05 + (column - (len(series) - 1) / 2) * width
            axes.bar(x, share, width * 0.92, color=_COLOURS[name], label="All candidates" if name == "random" else f"Picks: {NAMES[name]}")
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_xlabel("true Rouge-L")
        axes.set_ylabel("share, %")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(series), handlelength=1.0, columnspacing=1.2)
        _grid(axes)
        return _svg(figure, "labels", "Distribution of Rouge-L over all candidates and over picks")


def plot_gains(gains: dict[str, dict[str, float]]) -> str:
    """Return a dot with its interval for each task, the highest gain first. A gain has `mean`, `low` and `high`, in points."""
    order = sorted(gains, key=lambda task: gains[task]["mean"])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 1.0 + 0.27 * len(order)), layout="constrained")
        axes = figure.subplots()
        heights = np.arange(len(order))
        mean, low, high = (np.asarray([gains[task][key] for task in order]) for key in ("mean", "low", "high"))
        axes.hlines(heights, low, high, color=_COLOURS["scorer"], linewidth=1.6, alpha=0.6)
        axes.plot(mean, heights, "o", color=_COLOURS["scorer"], markersize=6)
        axes.axvline(0, color=_INK, linewidth=0.8, alpha=0.5)
        axes.set_yticks(heights, order)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_xlabel("gain, points")
        axes.grid(axis="x", color=_INK, alpha=0.14, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, "gains", "Gain of each task with its interval")


def plot_cost(cost: Sequence[dict[str, Any]], titles: dict[str, str]) -> str:
    """Return the points of each method against the sampled tokens of an instruction. An entry has `tokens` and `points` by method."""
    series = [each for each in cost if each["min_gain"] is None]
    colours = {"adapted": "scorer", "scorer": "blend", "scorer_fitted": "self_sum"}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        axes = figure.subplots()
        tokens = [each["tokens"] for each in series]
        for name in series[0]["points"]:
            colour = _COLOURS[colours.get(name, name if name in _COLOURS else "sample")]
            style = {"oracle": "--", "random": ":", "greedy": ":"}.get(name, "-")
            points = [each["points"][name]["mean"] for each in series]
            axes.plot(tokens, points, style, color=colour, marker="o", markersize=4, label=titles.get(name, name))
        axes.set_xlabel("sampled tokens per instruction")
        axes.set_ylabel("points, average over tasks")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        _grid(axes)
        return _svg(figure, "cost", "Points against sampled tokens, by method")


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color=_INK, alpha=0.14, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _rgb(name: str) -> tuple[float, float, float]:
    return tuple(int(_COLOURS[name][at : at + 2], 16) / 255 for at in (1, 3, 5))  # type: ignore[return-value]


def _wrap_name(name: str) -> str:
    """Return a task name in up to three lines, broken after underscores, so that adjacent names do not overlap."""
    lines = [""]
    for part in re.findall(r"[^_\-. ]+[_\-. ]?", name) or [name]:
        if len(lines[-1]) + len(part) > 12 and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line if len(line) <= 16 else f"{line[:15]}…" for line in lines[:3])


def _spread_heights(heights: Sequence[float], distance: float) -> list[float]:
    """Return the heights, moved apart in small steps until adjacent ones differ by `distance`; the order stays."""
    order = np.argsort(heights, kind="stable")
    placed = np.asarray(heights, np.float64)[order]
    for _ in range(50):
        for index in range(1, len(placed)):
            missing = distance - (placed[index] - placed[index - 1])
            if missing > 1e-9:
                placed[index - 1] -= missing / 2
                placed[index] += missing / 2
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()


def _svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an `<svg>` element without width and height; equal numbers give equal bytes.

    The ids get the prefix `name`, so that they differ from those of the other plots on the page.
    """
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="|url\(#|href="#', lambda found: f"{found[0]}{name}-", text)
    text = text.replace(_INK, "currentColor")
    for method, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--plot-{method})")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
