"""Copy a published folder between any two places, on disk or in object storage, with checksums: `cappy push` and `cappy pull`.

The source can also be a repository on the Hugging Face hub, at one commit. `cluster.hub_push` copies to the hub.

Each file is first copied to a local scratch file, and its SHA-256 is computed during the copy. A file that matches the manifest
is then moved or uploaded to its final name. The manifest is written last. The same copy resumes after an interruption: intact files
at the destination are not copied again. The lease `_lease` excludes a second copy to the same destination.

Runs threads on one machine and imports no Ray: a copy waits for disks and the network, and hashing releases the interpreter lock.
Imports no code of a verb.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster import artifacts, disk, folder_writer, hub, lease, storage
from cluster.errors import CappyError, UsageError, describe_disk_error, find_disk_error
from cluster.progress import Bar

_THREADS = 8
_ATTEMPTS = 3
_CHUNK = 8 << 20
SCRATCH_FOLDER = "_copying"
"""The folder of unfinished files at a local destination."""
LEASE = "_lease"
"""The folder of the lease of a destination."""
Download = Callable[..., Path]
"""`cluster.hub.Commit.download`: a name, a local folder, a callback for bytes, and `again`."""


def copy_folder(source: str, destination: str) -> dict[str, Any]:
    """Copy the published folder `source`, of any kind, to `destination`; return a summary.

    The manifest is the manifest of the source, except for `writer` and `copied_from`. The copy of a combined set has all its shards.
    From the hub, the revision is first resolved to a commit. Only files of that commit are copied, and `copied_from` has the commit.
    Raises `UsageError` if the destination holds other files, and `CappyError` if a file does not match its SHA-256 in three attempts. In
    both cases it publishes nothing.
    """
    destination = storage.check_uri(destination, "DST")
    if storage.is_hub(source):
        with hub.quiet():
            commit = hub.Commit(hub.parse(source, "SRC"), "SRC")
            found = commit.read_manifest()
            if found is None:
                raise CappyError(
                    f"SRC={commit.uri} has no {artifacts.MANIFEST}, so `cappy push` did not write it; "
                    f"give another repository, revision or path"
                )
            hub.refuse_pickles(found["files"], f"SRC={commit.uri}")
            if artifacts.own_entries(found["files"]) != found["files"]:
                raise CappyError(f"SRC={commit.uri} refers to files of other folders, so `cappy push` did not write it; do not use it")
            return {**_copy(commit.uri, found, destination, commit.download), "commit": commit.sha}
    source = storage.check_uri(source, "SRC")
    return _copy(source, artifacts.read_any_manifest(source, "SRC"), destination)


def _copy(source: str, manifest: artifacts.Manifest, destination: str, download: Download | None = None) -> dict[str, Any]:
    files = dict(manifest["files"])
    if is_already_copied(destination, lambda there: without_copy_facts(there) == without_copy_facts(manifest)):
        return copy_summary(destination, manifest["kind"], source, files, ())
    refuse_other_files(destination, files)
    start = time.monotonic()
    with hold_destination(destination, files) as check, CopySession(destination, len(files), check) as copying:
        there = storage.list_files(destination)

        def one(name: str) -> bool:
            target = storage.join(destination, name)
            sound = there.get(name) == files[name]["bytes"] and storage.sha256(target) == files[name]["sha256"]
            if not sound:
                with copying.scratch() as file:
                    copying.fetch(artifacts.file_uri(source, name, files[name]), files[name], file, download and partial(download, name))
                    copying.place(file, name)
            return not sound

        copied = [name for name, moved in copying.each(one, files, _THREADS) if moved]
        check()
        artifacts.publish(destination, {**without_copy_facts(manifest), "copied_from": source})
    return copy_summary(destination, manifest["kind"], source, files, copied, time.monotonic() - start)


@contextmanager
def hold_destination(
    destination: str, names: Collection[str], owned: artifacts.OwnedFiles | None = None, *, overwrite: bool = False
) -> Iterator[Callable[[], None]]:
    """Hold the lease of a destination; yield a check that raises `CappyError` once another run has it or has published.

    Deletes the temporary files of `names` that a killed copy left. With `overwrite` the files of a finished run are deleted too, if
    they are among `owned`, the files of the verb. After the block the lease leaves no file.
    """
    with lease.hold(storage.join(destination, LEASE), f"DST={destination}", keep=False) as held:
        if owned is not None:
            artifacts.clear_destination(destination, "DST", owned, LEASE, held.check, overwrite=overwrite)

        def check() -> None:
            held.check()
            artifacts.refuse_published_meanwhile(destination)

        check()
        refuse_other_files(destination, names)
        artifacts.remove_temporaries(destination, names)
        artifacts.abort_uploads(destination, lambda name: name in names, check)
        yield check


class CopySession:
    """The copies to one destination: scratch files, checked reads, writes and progress. Use as a context manager.

    `check` is called before each write at the destination.
    """

    def __init__(self, destination: str, files: int, check: Callable[[], None], title: str = "copying") -> None:
        remote = storage.is_s3(destination)
        # The scratch folder is inside a local destination, so that a complete file is moved by one rename.
        self.folder = storage.new_temporary_folder("copy") if remote else Path(destination, SCRATCH_FOLDER)
        """The scratch folder, which is deleted at the end."""
        self._writer, self._check = folder_writer.FolderWriter(destination, check), check
        self._bar = Bar(title, files, "files")
        self._lock = threading.Lock()
        self._stopped = False
        self._bytes = 0

    def __enter__(self) -> CopySession:
        with disk.errors_of(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._bar.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.__exit__(kind, error, trace)
        shutil.rmtree(self.folder, ignore_errors=True)

    def each(self, work: Callable[[str], Any], names: Iterable[str], threads: int) -> Iterator[tuple[str, Any]]:
        """Yield `(name, work(name))` in the order of completion. After a failure the other threads stop at their next block."""
        with ThreadPoolExecutor(threads) as pool:
            futures = {pool.submit(work, name): name for name in names}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    with self._lock:
                        self._bar.advance()
                    yield futures[future], result
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield the path of a local file. The file is deleted after the block, unless it was placed."""
        file = self.folder / uuid.uuid4().hex
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def fetch(self, uri: str, expected: Mapping[str, Any], file: Path, download: Download | None = None) -> None:
        """Copy a file to a local file and check its SHA-256. Raises `CappyError` if it matches in none of the attempts.

        `download` reads a file that is not in a store; see `cluster.hub.Commit.download`.
        """
        reason = ""
        for attempt in range(_ATTEMPTS):
            try:
                size, digest = self._read(uri, file) if download is None else self._download(download, file, again=attempt > 0)
            except FileNotFoundError:
                self._check()  # another run may have deleted the scratch folder
                raise CappyError(f"{uri} is missing, its manifest names it; nothing is published: repair the source") from None
            except OSError as error:
                if full := find_disk_error(error):
                    raise CappyError(describe_disk_error(full, str(file.parent))) from None
                reason = f"could not be read ({error.strerror or 'the store broke off'})"
                continue
            if digest == expected["sha256"]:
                return
            reason = (
                f"has {size} bytes, its manifest has {expected['bytes']}" if size != expected["bytes"] else "does not match its SHA-256"
            )
        raise CappyError(
            f"{uri} {reason}, read {_ATTEMPTS} times; nothing is published: repair the source (`cappy inspect` checks it), "
            f"then run the same command again to resume"
        )

    def _read(self, uri: str, file: Path) -> tuple[int, str]:
        fs, path = storage.filesystem(uri)
        digest = hashlib.sha256()
        size = 0
        with fs.open_input_stream(path, compression=None) as stream, file.open("wb") as sink:
            while piece := stream.read(_CHUNK):
                digest.update(piece)
                sink.write(piece)
                size += len(piece)
                self._moved(len(piece))
        return size, digest.hexdigest()

    def _download(self, download: Download, file: Path, *, again: bool) -> tuple[int, str]:
        download(self.folder / "downloads", self._moved, again=again).replace(file)
        return file.stat().st_size, storage.sha256(str(file))

    def place(self, file: Path, name: str) -> None:
        """Move or upload a complete local file to its name at the destination."""
        self._writer.upload_file(file, name, move=True)

    def _moved(self, count: int) -> None:
        if self._stopped:
            raise CappyError("the copy was stopped")
        with self._lock:
            before, self._bytes = self._bytes, self._bytes + count
            self._bar.advance(0, MB=self._bytes // 10**6 - before // 10**6)


def without_copy_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without the parts that differ between copies."""
    kept = {key: value for key, value in manifest.items() if key not in ("writer", "copied_from")}
    return {**kept, "files": artifacts.own_entries(manifest["files"])}


def is_already_copied(destination: str, same: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Return whether the destination has the same published content. Raises `UsageError` if it has another published folder."""
    if not storage.exists(storage.join(destination, artifacts.MANIFEST)):
        return False
    if not same(artifacts.read_any_manifest(destination, "DST")):
        raise UsageError(f"DST={destination} already holds another finished run; choose another place, or delete that one first")
    return True


def refuse_other_files(destination: str, names: Collection[str]) -> None:
    """Raise `UsageError` if the destination has files other than `names`, except the remains of a killed copy.

    A reader with a glob over `data/` would read them as a part of the copy.
    """
    own = {*names, artifacts.MANIFEST}
    there = [disk.final_name(name) or name for name in storage.list_files(destination)]
    strange = sorted({name for name in there if not name.startswith((f"{SCRATCH_FOLDER}/", f"{LEASE}/"))} - own)
    if strange:
        raise UsageError(f"DST={destination} holds other files, {strange[0]} first of {len(strange)}; choose an empty place")


def copy_summary(
    destination: str, kind: str, source: str, files: Mapping[str, Any], copied: Collection[str], seconds: float = 0.0
) -> dict[str, Any]:
    """Return the summary of a copy. `copied` are the names of the files that were copied, `seconds` its duration."""
    moved = sum(int(files[name]["bytes"]) for name in copied)
    return {
        "uri": destination,
        "kind": kind,
        "from": source,
        "files": len(files),
        "bytes": sum(int(entry["bytes"]) for entry in files.values()),
        "copied_files": len(copied),
        "copied_bytes": moved,
        "seconds": round(seconds, 2),
        "mb_per_second": round(moved / 1e6 / seconds, 1) if moved else 0.0,
    }
