"""One run at a destination: a lease in the store, kept alive by a heartbeat.

Below `uri` stand `{number}.json`. To take the lease is to create the next number, which a conditional write grants to one of
any racers. The holder rewrites its file every few seconds; a file that is released, whose process is gone from this machine,
or that stands still while another watches it may be succeeded. Nobody's clock is compared with anybody else's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster import storage
from cluster.errors import CappyError
from cluster.progress import say

BEAT_S = 5.0
"""Seconds between signs of life."""
SILENCE_S = 30.0
"""Seconds without one after which a holder counts as dead."""


class Lease:
    """A held lease; `check()` raises `CappyError` once another run has taken it over (this one was silent for too long)."""

    def __init__(self, uri: str, number: int, setting: str) -> None:
        self._uri, self._number, self._setting = uri, number, setting
        self.successor = _place(uri, number + 1)
        """A file that is there once another run has taken over; what outlives the holder can look for it."""
        self._beat = 0
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="cappy-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost.is_set():
            raise CappyError(f"{self._setting}: another run took over while this one gave no sign of life; it goes on, this one stops")

    def release(self) -> None:
        """Let the next run start at once."""
        self._ended.set()
        self._thread.join()
        if not self._lost.is_set():
            storage.write_json(_place(self._uri, self._number), {**_me(), "beat": self._beat, "released": True})

    def _live(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._beat += 1
            try:
                if storage.exists(self.successor):
                    self._lost.set()
                    return
                storage.write_json(_place(self._uri, self._number), {**_me(), "beat": self._beat})
            except CappyError:  # the store does not answer: the next beat tries again
                continue


@contextmanager
def held(uri: str, setting: str) -> Iterator[Lease]:
    """Hold the lease kept at `uri` inside the block; `setting` names the destination in errors, e.g. `dataset=s3://...`.

    Raises `CappyError` where another run holds it and lives.
    """
    lease = Lease(uri, _take(uri, setting), setting)
    try:
        yield lease
    finally:
        lease.release()


def _take(uri: str, setting: str) -> int:
    """Return the number of the lease just taken."""
    number = max((int(name.split(".")[0]) for name in storage.list_files(uri)), default=0)
    if number:
        _wait_until_dead(_place(uri, number), setting)
    if not storage.create_json(_place(uri, number + 1), {**_me(), "beat": 0}):
        raise CappyError(f"{setting}: another run started there at the same moment; it goes on, this one stops")
    return number + 1


def _wait_until_dead(place: str, setting: str) -> None:
    holder = storage.read_json(place)
    if _gone(holder):
        return
    say(f"{setting}: a run on {holder['host']} (process {holder['pid']}) was here; waiting up to {SILENCE_S:g} s for a sign of life")
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT_S / 2))
        now = storage.read_json(place)
        if _gone(now):
            return
        if now["beat"] != holder["beat"]:
            raise CappyError(
                f"{setting}: a run on {holder['host']} (process {holder['pid']}) is working there; "
                f"wait for it, stop it, or choose another destination"
            )


def _gone(holder: dict[str, Any]) -> bool:
    """Whether a holder said it ended, or was a process of this machine that is no more."""
    if holder.get("released"):
        return True
    me = _me()
    if (holder["host"], holder["boot"]) != (me["host"], me["boot"]):
        return False
    try:
        process = psutil.Process(holder["pid"])
        return bool(process.create_time() != holder["since"] or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _me() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
        "pid": os.getpid(),
        "since": psutil.Process().create_time(),
    }


def _place(uri: str, number: int) -> str:
    return storage.join(uri, f"{number:06d}.json")
