"""Raw rows of JSON lines, JSON, CSV, Parquet and Arrow files, local or s3://, streamed. Imports no Ray.

Each row comes with its location. A row that cannot be parsed becomes a dead letter. Memory holds one chunk of lines or one record
batch; only a `.json` file (one task or a list of rows) is read whole. An S3 object is first copied to disk and its checksum is
verified, so that a transfer error cannot change or truncate the rows. Of Parquet and Arrow files only the needed columns are read.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError, first_line
from generation.sources import csv_rows, folders, json_rows
from generation.sources.row import dead_letter

_BATCH_ROWS = 1024


def find_data_files(path: str, setting: str = "source.path") -> list[str]:
    """Return the data files of a file path, folder or glob, local or s3://, sorted.

    Raises `UsageError` with the name of `setting` if no data file exists.
    """
    return [file.uri for file in folders.find(path, setting).files]


def read_rows(uri: str, columns: Container[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield `(location, row)` of a file; a row is a JSON value or a `DeadLetter`. A location is `uri:number`, counted from 1.

    Args:
        uri: the file.
        columns: the columns of a Parquet or Arrow file to read; None reads all columns.

    Raises `UsageError` for a file that cannot be read at all in the format of its name.
    """
    format, compression = folders.file_format(uri)
    try:
        if format in ("parquet", "arrow"):
            yield from _read_arrow(uri, format, columns)
            return
        with _open(uri, compression) as stream:
            if format == "csv":
                # Bytes that are not UTF-8 are decoded to lone surrogates, so that only their row is rejected.
                with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
                    yield from csv_rows.read_rows(text, uri, "\t" if ".tsv" in uri.lower()[-9:] else ",")
            elif format == "json":
                yield from json_rows.read_document(stream, uri)
            else:
                yield from json_rows.read_lines(stream, uri)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"source: {uri} cannot be read: {first_line(error)}; check that the file is complete and in the format of its name"
        ) from None


@contextmanager
def _open(uri: str, compression: str | None) -> Iterator[pa.NativeFile]:
    """Open a file as a stream of decompressed bytes."""
    with storage.local_file(uri) as path, pa.input_stream(str(path), compression=compression) as stream:
        yield stream


def _read_arrow(uri: str, format: str, columns: Container[str] | None) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with storage.local_file(uri) as path, pa.memory_map(str(path)) as file:
            for batch in (_parquet_batches if format == "parquet" else _ipc_batches)(file, uri, columns):
                for errors, row in _rows_of_batch(batch):
                    number += 1
                    location = f"{uri}:{number}"
                    # Without `columns`, an unreadable value can be in a column that no template uses.
                    yield location, dead_letter(location, errors, row) if errors and columns is not None else row
    except (ValueError, pa.ArrowException) as error:
        name = "Parquet" if format == "parquet" else "Arrow"
        raise UsageError(f"source: {uri} cannot be read as {name}: {first_line(error)}; check that the file is complete") from None


def _parquet_batches(file: pa.NativeFile, uri: str, columns: Container[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file) as parquet:
        yield from parquet.iter_batches(batch_size=_BATCH_ROWS, columns=_needed_columns(parquet.schema_arrow, uri, columns))


def _ipc_batches(file: pa.NativeFile, uri: str, columns: Container[str] | None) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file, or of an Arrow stream, which `save_to_disk` of the `datasets` library writes."""
    start = file.read(6)
    file.seek(0)
    if start == b"ARROW1":
        with pa.ipc.open_file(file) as reader:
            batches: Iterable[pa.RecordBatch] = (reader.get_batch(number) for number in range(reader.num_record_batches))
            names = _needed_columns(reader.schema, uri, columns)
            yield from _sliced(batches, names)
    else:
        with pa.ipc.open_stream(file) as reader:
            yield from _sliced(reader, _needed_columns(reader.schema, uri, columns))


def _sliced(batches: Iterable[pa.RecordBatch], names: list[str] | None) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        chosen = batch if names is None else batch.select(names)
        yield from (chosen.slice(start, _BATCH_ROWS) for start in range(0, len(chosen), _BATCH_ROWS))


def _needed_columns(schema: pa.Schema, uri: str, columns: Container[str] | None) -> list[str] | None:
    """Return the names of the needed columns; None if all are needed, or none is, so that an error can name the columns.

    Raises `UsageError` for two columns of one name.
    """
    repeated = [name for name, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise UsageError(f"source: {uri} has the column {', '.join(repeated)} more than once; rename or remove all but one")
    return None if columns is None else [name for name in schema.names if name in columns] or None


def _rows_of_batch(batch: pa.RecordBatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(errors, row)` for each row of a batch; values that Python cannot hold are left out and named in the errors."""
    try:
        rows = [("", row) for row in batch.to_pylist()]
    except (ValueError, OverflowError, pa.ArrowException):
        rows = [_row_of_cells(batch.slice(number, 1)) for number in range(len(batch))]
    has_bytes = any("binary" in str(field.type) for field in batch.schema)
    return ((errors, _decoded(row) if has_bytes else row) for errors, row in rows)


def _row_of_cells(row: pa.RecordBatch) -> tuple[str, dict[str, Any]]:
    values: dict[str, Any] = {}
    errors = []
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            errors.append(f"`{name}` cannot be read: {first_line(error)}")
    return "; ".join(errors), values


def _decoded(value: Any) -> Any:
    """Return a value with bytes decoded as UTF-8; other bytes become lone surrogates, so that only their row is rejected."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {name: _decoded(each) for name, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value
