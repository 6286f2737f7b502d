"""The results of suites and comparisons as tables on the terminal. Computes nothing beyond the text."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_suite(summary: dict[str, Any], console: Console) -> None:
    """Print the average of each method of a suite, the gain of each trained method over it, and the headline for each task."""
    titles, trained, headline, rival = summary["titles"], list(summary["gains"]), summary["headline"], summary["rival"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    table.add_column("points", justify="right", no_wrap=True)
    for method in trained:
        table.add_column(f"gain of {titles[method].lower()}", justify="right")
    for method, estimate in summary["averages"].items():
        cells = [_gain_cell(gains.get(method)) for gains in summary["gains"].values()]
        table.add_row(Text(titles[method]), f"{estimate['mean']:.1f}", *cells)
    console.print(table)
    tasks = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    paper = summary["suite"]["paper"]
    for name in ("task", "rows", titles[headline].lower(), titles[rival].lower(), *(["paper"] if paper else [])):
        tasks.add_column(name, justify="left" if name == "task" else "right", overflow="fold")
    for task, entry in summary["per_task"].items():
        points = [f"{entry['methods'][method]['mean']:.1f}" for method in (headline, rival)]
        tasks.add_row(Text(task), f"{entry['rows']:,}", *points, *([f"{paper[task]:.1f}" if task in paper else ""] if paper else []))
    console.print(tasks)
    gain = summary["gains"].get(headline, {}).get(rival)
    if gain:
        over = f"over rows [{gain['low']:+.1f}, {gain['high']:+.1f}], over tasks [{gain['low_tasks']:+.1f}, {gain['high_tasks']:+.1f}]"
        console.print(Text(f"{titles[headline]} - {titles[rival].lower()}: {gain['mean']:+.1f} points, {over}"), soft_wrap=True)
        few = gain["not_below"]
        console.print(Text(f"not below it on {few['tasks']} of {few['of']} tasks with {few['min_rows']} rows or more"), soft_wrap=True)
    for baseline in ("greedy", "consensus"):
        share = summary["oracle_gap"].get(headline, {}).get(baseline)
        if share:
            console.print(Text(f"{share['mean']:.0%} of the gap from {baseline} to the oracle [{share['low']:.0%}, {share['high']:.0%}]"))
    for method, reason in summary["left_out"].items():
        console.print(Text(f"left out: {titles.get(method, method)} ({reason})"))
    console.print(Text(f"report: {summary['report']}"), soft_wrap=True)


def _gain_cell(gain: dict[str, Any] | None) -> Text:
    return Text(f"{gain['mean']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain else "")


def show_compare(result: dict[str, Any], console: Console) -> None:
    """Print the result of `cappy compare`: each method on average, and the difference of each method for each task."""
    console.print(Text(f"{result['rows']:,} common rows of {result['tasks']} tasks; B - A in points"))
    for name, count in (("A", result["only_first"]), ("B", result["only_second"])):
        if count:
            console.print(Text(f"{count:,} rows are only in {name}", style="yellow"))
    if result["other_candidates"]:
        console.print(Text(f"{result['other_candidates']:,} common rows have other candidates", style="yellow"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("method", "A", "B", "B - A", "over rows", "over tasks", "wins", "ties", "losses"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name != "method")
    for method, found in result["methods"].items():
        gain = found["difference"]
        intervals = [f"[{gain['low']:+.1f}, {gain['high']:+.1f}]", f"[{gain['low_tasks']:+.1f}, {gain['high_tasks']:+.1f}]"]
        counts = [f"{found['outcomes'][name]:,}" for name in ("wins", "ties", "losses")]
        table.add_row(Text(method), f"{found['first']:.1f}", f"{found['second']:.1f}", f"{gain['mean']:+.1f}", *intervals, *counts)
    console.print(table)
    tasks = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    changed = [method for method, found in result["methods"].items() if found["outcomes"]["wins"] or found["outcomes"]["losses"]]
    for name in ("task", "rows", *changed):
        tasks.add_column(name, justify="left" if name == "task" else "right", overflow="fold")
    for task, entry in next(iter(result["methods"].values()))["per_task"].items():
        gains = (result["methods"][method]["per_task"][task]["difference"] for method in changed)
        tasks.add_row(
            Text(task), f"{entry['rows']:,}", *(f"{each['mean']:+.1f} [{each['low']:+.1f}, {each['high']:+.1f}]" for each in gains)
        )
    console.print(tasks)
