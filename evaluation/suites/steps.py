"""Time and peak memory of the steps of a suite, so that a user can plan the same. Kept in one file over interrupted runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from cluster import folder_writer, storage

FILE = "steps.json"
_INTERVAL_S = 2.0


class Steps:
    """The steps of a suite below one folder."""

    def __init__(self, uri: str, check: Callable[[], None]) -> None:
        self._folder = folder_writer.FolderWriter(uri, check)
        try:
            self.measured: dict[str, dict[str, Any]] = storage.read_json(storage.join(uri, FILE))
        except (FileNotFoundError, ValueError):
            self.measured = {}
        """By step: `seconds` over all runs that worked on it, `peak_memory_gib` of this command and its processes, and `runs`."""

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure the block, also if it fails. Figures that the block adds to the yielded dict are added up over runs."""
        start = time.monotonic()
        ended = threading.Event()
        peak = [0.0]

        def watch() -> None:
            while True:
                peak[0] = max(peak[0], _memory_gib())
                if ended.wait(_INTERVAL_S):
                    return

        thread = threading.Thread(target=watch, name="cappy-memory", daemon=True)
        thread.start()
        added: dict[str, Any] = {}
        try:
            yield added
        finally:
            ended.set()
            thread.join()
            before = self.measured.get(name, {})
            numbers = {"seconds": time.monotonic() - start, **added, "runs": 1}
            self.measured[name] = {
                **{key: round(value + before.get(key, 0), 2) for key, value in numbers.items()},
                "peak_memory_gib": round(max(peak[0], before.get("peak_memory_gib", 0.0)), 2),
            }
            self._folder.write_json(FILE, self.measured)


def _memory_gib() -> float:
    """Return the memory of this process and of its children in GiB, shared pages left out."""
    total = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            memory = process.memory_info()
            total += memory.rss - getattr(memory, "shared", 0)
    return total / 2**30
