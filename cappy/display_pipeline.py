"""The plan and the result of `cappy run` as tables. Computes nothing beyond the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cappy.display import duration

_STYLES = {"kept": "dim", "new": "green", "resumed": "green", "changed": "yellow", "redo": "yellow"}


def show_pipeline(result: dict[str, Any], console: Console) -> None:
    """Print the plan of a dry run with its costs, or the steps of a run with their minutes."""
    show_states(result["steps"], console, costs=result["dry_run"], minutes=not result["dry_run"])
    if result["dry_run"]:
        console.print(Text("nothing was changed"))
    else:
        ran = sum("minutes" in step for step in result["steps"])
        console.print(Text(f"{ran} of {len(result['steps'])} steps ran, {result['minutes']:.1f} minutes", style="bold"))


def show_states(steps: Sequence[dict[str, Any]], console: Console, *, costs: bool = False, minutes: bool = False) -> None:
    """Print a table of the steps: name, state and reasons, with the estimated costs or the minutes."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("step", "state", *["minutes"] * minutes, *["cost"] * costs):
        table.add_column(name, justify="right" if name == "minutes" else "left", no_wrap=name != "cost")
    table.add_column("reason" if costs or not minutes else "output", overflow="fold")
    for step in steps:
        cells: list[str | Text] = [Text(step["name"]), Text(step["state"], style=_STYLES[step["state"]])]
        if minutes:
            cells.append(f"{step['minutes']:.1f}" if "minutes" in step else "")
        if costs:
            cells.append(Text(_cost(step["estimate"])))
        table.add_row(*cells, Text(step["uri"] if minutes else "\n".join(step["reasons"])))
    console.print(table, soft_wrap=False)


def _cost(estimate: dict[str, Any] | None) -> str:
    """Return an estimate in one line."""
    if estimate is None:
        return ""
    if "error" in estimate:
        return f"unknown: {estimate['error']}"
    parts = [f"{estimate['pairs']:,} pairs"]
    if estimate["machine_hours"] is not None:
        parts.append(f"{duration(estimate['machine_hours'])} on this machine")
    if estimate["gpu_hours"] is not None:
        parts.append(f"{estimate['gpu_hours']:,.3g} GPU-hours")
    if "dollars" in estimate:
        parts.append(f"${estimate['dollars']:,.2f} (at most ${estimate['most_dollars']:,.2f})")
    return ", ".join(parts)
