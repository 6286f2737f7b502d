"""A published set as windows of training pairs: mixed, in bounded memory, the same for every reader. No Ray, no torch.

The published rows stand task after task, so neighbours are alike. An epoch therefore draws the row groups of all shards by
seed, reads `_LANES` of them side by side, and shuffles blocks of `_BLOCK_ROWS` rows before they are exploded to pairs: a set
up to a block is shuffled as a whole. All of it is a function of (seed, epoch), so a reader that skips to a window gets
exactly the pairs an earlier reader got there.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa

from generation.dataset import Pairs, RegressionSet, concat_tables, explode, open_shard
from training.batch_plan import Size

_LANES = 8
_PIECE_ROWS = 256
_BLOCK_ROWS = 8192
_COLUMNS = ["instruction", "candidates"]

Item = TypeVar("Item")


def count_pairs(dataset: RegressionSet, split: str) -> Size:
    """Return the size of a split once exact repeats are left out, by reading it once. Raises `CappyError` when a shard is damaged."""
    pairs = instructions = 0
    for read in dataset.pairs(split):
        pairs += len(read)
        instructions += len(np.unique(read.groups))
    return Size(pairs, instructions)


def read_windows(
    dataset: RegressionSet, split: str, size: int, seed: int, epoch: int, skip: int = 0, whole: bool = False
) -> Iterator[Pairs]:
    """Yield one epoch of a split as windows of `size` pairs (the last may be smaller), without the first `skip` of them.

    With `whole` they are windows of `size` instructions, each with all its pairs. Holds a block of rows and a window of pairs in
    memory. Raises `CappyError` when a shard is damaged or rows are missing.
    """
    waiting: list[Pairs] = []
    held = 0
    number = 0
    for pairs in _shuffled(dataset, split, seed, epoch):
        waiting.append(pairs)
        held += len(np.unique(pairs.groups)) if whole else len(pairs)
        while held >= size:
            joined = _join(waiting)
            end = int(_starts(joined)[size]) if whole else size
            window, rest = _slice(joined, 0, end), _slice(joined, end, len(joined))
            waiting, held = [rest], held - size
            if number >= skip:
                yield window
            number += 1
    if held and number >= skip:
        yield _join(waiting)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items, each made in a thread while what came before it is worked on; an error comes where its item would have."""
    end = object()
    with ThreadPoolExecutor(1, "cappy-ahead") as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _shuffled(dataset: RegressionSet, split: str, seed: int, epoch: int) -> Iterator[Pairs]:
    """Yield the pairs of an epoch in its order, some rows at a time; `groups` are positions in that order."""
    seen = 0
    for number, block in enumerate(_blocks(_pieces(dataset, split, seed, epoch))):
        order = np.random.default_rng([seed, epoch, 1, number]).permutation(len(block))
        shuffled = block.take(pa.array(order, pa.int64()))
        for start in range(0, len(shuffled), _PIECE_ROWS):
            yield explode(shuffled.slice(start, _PIECE_ROWS), seen)
            seen += min(_PIECE_ROWS, len(shuffled) - start)


def _blocks(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    return (block.combine_chunks() for block in concat_tables(pieces, _BLOCK_ROWS))


def _pieces(dataset: RegressionSet, split: str, seed: int, epoch: int) -> Iterator[pa.Table]:
    """Yield a split's rows in small tables, taken in turn from several row groups at once."""
    groups = [(uri, group) for uri in dataset.shards(split) for group in range(_row_groups(uri))]
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(groups))
    pending = iter([groups[place] for place in order])
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


def _starts(pairs: Pairs) -> np.ndarray:
    """Where each instruction's pairs begin, and where the last one's end."""
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
