"""Mixtures: the rows to take from each of several sources, and their order. Reads no files; imports no Ray.

Rows are selected by sequential sampling without replacement (selection sampling). A row is taken with probability
(rows still to take) / (rows left) of its stratum; the random number is a hash of seed and row id. So exactly the requested number
of rows is taken, and all rows of a stratum are equally likely. Memory holds one count per stratum. A separate pass counts the
strata first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from generation.sources.row import DeadLetter, Instruction, hash_to_unit_interval

Rows = Iterable[Instruction | DeadLetter]
Stratum = TypeVar("Stratum")


def t0_caps(counts: Mapping[tuple[str, str | None], int], cap: int) -> dict[tuple[str, str | None], int]:
    """Return the rows to take of each (dataset, template) by T0's rule: at most `cap` / number of templates of the dataset.

    Args:
        counts: rows of each (dataset, template).
        cap: rows per dataset.
    """
    templates = Counter(dataset for dataset, _ in counts)
    return {key: min(count, max(1, cap // templates[key[0]])) for key, count in counts.items()}


def rows_per_part(sizes: Sequence[int], weights: Sequence[float], rows: int | None) -> list[int]:
    """Return the rows to take of each part so that the numbers have the ratio of the weights.

    Args:
        sizes: rows of each part.
        weights: weights of the parts, above 0.
        rows: total rows; None, or more than there are, ends when the first part is used up.
    """
    available = min(size / weight for size, weight in zip(sizes, weights, strict=True)) * sum(weights)
    total = available if rows is None else min(rows, available)
    exact = [total * weight / sum(weights) for weight in weights]
    taken = [min(int(share + 1e-9), size) for share, size in zip(exact, sizes, strict=True)]
    # Rounding down leaves some rows over; the parts with the largest rounding loss get them, if they have more rows.
    for number in sorted(range(len(taken)), key=lambda number: (taken[number] - exact[number], number)):
        if sum(taken) < int(total + 1e-9) and taken[number] < sizes[number]:
            taken[number] += 1
    return taken


def sample_rows(
    rows: Rows, stratum: Callable[[Instruction], Stratum], sizes: Mapping[Stratum, int], wanted: Mapping[Stratum, int], seed: int
) -> Iterator[Instruction | DeadLetter]:
    """Yield exactly `wanted[s]` of the `sizes[s]` rows of each stratum `s = stratum(row)`, in their order, and all dead letters."""
    unseen, to_take = dict(sizes), dict(wanted)
    for row in rows:
        if isinstance(row, DeadLetter):
            yield row
            continue
        key = stratum(row)
        if hash_to_unit_interval(f"{seed}:mixture:{row.id}") * unseen[key] < to_take[key]:
            to_take[key] -= 1
            yield row
        unseen[key] -= 1


def interleave(parts: Sequence[Rows], wanted: Sequence[int]) -> Iterator[Instruction | DeadLetter]:
    """Yield the rows of all parts evenly mixed: any section of the result has nearly the ratio of the whole.

    `wanted` holds the number of rows of each part.
    """
    return (row for _, _, row in heapq.merge(*(_with_position(part, number, wanted[number]) for number, part in enumerate(parts))))


def _with_position(rows: Rows, number: int, wanted: int) -> Iterator[tuple[float, int, Any]]:
    """Yield `(relative position in the part, part number, row)`; the position is in [0, 1]."""
    count = 0
    for row in rows:
        yield (count + 0.5) / max(wanted, 1), number, row
        count += isinstance(row, Instruction)
