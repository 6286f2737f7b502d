"""Copy a published folder between any two places, checked: `cappy push`, `cappy pull`, and the pairs of `push --pairs`.

Each file comes to a local file beside the destination first, its SHA-256 taken on the way; only one that matches the manifest
gets its name there, and the manifest is written last. Interrupted, the same copy goes on: files that are there and sound are
not copied again. Threads of one machine, not Ray: a copy waits on disks and on the network, hashing and compressing let go of
the interpreter, and so a laptop without a cluster can pull.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.config import fingerprint
from cluster.errors import CappyError, UsageError
from cluster.progress import Bar
from cluster.runtime import code_version
from generation import dataset_card
from generation.dataset import RegressionSet, pair_table
from generation.schema import PAIRS

_THREADS = 8
_PAIR_THREADS = 4  # each holds a row group of pairs
_ATTEMPTS = 3
_CHUNK = 8 << 20
_BENCH = "_copying"
_ROW_GROUP_BYTES = 64 << 20


def copy(source: str, destination: str) -> dict[str, Any]:
    """Copy what is published at `source` (of any kind) to `destination`; return what was done.

    The manifest there is the source's, but for `writer` and `copied_from`. Raises `UsageError` when the destination holds
    something else, `CappyError` when a file does not match its SHA-256 on three attempts; then nothing is published.
    """
    source, destination = storage.check_uri(source, "SRC"), storage.check_uri(destination, "DST")
    manifest = storage.published(source, "SRC")
    files = dict(manifest["files"])
    if _is_there(destination, lambda there: _plain(there) == _plain(manifest)):
        return _report(destination, manifest["kind"], source, files, ())
    there = _own(destination, files)
    start = time.monotonic()
    with _Copying(destination, len(files)) as copying:

        def one(name: str) -> bool:
            target = storage.join(destination, name)
            sound = there.get(name) == files[name]["bytes"] and storage.sha256(target) == files[name]["sha256"]
            if not sound:
                with copying.scratch() as file:
                    copying.fetch(storage.join(source, name), files[name], file)
                    copying.place(file, name)
            return not sound

        copied = [name for name, moved in copying.each(one, files, _THREADS) if moved]
    storage.publish(destination, {**_plain(manifest), "copied_from": source})
    return _report(destination, manifest["kind"], source, files, copied, time.monotonic() - start)


def export_pairs(source: str, destination: str) -> dict[str, Any]:
    """Publish the pairs of a set as plain Parquet shards (columns of `schema.PAIRS`), one for each of its own.

    A pair is a row, exact repeats within an instruction included. Holds a row group of each thread in memory. Interrupted, it
    starts over. Raises as `copy` does.
    """
    destination = storage.check_uri(destination, "DST")
    opened = RegressionSet(source, "SRC")
    manifest, source = opened.manifest, opened.uri
    shards = {name: entry for name, entry in manifest["files"].items() if name.startswith("data/")}
    made_from = {"uri": source, "fingerprint": fingerprint(manifest["files"])}
    if _is_there(destination, lambda there: there.get("made_from", {}).get("fingerprint") == made_from["fingerprint"]):
        return _report(destination, "pairs", source, shards, ())
    _own(destination, {*shards, "config.yaml", "README.md", "labels.svg"})
    start = time.monotonic()
    with _Copying(destination, len(shards)) as copying:

        def one(name: str) -> dict[str, Any]:
            with copying.scratch() as grouped, copying.scratch() as plain:
                copying.fetch(storage.join(source, name), shards[name], grouped)
                rows = _explode(grouped, plain)
                entry = {"bytes": plain.stat().st_size, "sha256": storage.sha256(str(plain)), "rows": rows}
                copying.place(plain, name)
            return entry

        written = dict(sorted(copying.each(one, shards, _PAIR_THREADS)))
        settings = manifest["files"]["config.yaml"]
        with copying.scratch() as file:
            copying.fetch(storage.join(source, "config.yaml"), settings, file)
            copying.place(file, "config.yaml")
    for split, counts in manifest["counts"].items():
        found = sum(entry["rows"] for name, entry in written.items() if name.startswith(f"data/{split}/"))
        if found != counts["pairs"]:
            raise CappyError(f"SRC={source} has {found} pairs in split {split}, its manifest says {counts['pairs']}; generate it again")
    kept = ("version", "counts", "metric", "lineage", "config")
    summary = {**manifest["summary"], "uri": destination, "dead_letters": 0, "seconds": round(time.monotonic() - start, 1)}
    made = {
        "kind": "pairs",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "command": "cappy push --pairs",
        "made_from": made_from,
        **{key: manifest[key] for key in kept},
        "summary": summary,
        "schema": {field.name: str(field.type) for field in PAIRS},
        "files": written | {"config.yaml": settings},
    }
    storage.publish(destination, dataset_card.write_card(destination, made))
    return _report(destination, "pairs", source, written, written, time.monotonic() - start)


class _Copying:
    """Files on their way to one destination: scratch files, checked reads, writes, progress. Use as a context manager."""

    def __init__(self, destination: str, files: int) -> None:
        remote = storage.is_s3(destination)
        # Beside a local destination, so that a finished file moves there in one rename.
        self._bench = storage.new_temporary_folder("copy") if remote else Path(destination, _BENCH)
        self._folder = storage.FolderWriter(destination)
        self._bar = Bar("copying", files, "files")
        self._lock = threading.Lock()
        self._stopped = False
        self._bytes = 0

    def __enter__(self) -> _Copying:
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

    def fetch(self, uri: str, expected: dict[str, Any], file: Path) -> None:
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


def _explode(grouped: Path, plain: Path) -> int:
    """Write the pairs of a local shard to another local file; return how many."""
    count = 0
    with pq.ParquetFile(grouped) as shard, pq.ParquetWriter(plain, PAIRS, compression="zstd", write_page_checksum=True) as writer:
        waiting: list[pa.Table] = []
        for batch in shard.iter_batches(batch_size=256):
            waiting.append(pair_table(pa.Table.from_batches([batch])))
            count += waiting[-1].num_rows
            if sum(table.nbytes for table in waiting) >= _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return count


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what differs between copies."""
    return {key: value for key, value in manifest.items() if key not in ("writer", "copied_from")}


def _is_there(destination: str, same: Callable[[dict[str, Any]], bool]) -> bool:
    """Whether the destination already has this content, finished; raises `UsageError` when it has another."""
    if not storage.exists(storage.join(destination, storage.MANIFEST)):
        return False
    if not same(storage.published(destination, "DST")):
        raise UsageError(f"DST={destination} already holds another finished run; choose another place, or delete that one first")
    return True


def _own(destination: str, names: Iterable[str]) -> dict[str, int]:
    """Return the sizes of the files that are at the destination; raises `UsageError` when others than `names` are.

    They would stand among the copied ones: a glob over `data/` reads whatever is there.
    """
    there = {name: size for name, size in storage.list_files(destination).items() if not name.startswith(f"{_BENCH}/")}
    strange = sorted(there.keys() - set(names))
    if strange:
        raise UsageError(f"DST={destination} holds other files, {strange[0]} first of {len(strange)}; choose an empty place")
    return there


def _report(
    destination: str, kind: str, source: str, files: dict[str, Any], copied: Collection[str], seconds: float = 0.0
) -> dict[str, Any]:
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
