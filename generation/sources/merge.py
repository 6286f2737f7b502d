"""Merge the repeated rows of a source in bounded memory; imports no Ray.

Rows with the same dataset, template, split, instruction, answer choices and own columns become one row with the references of all,
in the order of first appearance. Rows are distributed over `_PARTITIONS` by a hash of their instruction, so equal rows are in the
same partition. Memory holds `_CHUNK_BYTES` of each partition, and the rows of one partition; other rows are in a temporary
folder. A small source stays in memory. 10 million rows of 1 KB need about 4 GB in the folder.
"""

from __future__ import annotations

import heapq
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cluster.errors import CappyError, first_line
from generation.sources.row import DeadLetter, Instruction, fold_text, hash_text

_PARTITIONS = 1024
# Bytes of text in memory before a partition is written to its file: 32 MiB for all partitions.
_CHUNK_BYTES = 1 << 15

_CODEC = pa.Codec("zstd", compression_level=1)


class _Record(NamedTuple):
    """A row in a partition; records are ordered by `position`, the number of the row in the source."""

    position: int
    is_letter: bool
    fields: tuple[Any, ...]
    """The fields of the `Instruction` or `DeadLetter`, in order. A tuple needs less space than an object."""


class _Partition:
    """A list of records that is written to a file in chunks; the last chunk stays in memory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written = 0
        self._pending: list[_Record] = []
        self._bytes = 0

    def append(self, record: _Record) -> None:
        self._pending.append(record)
        self._bytes += 200 + sum(_text_length(value) for value in record.fields)
        if self._bytes >= _CHUNK_BYTES:
            data = pickle.dumps(self._pending, protocol=5)
            try:
                with self._file.open("ab") as file:
                    pickle.dump((len(data), _CODEC.compress(data, asbytes=True)), file)
                    self._written = file.tell()
            except OSError as error:
                raise CappyError(
                    f"{self._file.parent}: the rows of the source cannot be stored to merge repeated rows ({first_line(error)}); "
                    f"free space there, or set TMPDIR to a folder with more"
                ) from None
            self._pending, self._bytes = [], 0

    def __iter__(self) -> Iterator[_Record]:
        position = 0
        while position < self._written:
            # A process may have fewer open files than there are partitions, so none stays open between two chunks.
            with self._file.open("rb") as file:
                file.seek(position)
                length, compressed = pickle.load(file)
                position = file.tell()
            yield from pickle.loads(_CODEC.decompress(compressed, length, asbytes=True))
        yield from self._pending

    def delete(self) -> None:
        """Free memory and disk."""
        self._pending = []
        self._file.unlink(missing_ok=True)


class MergedRows:
    """The rows and dead letters of a source without repeats, in order. Each iteration reads them from the start."""

    def __init__(self, partitions: list[_Partition], merged: int) -> None:
        self._partitions = partitions
        self.merged = merged
        """Number of rows that were merged into an earlier row."""

    def __iter__(self) -> Iterator[Instruction | DeadLetter]:
        # Positions are unique, so records are never compared by their fields.
        for _, is_letter, fields in heapq.merge(*self._partitions):
            yield DeadLetter(*fields) if is_letter else Instruction(*fields)


@contextmanager
def merge_rows(rows: Iterable[Instruction | DeadLetter]) -> Iterator[MergedRows]:
    """Read rows once and yield them as `MergedRows`, which can be read several times inside the block.

    Raises `CappyError` if the temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="cappy-rows-") as folder:
        read = [_Partition(Path(folder, f"read-{number}")) for number in range(_PARTITIONS)]
        for position, row in enumerate(rows):
            is_letter = isinstance(row, DeadLetter)
            number = position if isinstance(row, DeadLetter) else int.from_bytes(hash_text(fold_text(row.instruction), 2), "big")
            read[number % _PARTITIONS].append(_Record(position, is_letter, tuple(vars(row).values())))
        unique, merged = [], 0
        for number, partition in enumerate(read):
            records, repeats = _merge_records(partition)
            merged += repeats
            partition.delete()
            unique.append(_Partition(Path(folder, f"merged-{number}")))
            for record in records:
                unique[-1].append(record)
        yield MergedRows(unique, merged)


def _merge_records(records: Iterable[_Record]) -> tuple[list[_Record], int]:
    """Return the records of one partition without repeated rows, in order, and the number of repeats."""
    letters: list[_Record] = []
    found: dict[tuple[Any, ...], tuple[int, Instruction, dict[str, None]]] = {}
    repeats = 0
    for record in records:
        if record.is_letter:
            letters.append(record)
            continue
        row = Instruction(*record.fields)
        key = (row.dataset, row.template, row.split, row.instruction, row.answer_choices, row.own)
        repeats += key in found
        _, _, references = found.setdefault(key, (record.position, row, {}))
        references.update(dict.fromkeys(row.references))
    right: dict[str, dict[str, None]] = {}
    for _, row, references in found.values():
        right.setdefault(fold_text(row.instruction), {}).update(references)
    ids: set[tuple[Any, ...]] = set()
    merged = list(letters)
    for position, row, references in found.values():
        fields = vars(row) | {"references": tuple(references)}
        # Choices make the wrong answers of a classification row, so it needs no `also_right`.
        if row.answer_choices is None:
            fields["also_right"] = tuple(text for text in right[fold_text(row.instruction)] if text not in references)
        identity = (row.dataset, row.template, row.split, row.instruction, fields["references"], row.own)
        fields["id_has_choices"] = identity in ids
        ids.add(identity)
        merged.append(_Record(position, False, tuple(fields.values())))
    return sorted(merged), repeats


def _text_length(value: Any) -> int:
    """Return the number of characters of a field that is a text or several texts, else 0."""
    if isinstance(value, tuple):
        return sum(map(len, value)) + 64 * len(value)
    return len(value) if isinstance(value, str) else 0
