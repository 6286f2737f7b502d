"""The results of `cappy evaluate` and `cappy adapt` as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

HEADERS = {
    "greedy": "greedy",
    "sample": "sample",
    "self_sum": "self-sum",
    "self_mean": "self-mean",
    "scorer": "scorer",
    "blend": "blend",
    "oracle": "oracle",
}


def print_table(summary: dict[str, Any], console: Console) -> None:
    """Print tasks by methods, the average with its interval, and below it the scorer's gain; 80 columns suffice.

    The best method but the oracle is green, and starred, as colours are lost in a log file.
    """
    averages = summary["averages"]
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title="Rouge-L of the answer, in points",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("task", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    for method in averages:
        table.add_column(HEADERS[method], justify="right", no_wrap=True)
    for task, entry in summary["per_task"].items():
        table.add_row(task, f"{entry['instructions']:,}", *_cells(entry["methods"]))
    table.add_section()
    table.add_row("average over tasks", f"{summary['instructions']:,}", *_cells(averages), style="bold")
    for end in ("low", "high"):
        table.add_row(f"  {summary['confidence']:.0%} {end}", "", *(f"{each[end]:.1f} " for each in averages.values()), style="dim")
    console.print(table, soft_wrap=False)
    for line in headline(summary):
        console.print(line, soft_wrap=False)


def print_adapted(summary: dict[str, Any], console: Console) -> None:
    """Print what `cappy adapt` found for each task, the averages, and where the scorers are; 80 columns suffice."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for name in ("rows", "random", "self", "before", "after", "oracle"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gate", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for outcome in summary["tasks"]:
        figures, gate = outcome.get("figures"), outcome.get("gate")
        shown = [""] * 6 if figures is None else [f"{figures['rows']:,}", *_points(figures)]
        gain = "" if gate is None or gate["gain"] is None else f"{gate['gain']:+.1f}"
        style = {"published": "green", "rejected": "yellow", "failed": "red"}[outcome["state"]]
        table.add_row(outcome["task"], *shown, gain, Text(outcome["state"], style=style))
    if summary["averages"]:
        table.add_section()
        table.add_row("average", "", *_points(summary["averages"]), style="bold")
    console.print(table, soft_wrap=False)
    if "after the gate" in summary["averages"]:
        console.print(f"with the scorer the gate chose for each task: {summary['averages']['after the gate']:.1f} points on average")
    for outcome in summary["tasks"]:
        if outcome["state"] == "failed":
            console.print(Text(f"{outcome['task']}: {outcome['error']}", style="red"), soft_wrap=True)
    rejected = [outcome for outcome in summary["tasks"] if outcome["state"] == "rejected"]
    if rejected:
        use = rejected[0]["use"]
        names = ", ".join(outcome["task"] for outcome in rejected)
        console.print(Text(f"not better than the base, not published; use {use or 'another scorer'}: {names}"), soft_wrap=True)
    console.print(f"{summary['published']} of {len(summary['tasks'])} tasks published: {summary['uri']} in {summary['seconds']:,.0f} s")


def _points(figures: dict[str, Any]) -> list[str]:
    values = [figures.get(name) for name in ("random", "self", "before", "after", "oracle")]
    return ["" if value is None else f"{value:.1f}" for value in values]


def headline(summary: dict[str, Any]) -> list[Text]:
    """Return the gain of the scorer and the share of the oracle gap it closes, then what was left out, if anything."""
    gain, best = summary["gain"], HEADERS[summary["best_baseline"]]
    verdict = "ahead" if gain["low"] > 0 else "behind" if gain["high"] < 0 else "no clear difference"
    lines = [
        Text.assemble(
            ("scorer - ", "bold"),
            (f"{best}: ", "bold"),
            (f"{gain['mean']:+.1f}", "bold green" if gain["low"] > 0 else "bold red" if gain["high"] < 0 else "bold"),
            f" [{gain['low']:+.1f}, {gain['high']:+.1f}] points ({verdict})",
        )
    ]
    if share := summary["gap_closed"]:
        lines[0].append(f"; {share['mean']:.0%} of the oracle gap closed [{share['low']:.0%}, {share['high']:.0%}]")
    lines += [Text(f"left out: {HEADERS[method]} ({reason})") for method, reason in summary["left_out"].items()]
    skipped = {reason: count for reason, count in summary["skipped"].items() if count}
    if skipped:
        lines.append(Text("skipped rows: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in skipped.items())))
    return lines


def _cells(estimates: dict[str, dict[str, float]]) -> list[Text]:
    best = max((each["mean"] for method, each in estimates.items() if method != "oracle"))
    return [
        Text(f"{each['mean']:.1f}*", style="bold green")
        if method != "oracle" and each["mean"] == best
        else Text(f"{each['mean']:.1f} ", style="dim" if method == "oracle" else "")
        for method, each in estimates.items()
    ]
