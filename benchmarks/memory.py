"""Measure the peak memory of a process and of the Ray workers below it, by polling from another process."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import psutil

MIB = 1 << 20
_INTERVAL_S = 0.25


class PeakMemory:
    """Peak private memory (RSS minus shared pages, in bytes) of a process, as `driver`, and of the largest Ray worker of each role.

    `roles` maps a part of a Ray worker's title to the name of its role; the first match counts.
    """

    def __init__(self, pid: int, roles: dict[str, str]) -> None:
        self.peaks: dict[str, int] = {}
        self._root, self._roles, self._over = psutil.Process(pid), roles, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            try:
                self.measure()
            except psutil.Error:  # the process ended during the measurement
                continue

    def measure(self) -> None:
        self._count("driver", self._root)
        for process in self._root.children(recursive=True):
            title = (process.cmdline() or [""])[0]
            role = next((role for part, role in self._roles.items() if part in title), None)
            if title.startswith("ray::") and role:
                self._count(role, process)

    def _count(self, role: str, process: psutil.Process) -> None:
        memory = process.memory_info()
        self.peaks[role] = max(self.peaks.get(role, 0), memory.rss - memory.shared)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def report(results: Sequence[dict[str, Any]], keys: Sequence[str], as_json: bool) -> None:
    """Print the largest value divided by the smallest over all sizes, for each key; with `as_json` print all results as one JSON object."""
    spread = {key: round(max(values) / min(values), 3) for key in keys if (values := [each[key] for each in results])}
    print("  ".join(f"{key}: largest / smallest {value}" for key, value in spread.items()))
    if as_json:
        print(json.dumps({"sizes": results, "spread": spread}))
