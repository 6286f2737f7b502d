"""Group the rows of a source by a key in bounded memory, and merge the repeated responses of a prompt.

Rows are distributed over files by a hash of their key, for example the prompt. So all rows of a key are in one file. Memory holds
`_PENDING_BYTES` of rows while the files are written, and one file while it is read. Imports no Ray.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster import disk
from generation.export_formats import Candidate
from generation.export_source import FLAT

FILE_BYTES = 16 << 20
"""Bytes of a source, compressed as published, for each file of candidates."""
_MOST_FILES = 512
_PENDING_BYTES = 64 << 20
# Candidates that are converted to Python objects at a time.
_ROWS = 4096
# Values of one response that differ by less are the same value: scores of one scorer differ between batches.
_TOLERANCE = 1e-3


def count_files(source_bytes: int) -> int:
    """Return the number of files for the candidates of a source of this size."""
    return min(_MOST_FILES, 1 + source_bytes // FILE_BYTES)


class Partitions:
    """Files of rows with the columns of `schema`, distributed by the hash of the first column, a text.

    Use it as a context manager, then `read` each file. By default the rows are candidates, and the key is the prompt.
    """

    def __init__(self, folder: Path, files: int, schema: pa.Schema = FLAT) -> None:
        self._schema = schema
        self._paths = [folder / f"{number}.arrow" for number in range(files)]
        self._pending: list[list[pa.Table]] = [[] for _ in range(files)]
        self._bytes = 0
        self._writers: list[pa.ipc.RecordBatchFileWriter] = []

    def __enter__(self) -> Partitions:
        with disk.errors_of(self._paths[0].parent):
            self._paths[0].parent.mkdir(parents=True, exist_ok=True)
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            self._writers = [pa.ipc.new_file(str(path), self._schema, options=options) for path in self._paths]
        return self

    def __exit__(self, *error: object) -> None:
        with disk.errors_of(self._paths[0].parent):
            if error[0] is None:
                self._flush()
            for writer in self._writers:
                writer.close()

    def add(self, table: pa.Table) -> None:
        """Distribute the rows of a table; each has a key."""
        keys = table[self._schema.names[0]].combine_chunks().dictionary_encode()
        hashes = np.array([zlib.crc32(text.encode()) for text in keys.dictionary.to_pylist()], np.int64)
        numbers = hashes[keys.indices.to_numpy(zero_copy_only=False)] % len(self._paths) if table.num_rows else np.empty(0, int)
        for number in np.unique(numbers):
            part = table if len(self._paths) == 1 else table.take(pa.array(np.flatnonzero(numbers == number)))
            self._pending[number].append(part)
        self._bytes += table.nbytes
        if self._bytes >= _PENDING_BYTES:
            with disk.errors_of(self._paths[0].parent):
                self._flush()

    def read(self, number: int) -> pa.Table:
        """Return one file as a table."""
        with pa.memory_map(str(self._paths[number])) as file:
            return pa.ipc.open_file(file).read_all()

    def delete(self, number: int) -> None:
        """Free the disk space of one file."""
        self._paths[number].unlink(missing_ok=True)

    def _flush(self) -> None:
        for writer, tables in zip(self._writers, self._pending, strict=True):
            if tables:
                writer.write_table(pa.concat_tables(tables).combine_chunks())
        self._pending = [[] for _ in self._paths]
        self._bytes = 0


def pools(table: pa.Table) -> Iterator[tuple[str, list[tuple[str | None, float | None, str | None]]]]:
    """Yield each prompt with the response, value and source of its candidates; both in the order of the table."""
    if not table.num_rows:
        return
    table = table.combine_chunks()
    encoded = table["prompt"].chunk(0).dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    ends = np.append(starts[1:], len(codes))
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _ROWS, "right")))
        rows = table.take(pa.array(order[starts[first] : ends[last - 1]]))
        prompts, *columns = (rows[name].to_pylist() for name in FLAT.names)
        candidates = list(zip(*columns, strict=True))
        for start, end in zip(starts[first:last] - starts[first], ends[first:last] - starts[first], strict=True):
            yield prompts[start], candidates[start:end]
        first = last


def merge_candidates(
    rows: Iterable[tuple[str | None, float | None, str | None]], sources: frozenset[str], counts: Counter[str], *, valued: bool
) -> list[Candidate]:
    """Return the candidates of a prompt without repeats and contradictions, the largest value first, ties in order.

    Args:
        rows: Response, value and source of each candidate.
        sources: Sources to keep; a candidate without a source is always kept. Empty keeps all.
        counts: Counts of omitted candidates: `empty`, `without_value`, `repeated`, `contradicting`, `other_sources`.
        valued: Whether a candidate needs a value; if not, a candidate without one has the value -inf.

    Repeats of a text have equal values. If their values differ, the value of a reference counts; without one the text is left out.
    """
    texts: dict[str, list[tuple[float, str | None]]] = {}
    for response, value, source in rows:
        text = (response or "").strip()
        if not text:
            counts["empty"] += 1
        elif value is not None and math.isfinite(value):
            texts.setdefault(text, []).append((value, source))
        elif valued:
            counts["without_value"] += 1
        else:
            texts.setdefault(text, []).append((-math.inf, source))
    kept = []
    for text, found in texts.items():
        counts["repeated"] += len(found) - 1
        given = [value for value, source in found if source == "reference"]
        values = given or [value for value, _ in found if value > -math.inf] or [-math.inf]
        if len(values) > 1 and max(values) - min(values) > _TOLERANCE:
            counts["contradicting"] += 1
        elif sources and not any(source is None or source in sources for _, source in found):
            counts["other_sources"] += 1
        else:
            kept.append(Candidate(text, max(values)))
    return sorted(kept, key=lambda each: -each.value)
