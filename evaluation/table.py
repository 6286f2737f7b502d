"""The result of `cappy evaluate` as a table on the terminal."""

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
