"""The peak memory of a run and of what it started, looked at from outside."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import psutil

MIB = 1 << 20
_LOOK_S = 0.25


class Peaks:
    """The peak private memory (RSS less shared pages, bytes) of a process, `driver`, and of the largest of its Ray workers by role.

    `roles`: part of a Ray worker's title to the name of its role; the first that fits counts.
    """

    def __init__(self, pid: int, roles: dict[str, str]) -> None:
        self.peaks: dict[str, int] = {}
        self._root, self._roles, self._over = psutil.Process(pid), roles, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                self.look()
            except psutil.Error:  # it ended while we looked
                continue

    def look(self) -> None:
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
    """Print how flat the figures of growing sizes are, largest over smallest, and all of it as one JSON object where asked."""
    spread = {key: round(max(values) / min(values), 3) for key in keys if (values := [each[key] for each in results])}
    print("  ".join(f"{key}: largest / smallest {value}" for key, value in spread.items()))
    if as_json:
        print(json.dumps({"sizes": results, "spread": spread}))
