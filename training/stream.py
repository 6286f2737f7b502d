"""Read a published set as shuffled windows of training pairs, in bounded memory. No Ray, no torch.

The rows of a published set are in the order of their tasks, so neighbours are similar. An epoch therefore

1. shuffles the row groups of all shards,
2. reads `_LANES` row groups side by side,
3. shuffles blocks of `_BLOCK_ROWS` rows and explodes them to pairs. A set of at most one block is shuffled as a whole.

All three are functions of (seed, epoch). A reader that skips to a window gets the same pairs as a reader from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa

from generation.dataset import Pairs, RegressionSet, concat_tables, explode, open_shard
from training.batch_plan import Size

_LANES = 8  # row groups read at the same time
_PIECE_ROWS = 256  # rows read from a row group at a time
_BLOCK_ROWS = 8192  # rows shuffled together
_COLUMNS = ["instruction", "candidates"]

Item = TypeVar("Item")


def count_pairs(dataset: RegressionSet, split: str) -> Size:
    """Read a split and return its number of pairs and instructions, without exact repeats. Raises `CappyError` for a damaged shard."""
    pairs = instructions = 0
    for batch in dataset.pairs(split):
        pairs += len(batch)
        instructions += len(np.unique(batch.groups))
    return Size(pairs, instructions)


def read_windows(
    dataset: RegressionSet, split: str, size: int, seed: int, epoch: int, skip: int = 0, whole: bool = False
) -> Iterator[Pairs]:
    """Yield one epoch of a split as windows of `size` pairs, without the first `skip` windows. The last window may be smaller.

    With `whole` a window has `size` instructions with all their pairs. Holds a block of rows and a window of pairs in memory.
    Raises `CappyError` when a shard is damaged or rows are missing.
    """
    buffered: list[Pairs] = []
    held = 0  # pairs or, with `whole`, instructions in `buffered`
    number = 0
    for pairs in _read_shuffled(dataset, split, seed, epoch):
        buffered.append(pairs)
        held += len(np.unique(pairs.groups)) if whole else len(pairs)
        while held >= size:
            joined = _join(buffered)
            end = int(_instruction_starts(joined)[size]) if whole else size
            window, rest = _slice(joined, 0, end), _slice(joined, end, len(joined))
            buffered, held = [rest], held - size
            if number >= skip:
                yield window
            number += 1
    if held and number >= skip:
        yield _join(buffered)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items, and compute each in a thread while the caller uses the one before. An error is raised in its item's place."""
    end = object()
    with ThreadPoolExecutor(1, "cappy-prefetch") as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _read_shuffled(dataset: RegressionSet, split: str, seed: int, epoch: int) -> Iterator[Pairs]:
    """Yield the pairs of an epoch in shuffled order, a few rows at a time. `groups` are positions of rows in that order."""
    seen = 0
    for number, block in enumerate(_blocks(_pieces(dataset, split, seed, epoch))):
        order = np.random.default_rng([seed, epoch, 1, number]).permutation(len(block))
        shuffled = block.take(pa.array(order, pa.int64()))
        for start in range(0, len(shuffled), _PIECE_ROWS):
            yield explode(shuffled.slice(start, _PIECE_ROWS), seen)
            seen += min(_PIECE_ROWS, len(shuffled) - start)


def _blocks(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables to blocks of at least `_BLOCK_ROWS` rows. The last block may be smaller."""
    return (block.combine_chunks() for block in concat_tables(pieces, _BLOCK_ROWS))


def _pieces(dataset: RegressionSet, split: str, seed: int, epoch: int) -> Iterator[pa.Table]:
    """Yield a split's rows as small tables, round-robin from `_LANES` row groups."""
    dataset.verify(split)
    groups = [(uri, group) for uri in dataset.shards(split) for group in range(_row_groups(uri))]
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(groups))
    pending = iter([groups[number] for number in order])
    lanes: list[Iterator[pa.Table]] = []
    seen = 0
    while True:
        while len(lanes) < _LANES and (group := next(pending, None)) is not None:
            lanes.append(_read_group(*group))
        if not lanes:
            break
        for lane in list(lanes):
            piece = next(lane, None)
            if piece is None:
                lanes.remove(lane)
                continue
            seen += len(piece)
            yield piece
    dataset.check_row_count(split, seen)


def _row_groups(uri: str) -> int:
    with open_shard(uri) as parquet:
        return int(parquet.num_row_groups)


def _read_group(uri: str, group: int) -> Iterator[pa.Table]:
    with open_shard(uri) as parquet:
        for batch in parquet.iter_batches(batch_size=_PIECE_ROWS, row_groups=[group], columns=_COLUMNS):
            yield pa.Table.from_batches([batch])


def _instruction_starts(pairs: Pairs) -> np.ndarray:
    """Return the position of each instruction's first pair, then the number of pairs; int64 (instructions + 1,)."""
    return np.concatenate([[0], np.flatnonzero(np.diff(pairs.groups)) + 1, [len(pairs)]])


def _join(parts: list[Pairs]) -> Pairs:
    return Pairs(
        [text for part in parts for text in part.instructions],
        [text for part in parts for text in part.responses],
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.groups for part in parts]),
    )


def _slice(pairs: Pairs, start: int, stop: int) -> Pairs:
    return Pairs(pairs.instructions[start:stop], pairs.responses[start:stop], pairs.labels[start:stop], pairs.groups[start:stop])
