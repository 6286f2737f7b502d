"""Progress and log lines on standard error: a live bar on a terminal, else a line every ten seconds.

Standard output is reserved for the result of a verb. Imports `cluster.redaction` only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.redaction import redact_text

console = Console(stderr=True, highlight=False, soft_wrap=True)
_LINE_EVERY_S = 10.0


def log(text: str) -> None:
    """Print one line to standard error. Credentials in URLs are replaced."""
    console.print(redact_text(text), markup=False)


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard standard error inside the block, including output of libraries written in C."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class Bar:
    """Progress over `total` steps named `unit`, with a rate and an ETA. `total` is None if unknown. Use as a context manager.

    `advance(n, **counts)` adds `n` steps; each keyword adds to a count that is shown as a rate, e.g. `tokens=1200` as "tokens/s".
    `note` is a text at the end of the line, e.g. the loss.
    """

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._done_before = done
        self._counts: dict[str, int] = {}
        self._note = ""
        # Rates start at the first result, or at `start_rates`: the time before it is start-up, e.g. loading of an LLM.
        self._start = self._last_line = time.monotonic()
        self._first: tuple[float, int, dict[str, int]] | None = None
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._live.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self._live:
            self._live.start()
        else:
            log(f"{self.title}: {self._reached()}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        elif self.done > self._done_before:
            log(self._line())

    def start_rates(self, seconds_ago: float) -> None:
        """Measure the rates from the start of the work, `seconds_ago` seconds before now, and not from the first result.

        Call it before the first `advance`. With few results that end at almost the same time, rates from the first result are too high.
        """
        self._first = (time.monotonic() - seconds_ago, self._done_before, {})

    def advance(self, steps: int = 1, note: str = "", **counts: int) -> None:
        self.done += steps
        first = self._first is None
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        self._note = note or self._note
        if first:
            self._first = (time.monotonic(), self.done, dict(self._counts))
        if self._live:
            self._live.update(self._task, completed=self.done, note="  ".join([*self._rates(), self._note]))
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S and self.done != self.total:
            self._last_line = time.monotonic()
            log(self._line())

    def _since_first(self) -> tuple[float, int, dict[str, int]]:
        """Return seconds, steps and counts since `start_rates` or the first result.

        Without both, or with one result only, it is since the start of the bar.
        """
        now = time.monotonic()
        if self._first and self.done > self._first[1]:
            start, done, counts = self._first
            return now - start, self.done - done, {name: count - counts.get(name, 0) for name, count in self._counts.items()}
        return now - self._start, self.done - self._done_before, self._counts

    def rates(self) -> dict[str, float]:
        """Return the rates per second since `start_rates` or the first result: the steps by `unit`, and each count by its name."""
        elapsed, steps, counts = self._since_first()
        return {name: round(count / max(elapsed, 1e-6), 3) for name, count in {self.unit: steps, **counts}.items()}

    def _rates(self) -> list[str]:
        elapsed, _, counts = self._since_first()
        return [f"{count / max(elapsed, 1e-6):,.0f} {name}/s" for name, count in counts.items()]

    def _reached(self) -> str:
        return f"{self.done:,} {self.unit}" if self.total is None else f"{self.done:,}/{self.total:,} {self.unit}"

    def _line(self) -> str:
        elapsed, steps, _ = self._since_first()
        rate = steps / max(elapsed, 1e-6)
        parts = [f"{self.title}: {self._reached()}"]
        if self.done == self.total or (self._first and self.done > self._first[1]):
            parts += [f"{rate:,.1f} {self.unit}/s", *self._rates()]
        parts.append(self._note)
        if self.total is None or self.done >= self.total:
            parts.append(f"in {time.monotonic() - self._start:,.0f} s")
        elif len(parts) > 2:
            parts.append(f"eta {(self.total - self.done) / max(rate, 1e-6):,.0f} s")
        return "  ".join(part for part in parts if part)
