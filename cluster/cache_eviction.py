"""The size limit of the cached copies of models in object storage: the least recently used copies are deleted.

A process locks each copy that it uses (`flock` on a file beside the copy), so no process deletes a copy in use. The lock ends with
the process, or once the process uses a newer copy of the same model. The time of the last change of the lock file is the time of the
last use. `CAPPY_CACHE_LIMIT_GB` sets the limit in gigabytes; the default is half of the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from cluster.errors import UsageError
from cluster.progress import log

LIMIT = "CAPPY_CACHE_LIMIT_GB"

_lock = threading.Lock()
# By the name of a model: its copy that this process uses, and the descriptor of the lock file.
_used: dict[str, tuple[Path, int]] = {}


def use(entry: Path, name: str) -> None:
    """Mark the copy `entry` of the model `name` as used by this process, before it is read or made."""
    with _lock:
        before = _used.get(name)
        if before and before[0] == entry:
            with suppress(OSError):
                os.utime(_lock_file(entry))
            return
        entry.parent.mkdir(parents=True, exist_ok=True)
        _used[name] = (entry, _lock_shared(_lock_file(entry)))
        if before:
            os.close(before[1])


def make_room(folder: Path, size: int) -> None:
    """Delete the least recently used entries of a folder that no process uses, until `size` more bytes are within the limit."""
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    sizes = {entry: _size(entry) for entry in entries}
    excess = sum(sizes.values()) + size - _limit(folder)
    for entry in sorted(entries, key=_last_use):
        if excess <= 0:
            return
        if _delete_unused(entry):
            log(f"cache: deleted {entry} ({sizes[entry] / 1e9:.1f} GB, not used lately); {LIMIT} sets the limit")
            excess -= sizes[entry]


def _limit(folder: Path) -> float:
    """Return the limit in bytes."""
    text = os.environ.get(LIMIT)
    if not text:
        return shutil.disk_usage(folder).total / 2
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise UsageError(f"{LIMIT}={text} is not a size; give the number of gigabytes, e.g. {LIMIT}=200")
    return limit * 1e9


def _lock_file(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")


def _lock_shared(file: Path) -> int:
    """Return the descriptor of a locked file, for the time that this process uses the entry."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        os.utime(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError:  # a filesystem without locks: no entry is deleted there
            return descriptor
        try:
            if file.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:  # another process deleted the entry and the file
            pass
        os.close(descriptor)


def _delete_unused(entry: Path) -> bool:
    """Delete an entry and its lock file, unless a process uses it; return whether it was deleted."""
    file = _lock_file(entry)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry, ignore_errors=True)
        file.unlink(missing_ok=True)
        return not entry.exists()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _last_use(entry: Path) -> float:
    for path in (_lock_file(entry), entry):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
