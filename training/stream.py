"""Read a published set as shuffled windows of training pairs, in bounded memory. No Ray, no torch.

The rows of a published set are in the order of their tasks, so neighbours are similar. An epoch therefore

1. shuffles the row groups of all shards,
2. reads `_LANES` row groups side by side,
3. shuffles blocks of `_BLOCK_ROWS` rows and explodes them to pairs. A set of at most one block is shuffled as a whole.

All three are functions of (seed, epoch). A reader that skips to a window gets the same pairs as a reader from the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from generation.dataset import Pairs, RegressionSet, concat_tables, explode, open_shard
from generation.schema import DATASET
from training.batch_plan import Size

_LANES = 8  # row groups read at the same time
_PIECE_ROWS = 256  # rows read from a row group at a time
_BLOCK_ROWS = 8192  # rows shuffled together
_COLUMNS = ["instruction", "candidates"]

Item = TypeVar("Item")


def count_pairs(dataset: RegressionSet, split: str, seed: int = 0, held_out: float = 0.0) -> Size:
    """Read a split and return its number of pairs and instructions, without exact repeats and without held-out instructions.

    Raises `CappyError` for a damaged shard.
    """
    pairs = instructions = 0
    for batch in dataset.pairs(split):
        groups = batch.groups[~are_held_out(batch.instructions, seed, held_out)] if held_out else batch.groups
        pairs += len(groups)
        instructions += len(np.unique(groups))
    return Size(pairs, instructions)


def are_held_out(instructions: Sequence[str], seed: int, share: float) -> np.ndarray:
    """Return whether each instruction is in the held-out share, bool (instructions,). It is a function of the seed and the text."""
    return np.array([_position(seed, text) < share for text in instructions], bool)


def _position(seed: int, instruction: str) -> float:
    """Return a number in [0, 1) from a hash of the seed and the text."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{instruction}".encode(), digest_size=6).digest()) / 2**48


def read_held_out(dataset: RegressionSet, split: str, seed: int, share: float, most: int) -> pa.Table:
    """Return the held-out rows with sampled candidates, at most `most` of them, in the order of a hash of their instructions."""
    found: list[dict[str, Any]] = []
    for table in dataset.batches(split, columns=["dataset", *_COLUMNS]):
        kept = table.filter(pa.array(are_held_out(table["instruction"].to_pylist(), seed, share)))
        found += [row for row in kept.to_pylist() if any(each["source"] == "sampled" for each in row["candidates"])]
        found = sorted(found, key=lambda row: _position(seed, row["instruction"]))[:most]
    return pa.Table.from_pylist(found, pa.schema([DATASET.field(name) for name in ("dataset", *_COLUMNS)]))


def read_windows(
    dataset: RegressionSet, split: str, size: int, seed: int, epoch: int, skip: int = 0, whole: bool = False, held_out: float = 0.0
) -> Iterator[Pairs]:
    """Yield one epoch of a split as windows of `size` pairs, without the first `skip` windows. The last window may be smaller.

    Instructions of the share `held_out` are left out. With `whole` a window has `size` instructions with all their pairs. Holds a block of
    rows and a window of pairs in memory.
    Raises `CappyError` when a shard is damaged or rows are missing.
    """
    buffered: list[Pairs] = []
    held = 0  # pairs or, with `whole`, instructions in `buffered`
    number = 0
    for pairs in _read_shuffled(dataset, split, seed, epoch, held_out):
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


def _read_shuffled(dataset: RegressionSet, split: str, seed: int, epoch: int, held_out: float) -> Iterator[Pairs]:
    """Yield the pairs of an epoch in shuffled order, a few rows at a time. `groups` are positions of rows in that order."""
    seen = 0
    pieces = _pieces(dataset, split, seed, epoch)
    if held_out:
        pieces = (each.filter(pa.array(~are_held_out(each["instruction"].to_pylist(), seed, held_out))) for each in pieces)
    for number, block in enumerate(_blocks(pieces)):
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
