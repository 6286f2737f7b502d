"""One run at a destination: a lease in the store, kept alive by a heartbeat.

The lease is a file `{number}.json` below `uri`. A run takes the lease by creating the file with the next number; a conditional
write lets exactly one of several runs succeed. The holder rewrites its file every few seconds, as a heartbeat. Another run can take
over in three cases: the file is marked `released`, the process of the holder no longer exists on this machine, or no heartbeat came
for `TIMEOUT_S`.

The holder treats its lease as lost in three cases: its last heartbeat started more than `TIMEOUT_S` ago, a later file exists, or
its own file is deleted or replaced. It therefore stops before another run can take over, also after a pause
such as SIGSTOP. A run never compares its clock with the clock of another process. Imports no Ray.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from cluster import folder_writer, storage
from cluster.disk import final_name
from cluster.errors import CappyError, first_line
from cluster.progress import log

HEARTBEAT_S = 5.0
"""Interval between heartbeats, in seconds."""
TIMEOUT_S = 30.0
"""Time without a heartbeat after which a lease is lost, in seconds."""


def clock() -> float:
    """Return monotonic time in seconds. On Linux it includes the time the machine was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class LeaseLost(CappyError):
    """Another run took over the destination, or may have."""


@dataclass(frozen=True)
class Claim:
    """The identity of a held lease in the store. It can be sent to worker processes."""

    uri: str
    number: int
    run: str
    """8 hex digits, unique to the run."""
    setting: str

    @property
    def file(self) -> str:
        return _file_uri(self.uri, self.number)

    @property
    def successor(self) -> str:
        """A file that exists once another run has taken over."""
        return _file_uri(self.uri, self.number + 1)

    def check(self) -> None:
        """Read the store, and raise `LeaseLost` if another run has the lease, or finished and removed it."""
        try:
            mine = _parse_holder(storage.read_bytes(self.file)).get("run") == self.run
        except FileNotFoundError:
            mine = False
        if not mine or storage.exists(self.successor):
            raise LeaseLost(
                f"{self.setting}: lease lost: another run took over after {TIMEOUT_S:g} s without a heartbeat; "
                f"this run stops and does not change the destination"
            )


class Lease:
    """A held lease. Call `check` right before each step that deletes or publishes something."""

    def __init__(self, claim: Claim, taken: float, clock: Callable[[], float] = clock) -> None:
        """Start the heartbeat; `taken` is when the write that took the lease began, by `clock`."""
        self.claim = claim
        self._last, self._clock = taken, clock
        self._beat = 0
        self._lost: str | None = None
        self._failure = ""
        self._finished = False
        self._ended = threading.Event()
        self._file = folder_writer.FolderWriter(claim.uri, self.check, sync=False)
        self._thread = threading.Thread(target=self._send_heartbeats, name="cappy-lease", daemon=True)
        self._thread.start()

    @property
    def run(self) -> str:
        return self.claim.run

    @property
    def successor(self) -> str:
        return self.claim.successor

    def check(self, read_store: bool = True) -> None:
        """Raise `LeaseLost` once the lease is lost, by the clock and (with `read_store`) by reading the store."""
        self._check_clock()
        if read_store:
            try:
                self.claim.check()
            except LeaseLost as error:
                self._lost = str(error)
                raise
            self._check_clock()  # the process can be stopped during the read

    def finish(self) -> None:
        """Record that the run published its result: `release` then deletes the files of the lease."""
        self._finished = True

    def release(self) -> None:
        """Release the lease, so that the next run can start without a wait. Writes nothing after the lease is lost."""
        self._ended.set()
        self._thread.join()
        with suppress(CappyError, OSError):  # on failure the next run waits for `TIMEOUT_S`
            if self._finished or not self._mark_released():
                self._remove()

    def _mark_released(self) -> bool:
        """Mark the lease as released; return whether the file could be written. The disk can be full; a deletion needs no space."""
        try:
            self._write(released=True)
        except LeaseLost:
            raise
        except (CappyError, OSError):
            return False
        return True

    def _check_clock(self) -> None:
        silent = self._clock() - self._last
        if self._lost is None and silent > TIMEOUT_S:
            self._lost = (
                f"{self.claim.setting}: lease lost: no heartbeat for {silent:.0f} s (the limit is {TIMEOUT_S:g} s), so another run may "
                f"have taken over; this run stops, the same command resumes it{self._failure}"
            )
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            began = self._clock()
            try:
                self._write()
                self._check_clock()  # a write that took too long does not renew the lease
            except LeaseLost:
                return
            except Exception as error:  # the disk is full or the store does not answer: retry with the next heartbeat
                self._failure = f"; the last heartbeat failed: {first_line(error)}"
                continue
            self._last, self._failure = began, ""

    def _write(self, **more: Any) -> None:
        self._beat += 1
        self._file.write_json(_file_name(self.claim.number), {**_this_process(), "run": self.run, "beat": self._beat, **more})

    def _remove(self) -> None:
        """Delete the files of this lease and of earlier leases, with their temporary files. A later lease belongs to another run."""
        names = [
            name for name in storage.list_files(self.claim.uri) if (_number(final_name(name) or name) or math.inf) <= self.claim.number
        ]
        self.check()
        storage.delete_files(self.claim.uri, names)
        storage.remove_empty_folder(self.claim.uri)


