"""Raw rows of JSONL, Parquet, CSV and JSON files, local or s3://, streamed. Imports no Ray.

Each row comes with its location. A row that cannot be parsed becomes a dead letter. Memory holds one chunk of lines or one record
batch; only a `.json` file (one task or a list of rows) is read whole. An S3 object is first copied to disk and its checksum is
verified, so that a transfer error cannot change or truncate the rows.
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
from cluster.errors import UsageError, first_line
from generation.sources.row import dead_letter

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_MAX_CELL_CHARACTERS = 1 << 27
"""Limit of a CSV cell; Python's default is 2^17."""


def find_data_files(path: str, setting: str = "source.path") -> list[str]:
    """Return the data files of a file path, folder or glob, local or s3://, sorted.

    Raises `UsageError` with the name of `setting` if no data file exists.
    """
    storage.check_uri(path, setting)
    found = [uri for uri in storage.glob(path) if uri.removesuffix(".gz").endswith(SUFFIXES)]
    if not found:
        raise UsageError(f"{setting}={path}: found no {', '.join(SUFFIXES)} (or .gz) file; give a file, a folder or a glob")
    return found


def read_rows(uri: str) -> Iterator[tuple[str, Any]]:
    """Yield `(location, row)` of a file; a row is a JSON value or a `DeadLetter`. A location is `uri:number`, counted from 1.

    Raises `UsageError` for a file that cannot be read at all in the format of its name.
    """
    plain = uri.removesuffix(".gz")
    try:
        if plain.endswith(".parquet"):
            yield from _read_parquet(uri)
        elif plain.endswith(".csv"):
            yield from _read_csv(uri)
        elif plain.endswith(".json"):
            yield from _read_json(uri)
        else:
            yield from _read_json_lines(uri)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"source: {uri} cannot be read: {first_line(error)}; check that the file is complete and in the format of its name"
        ) from None


@contextmanager
def _open(uri: str) -> Iterator[pa.NativeFile]:
    """Open a file as a stream of bytes; a file whose name ends in .gz is decompressed."""
    with storage.local_file(uri) as path, pa.input_stream(path) as stream:
        yield stream


def _read_json_lines(uri: str) -> Iterator[tuple[str, Any]]:
    rest = b""
    number = 0
    with _open(uri) as stream:
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield _parse_json(line, f"{uri}:{number}")
    if rest.strip():
        yield _parse_json(rest, f"{uri}:{number + 1}")


def _parse_json(text: bytes, location: str) -> tuple[str, Any]:
    try:
        return location, json.loads(text)
    except (ValueError, RecursionError) as error:
        return location, dead_letter(location, f"the line is not JSON: {error}", text[:2000].decode("utf-8", "replace"))


def _read_json(uri: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of one task, of a list of rows, or of JSON lines, which many datasets also name `.json`."""
    with _open(uri) as stream:
        head = stream.read(1 << 20)
        first, newline, after = head.partition(b"\n")
        if newline and after.strip() and _is_json_object(first):
            yield from _read_json_lines(uri)
            return
        pieces = [head]
        while chunk := stream.read(1 << 20):
            pieces.append(chunk)
    location, value = _parse_json(b"".join(pieces), uri)
    if isinstance(value, list):
        yield from ((f"{location}:{number}", row) for number, row in enumerate(value, 1))
    else:
        yield location, value


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(uri: str) -> Iterator[tuple[str, Any]]:
    """Yield rows as texts by column name, an empty cell as None; the location is the last line of a row."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    # Bytes that are not UTF-8 are decoded to lone surrogates, so that only their row is rejected.
    with _open(uri) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.DictReader(text)
        try:
            for row in reader:
                location = f"{uri}:{reader.line_num}"
                if None in row:
                    yield location, dead_letter(location, f"the row has more cells than the header's {len(reader.fieldnames or ())}", row)
                else:
                    yield location, {name: cell or None for name, cell in row.items()}
        except csv.Error as error:
            raise UsageError(f"source: {uri} cannot be read as CSV at line {reader.line_num}: {error}; fix that line") from None


def _read_parquet(uri: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with storage.local_file(uri) as path, pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{uri}:{number}", row
    except ValueError as error:
        raise UsageError(f"source: {uri} cannot be read as Parquet: {first_line(error)}; check that the file is complete") from None
