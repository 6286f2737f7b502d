"""Copy a published folder."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import artifacts, folder_writer, storage
from cluster.errors import CappyError, UsageError
from cluster.progress import Bar

_THREADS = 8
_ATTEMPTS = 3
_CHUNK = 8 << 20
_SCRATCH_FOLDER = "_copying"


def copy_folder(source: str, destination: str) -> dict[str, Any]:
    """Copy what is published at `source` (of any kind) to `destination`; return what was done.

    The manifest there is the source's, but for `writer` and `copied_from`. Raises `UsageError` when the destination holds
    something else, `CappyError` when a file does not match its SHA-256 on three attempts; then nothing is published.
    """
    source, destination = storage.check_uri(source, "SRC"), storage.check_uri(destination, "DST")
    manifest = artifacts.read_any_manifest(source, "SRC")
    files = dict(manifest["files"])
    if is_already_copied(destination, lambda there: _without_copy_facts(there) == _without_copy_facts(manifest)):
        return copy_summary(destination, manifest["kind"], source, files, ())
    there = refuse_other_files(destination, files)
    start = time.monotonic()
    with CopySession(destination, len(files)) as copying:

        def one(name: str) -> bool:
            target = storage.join(destination, name)
            sound = there.get(name) == files[name]["bytes"] and storage.sha256(target) == files[name]["sha256"]
            if not sound:
                with copying.scratch() as file:
                    copying.fetch(storage.join(source, name), files[name], file)
                    copying.place(file, name)
            return not sound

        copied = [name for name, moved in copying.each(one, files, _THREADS) if moved]
    artifacts.publish(destination, {**_without_copy_facts(manifest), "copied_from": source})
    return copy_summary(destination, manifest["kind"], source, files, copied, time.monotonic() - start)


class CopySession:
    """Files on their way to one destination: scratch files, checked reads, writes, progress. Use as a context manager."""

    def __init__(self, destination: str, files: int) -> None:
        remote = storage.is_s3(destination)
        # Beside a local destination, so that a finished file moves there in one rename.
        self._bench = storage.new_temporary_folder("copy") if remote else Path(destination, _SCRATCH_FOLDER)
        self._folder = folder_writer.FolderWriter(destination)
        self._bar = Bar("copying", files, "files")
        self._lock = threading.Lock()
        self._stopped = False
        self._bytes = 0

    def __enter__(self) -> CopySession:
        try:
            self._bench.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CappyError(f"DST={self._bench.parent} cannot be written ({error.strerror}); choose another place") from None
        self._bar.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.__exit__(kind, error, trace)
        shutil.rmtree(self._bench, ignore_errors=True)

    def each(self, work: Callable[[str], Any], names: Iterable[str], threads: int) -> Iterator[tuple[str, Any]]:
        """Yield `(name, work(name))` as they come; after a failure the others stop at their next piece."""
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
        """A local file that is gone after the block, unless it was placed."""
        file = self._bench / uuid.uuid4().hex
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def fetch(self, uri: str, expected: Mapping[str, Any], file: Path) -> None:
        """Copy a file to a local one and compare its SHA-256; raises `CappyError` when it never matches."""
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                size, digest = self._read(uri, file)
            except FileNotFoundError:
                raise CappyError(f"{uri} is missing, its manifest names it; nothing is published: mend the source") from None
            except OSError as error:
                reason = f"could not be read ({error.strerror or 'the store broke off'})"
                continue
            if digest == expected["sha256"]:
                return
            reason = (
                f"has {size} bytes, its manifest says {expected['bytes']}" if size != expected["bytes"] else "does not match its SHA-256"
            )
        raise CappyError(
            f"{uri} {reason}, read {_ATTEMPTS} times; nothing is published: mend the source (`cappy inspect` checks it), "
            f"then run the same command to go on"
        )

    def _read(self, uri: str, file: Path) -> tuple[int, str]:
        fs, path = storage.filesystem(uri)
        digest = hashlib.sha256()
        size = 0
        with fs.open_input_stream(path, compression=None) as stream, file.open("wb") as sink:
            while piece := stream.read(_CHUNK):
                if self._stopped:
                    raise CappyError("the copy was stopped")
                digest.update(piece)
                sink.write(piece)
                size += len(piece)
                self._moved(len(piece))
        return size, digest.hexdigest()

    def place(self, file: Path, name: str) -> None:
        """Give a local file its name at the destination, whole."""
        try:
            self._folder.upload_file(file, name, move=True)
        except OSError as error:
            reason = error.strerror or "the store broke off"
            raise CappyError(
                f"{storage.join(self._folder.uri, name)} could not be written ({reason}); run the same command to go on"
            ) from None

    def _moved(self, count: int) -> None:
        with self._lock:
            before, self._bytes = self._bytes, self._bytes + count
            self._bar.advance(0, MB=self._bytes // 10**6 - before // 10**6)


def _without_copy_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without what differs between copies."""
    return {key: value for key, value in manifest.items() if key not in ("writer", "copied_from")}


def is_already_copied(destination: str, same: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether the destination already has this content, finished; raises `UsageError` when it has another."""
    if not storage.exists(storage.join(destination, artifacts.MANIFEST)):
        return False
    if not same(artifacts.read_any_manifest(destination, "DST")):
        raise UsageError(f"DST={destination} already holds another finished run; choose another place, or delete that one first")
    return True


def refuse_other_files(destination: str, names: Iterable[str]) -> dict[str, int]:
    """Return the sizes of the files that are at the destination; raises `UsageError` when others than `names` are.

    They would stand among the copied ones: a glob over `data/` reads whatever is there.
    """
    there = {name: size for name, size in storage.list_files(destination).items() if not name.startswith(f"{_SCRATCH_FOLDER}/")}
    strange = sorted(there.keys() - set(names))
    if strange:
        raise UsageError(f"DST={destination} holds other files, {strange[0]} first of {len(strange)}; choose an empty place")
    return there


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