@contextmanager
def hold(uri: str, setting: str, clock: Callable[[], float] = clock, *, keep: bool = True) -> Iterator[Lease]:
    """Hold the lease kept at `uri` inside the block; `setting` names the destination in errors, e.g. `dataset=s3://...`.

    `clock` returns monotonic time in seconds. Without `keep` a run that fails deletes the lease too, and the folder around it if it
    is empty. Raises `CappyError` if another run holds the lease and is alive.
    """
    lease = _acquire(uri, setting, clock)
    try:
        yield lease
    finally:
        if not keep:
            lease.finish()
        lease.release()
        if not keep:
            storage.remove_empty_folder(uri.rpartition("/")[0])


def _acquire(uri: str, setting: str, clock: Callable[[], float]) -> Lease:
    number = max(_lease_numbers(uri), default=0)
    if number:
        _wait_until_ended(_file_uri(uri, number), setting)
    claim = Claim(uri, number + 1, uuid.uuid4().hex[:8], setting)
    began = clock()
    if not storage.create_json(claim.file, {**_this_process(), "run": claim.run, "beat": 0}):
        raise CappyError(f"{setting}: another run started there at the same moment; that run continues, this run stops")
    return Lease(claim, began, clock)


def _wait_until_ended(place: str, setting: str) -> None:
    """Return once the lease in the file `place` has ended. Raises `CappyError` if the file is rewritten meanwhile."""
    try:
        content = storage.read_bytes(place)
        holder = _parse_holder(content)
        if _has_ended(holder):
            return
        name = f"a run on {holder['host']} (process {holder['pid']})" if holder else f"a run with an unreadable lease file ({place})"
        log(f"{setting}: {name} has a lease; waiting up to {TIMEOUT_S:g} s for its heartbeat")
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, HEARTBEAT_S / 2))
            now = storage.read_bytes(place)
            if _has_ended(_parse_holder(now)):
                return
            if now != content:
                raise CappyError(f"{setting}: {name} is working there; wait for it, stop it, or choose another destination")
    except FileNotFoundError:  # the holder finished
        return


def _parse_holder(content: bytes) -> dict[str, Any]:
    """Return the content of a lease file; empty if it is not complete, e.g. after a power loss."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and "host" in holder and isinstance(holder.get("pid"), int) else {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Return whether a holder released the lease, or was a process of this machine that no longer exists.

    Process ids are compared only within one PID namespace. In another namespace (a container), or in a lease of an older version
    that has no namespace, only the heartbeat shows whether the holder is alive.
    """
    if holder.get("released"):
        return True
    me = _this_process()
    if not holder or me["namespace"] is None or any(holder.get(key) != me[key] for key in ("host", "boot", "namespace")):
        return False
    try:
        os.kill(holder["pid"], 0)
        state, ticks = _process_state(holder["pid"])
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:  # the process of another user; /proc may not show it
        return False
    return state in "ZX" or ticks != holder.get("ticks")


@cache
def _process_identity(pid: int) -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = ticks = since = None
    # /proc may be missing, or belong to another PID namespace. Then only the heartbeat shows whether this process is alive.
    with suppress(OSError, psutil.Error):
        if str(Path("/proc/self").readlink()) == str(pid):
            since, ticks = psutil.Process(pid).create_time(), _process_state(pid)[1]
            namespace = str(Path("/proc/self/ns/pid").readlink())
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
        "namespace": namespace,
        "pid": pid,
        "since": since,
        "ticks": ticks,
    }


def _this_process() -> dict[str, Any]:
    return _process_identity(os.getpid())


def _process_state(pid: int) -> tuple[str, int]:
    """Return the state letter of a process and its start in clock ticks since boot, which a change of the clock does not move."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _file_uri(uri: str, number: int) -> str:
    return storage.join(uri, _file_name(number))


def _file_name(number: int) -> str:
    return f"{number:06d}.json"


def _lease_numbers(uri: str) -> list[int]:
    """Return the numbers of the leases below `uri`. Temporary files of unfinished writes have other names."""
    return [number for name in storage.list_files(uri) if (number := _number(name))]


def _number(name: str) -> int | None:
    return int(name[:-5]) if re.fullmatch(r"[0-9]{6,}\.json", name) else None
