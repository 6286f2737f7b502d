"""Print the result of `cappy list` as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cappy.display import format_size
from cappy.listing import Entry


def show_list(entries: Sequence[Entry], console: Console) -> None:
    """Print a line for each published folder and each unfinished run."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("kind", "rows", "size", "made", "folder"):
        table.add_column(name, justify="right" if name in ("rows", "size") else "left", overflow="fold")
    for entry in entries:
        finished = entry["kind"] not in ("unfinished", "unreadable")
        rows = "" if entry["rows"] is None else f"{entry['rows']:,}"
        style = "" if finished else "yellow"
        table.add_row(Text(entry["kind"], style=style), rows, format_size(entry["bytes"]), entry["created"] or "", Text(entry["uri"]))
    console.print(table)
    for entry in entries:
        if entry["problem"]:
            console.print(Text(entry["problem"], style="red"))
    unfinished = sum(entry["kind"] == "unfinished" for entry in entries)
    if unfinished:
        console.print(Text(f"{unfinished:,} unfinished: a run is active there, or its command resumes it"))
