"""Raw rows out of files, streaming: JSONL, Parquet, CSV and JSON, on disk or s3://.

A row comes with its place; one that cannot be parsed is a dead letter there. Lines and record batches are held one chunk at a
time; only a `.json` file (a task, or a list of rows) is read whole. An object is copied to disk and checked first, so that a bad wire
to S3 cannot change or shorten it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError
from generation.sources.row import dead_letter

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_CELL = 1 << 27
"""Characters a CSV cell may have; Python's own limit is 2^17."""


def find_data_files(path: str, setting: str = "source.path") -> list[str]:
    """Return the data files of a path, folder or glob, local or s3://, sorted.

    Raises `UsageError` naming `setting` where there is none.
    """
    storage.check_uri(path, setting)
    found = [uri for uri in storage.glob(path) if uri.removesuffix(".gz").endswith(SUFFIXES)]
    if not found:
        raise UsageError(f"{setting}={path}: no {', '.join(SUFFIXES)} (or .gz) file is there; give a file, a folder or a glob")
    return found


def read_rows(uri: str) -> Iterator[tuple[str, Any]]:
    """Yield `(place, row)` of a file, a row being what JSON can hold or a `DeadLetter`.

    Raises `UsageError` for a file that is not what its name says, as a whole.
    """
    plain = uri.removesuffix(".gz")
    try:
        if plain.endswith(".parquet"):
            yield from _parquet(uri)
        elif plain.endswith(".csv"):
            yield from _csv(uri)
        elif plain.endswith(".json"):
            yield from _json(uri)
        else:
            yield from _json_lines(uri)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"source: {uri} cannot be read: {str(error).splitlines()[0]}") from None


@contextmanager
def _opened(uri: str) -> Iterator[pa.NativeFile]:
    """The bytes of a file; a name ending in .gz is decompressed."""
    with storage.local_file(uri) as path, pa.input_stream(path) as stream:
        yield stream


def _json_lines(uri: str) -> Iterator[tuple[str, Any]]:
    rest = b""
    number = 0
    with _opened(uri) as stream:
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield _parse(line, f"{uri}:{number}")
    if rest.strip():
        yield _parse(rest, f"{uri}:{number + 1}")


def _parse(text: bytes, where: str) -> tuple[str, Any]:
    try:
        return where, json.loads(text)
    except (ValueError, RecursionError) as error:
        return where, dead_letter(where, f"the line is not JSON: {error}", text[:2000].decode("utf-8", "replace"))


def _json(uri: str) -> Iterator[tuple[str, Any]]:
    """One task, a list of rows, or (many sets say `.json` for it) JSON lines."""
    with _opened(uri) as stream:
        head = stream.read(1 << 20)
        first, newline, after = head.partition(b"\n")
        if newline and after.strip() and _is_object(first):
            yield from _json_lines(uri)
            return
        pieces = [head]
        while chunk := stream.read(1 << 20):
            pieces.append(chunk)
    where, value = _parse(b"".join(pieces), uri)
    if isinstance(value, list):
        yield from ((f"{where}:{number}", row) for number, row in enumerate(value, 1))
    else:
        yield where, value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _csv(uri: str) -> Iterator[tuple[str, Any]]:
    """Rows as texts by column name, empty cells as null; the place is the line a row ends on."""
    csv.field_size_limit(_CELL)
    # Bytes that are no text come through as lone surrogates, so that only their row is refused.
    with _opened(uri) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.DictReader(text)
        try:
            for row in reader:
                where = f"{uri}:{reader.line_num}"
                if None in row:
                    yield where, dead_letter(where, f"the row has more cells than the header's {len(reader.fieldnames or ())}", row)
                else:
                    yield where, {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise UsageError(f"source: {uri} cannot be read as CSV at line {reader.line_num}: {error}") from None


def _parquet(uri: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with storage.local_file(uri) as path, pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{uri}:{number}", row
    except ValueError as error:
        raise UsageError(f"source: {uri} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
