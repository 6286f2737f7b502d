"""Several sources as one: which rows of each are taken, and in which order. Pure: rows in, rows out.

A row is taken or left by a number drawn from (seed, row id) and how many of its stratum are still to be taken of how many are
left, so exactly as many are taken as wanted, each row as likely as another, with nothing held but a count a stratum. The
strata's sizes are counted beforehand, in a pass of their own.
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
    """Return how many rows of each (dataset, template) T0's rule takes: at most `cap` / number of the dataset's templates."""
    templates = Counter(dataset for dataset, _ in counts)
    return {key: min(count, max(1, cap // templates[key[0]])) for key, count in counts.items()}


def rows_per_part(sizes: Sequence[int], weights: Sequence[float], rows: int | None) -> list[int]:
    """Return how many rows each part gives so that they stand in the ratio of their weights: `rows` in all, or as many as
    there are until the first part is used up."""
    whole = min(size / weight for size, weight in zip(sizes, weights, strict=True)) * sum(weights)
    total = whole if rows is None else min(rows, whole)
    exact = [total * weight / sum(weights) for weight in weights]
    taken = [min(int(share + 1e-9), size) for share, size in zip(exact, sizes, strict=True)]
    # What rounding down left over goes to the parts that lost most, where they have it.
    for number in sorted(range(len(taken)), key=lambda number: (taken[number] - exact[number], number)):
        if sum(taken) < int(total + 1e-9) and taken[number] < sizes[number]:
            taken[number] += 1
    return taken


def sample_rows(
    rows: Rows, stratum: Callable[[Instruction], Stratum], sizes: Mapping[Stratum, int], wanted: Mapping[Stratum, int], seed: int
) -> Iterator[Instruction | DeadLetter]:
    """Yield exactly `wanted[s]` of the `sizes[s]` rows of each stratum `s = stratum(row)`, in order; dead letters all."""
    left, missing = dict(sizes), dict(wanted)
    for row in rows:
        if isinstance(row, DeadLetter):
            yield row
            continue
        key = stratum(row)
        if hash_to_unit_interval(f"{seed}:mixture:{row.id}") * left[key] < missing[key]:
            missing[key] -= 1
            yield row
        left[key] -= 1


def interleave(parts: Sequence[Rows], wanted: Sequence[int]) -> Iterator[Instruction | DeadLetter]:
    """Yield the rows of all parts so that any stretch of them stands in nearly the ratio of the whole."""
    return (row for _, _, row in heapq.merge(*(_placed(part, number, wanted[number]) for number, part in enumerate(parts))))


def _placed(rows: Rows, number: int, wanted: int) -> Iterator[tuple[float, int, Any]]:
    done = 0
    for row in rows:
        yield (done + 0.5) / max(wanted, 1), number, row
        done += isinstance(row, Instruction)
