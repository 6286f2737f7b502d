"""Write files on a disk: whole or not at all, synced to the disk before they get their name, with errors that name the path.

A file is written under a temporary name, synced and renamed, and its folder is synced. After a power loss no file is empty or partial.
If a file exists, all files written before it exist too. Imports nothing of storage.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import CappyError, describe_disk_error

TEMPORARY = re.compile(r"(^|.*/)\.([^/]+)\.[0-9a-f]{32}")
"""The temporary name of a file; groups 1 and 2 are the path of the file. A kill can leave such a file."""
# Errors of `fsync` for a folder on a filesystem that cannot sync folders.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


def final_name(name: str) -> str | None:
    """Return the path of the file for which `name` is a temporary path; None if `name` is not temporary."""
    match = TEMPORARY.fullmatch(name)
    return f"{match[1]}{match[2]}" if match else None


@contextmanager
def errors_of(path: Path | str) -> Iterator[None]:
    """Raise `CappyError`, which names `path`, for an `OSError` inside the block."""
    try:
        yield
    except OSError as error:
        raise CappyError(describe_disk_error(error, str(path))) from None


@contextmanager
def temporary_file_beside(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of a file, for a rename. A file with this path is deleted after the block."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write(file: Path, data: bytes, *, sync: bool = True) -> None:
    """Write `data` to a file that has no reader yet."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())


def replace(target: Path, data: bytes) -> None:
    """Write a whole file: a reader gets the old file or all of `data`."""
    _replace(target, lambda temporary: write(temporary, data))


def copy(source: Path, target: Path) -> None:
    """Copy a file; a reader of `target` gets the old file or all bytes of `source`."""

    def fill(temporary: Path) -> None:
        shutil.copyfile(source, temporary)
        sync_file(temporary)

    _replace(target, fill)


def create(target: Path, data: bytes) -> bool:
    """Write a whole file only if none exists; return whether it was written."""
    with errors_of(target), temporary_file_beside(target) as temporary:
        write(temporary, data)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        sync_folder(target.parent)
        return True


def _replace(target: Path, fill: Callable[[Path], None]) -> None:
    with errors_of(target), temporary_file_beside(target) as temporary:
        fill(temporary)
        temporary.replace(target)
        sync_folder(target.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, and sync each folder that gets a new entry."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(new):
        sync_folder(each.parent)


def sync_file(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, on filesystems that can sync folders."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def sync_tree(folder: Path) -> None:
    """Sync all files and folders below a folder, and the folder."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        (sync_folder if path.is_dir() else sync_file)(path)
    sync_folder(folder)
