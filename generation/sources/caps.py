"""Caps of a source: leave out rows with a long instruction, and take a fixed number of rows of each dataset by hash.

Reads no files; imports no Ray. The rows that a cap takes do not depend on their order. A larger cap takes all rows of a smaller one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from generation.sources.row import DeadLetter, Instruction, hash_text

_HASH_BYTES = 8


class DatasetCaps:
    """Caps of the rows of each dataset, with and without answer choices: the rows with the smallest hashes are kept."""

    def __init__(self, rows: Iterable[Instruction | DeadLetter], choice_rows: int | None, other_rows: int | None, seed: int) -> None:
        """Read `rows` once; memory holds as many hashes for each dataset as it keeps rows.

        `choice_rows` is the cap of rows with answer choices, `other_rows` that of the others; None keeps all.
        """
        self._seed = seed
        self._counts = {True: choice_rows, False: other_rows}
        heaps: dict[tuple[str, bool], list[int]] = {}
        kept: dict[tuple[str, bool], set[int]] = {}
        for row in rows:
            if isinstance(row, DeadLetter) or (count := self._counts[row.answer_choices is not None]) is None:
                continue
            heap, hashes = heaps.setdefault(_group(row), []), kept.setdefault(_group(row), set())
            value = self._hash(row)
            if value in hashes:  # a repeated row, which is merged later
                continue
            if len(heap) < count:
                heapq.heappush(heap, -value)
                hashes.add(value)
            elif value < -heap[0]:
                hashes.remove(-heapq.heappushpop(heap, -value))
                hashes.add(value)
        self._largest = {group: -heap[0] for group, heap in heaps.items()}

    def take(self, rows: Iterable[Instruction | DeadLetter]) -> Iterator[Instruction | DeadLetter]:
        """Yield the rows within the caps, in order, and all dead letters."""
        return (row for row in rows if isinstance(row, DeadLetter) or self._keeps(row))

    def _keeps(self, row: Instruction) -> bool:
        unlimited = self._counts[row.answer_choices is not None] is None
        return unlimited or self._hash(row) <= self._largest.get(_group(row), -1)

    def _hash(self, row: Instruction) -> int:
        text = "\0".join((str(self._seed), row.dataset, row.template or "", row.instruction))
        return int.from_bytes(hash_text(text, _HASH_BYTES), "big")


def _group(row: Instruction) -> tuple[str, bool]:
    return row.dataset, row.answer_choices is not None
