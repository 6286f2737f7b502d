"""Caps of a source: leave out rows with a long instruction, and take a fixed number of rows of each dataset by hash.

Reads no files; imports no Ray. The rows that a cap takes do not depend on their order. A larger cap takes all rows of a smaller one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from generation.sources.row import DeadLetter, Instruction, hash_text

_HASH_BYTES = 8


class DatasetCaps:
    """At most `count` rows of each dataset with answer choices, and as many without: the rows with the smallest hashes."""

    def __init__(self, rows: Iterable[Instruction | DeadLetter], count: int, seed: int) -> None:
        """Read `rows` once; memory holds `count` hashes for each dataset."""
        self._seed = seed
        heaps: dict[tuple[str, bool], list[int]] = {}
        kept: dict[tuple[str, bool], set[int]] = {}
        for row in rows:
            if isinstance(row, DeadLetter):
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
        return (row for row in rows if isinstance(row, DeadLetter) or self._hash(row) <= self._largest.get(_group(row), -1))

    def _hash(self, row: Instruction) -> int:
        text = "\0".join((str(self._seed), row.dataset, row.template or "", row.instruction))
        return int.from_bytes(hash_text(text, _HASH_BYTES), "big")


def _group(row: Instruction) -> tuple[str, bool]:
    return row.dataset, row.answer_choices is not None
