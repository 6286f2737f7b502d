"""Cut windows of pairs into steps, worker shares and micro-batches. numpy only: no torch, no Ray, no files.

Every cut is a function of (seed, epoch, window) and the lengths of the pairs. All workers compute the same plan, and a resumed
run computes the plan of the unbroken run. An objective that compares candidates needs all candidates of an instruction in one
forward pass. Its cuts therefore keep instructions whole.

Arrays named `lengths` are int64 (pairs,), in tokens. Arrays named `groups` are int64 (pairs,), equal for the candidates of one
instruction. Arrays named `rows` are positions in a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # the config needs pydantic and the encoding needs torch
    from cluster.config import TrainingConfig
    from training.encoding import Encoded


class Size(NamedTuple):
    """Number of pairs and of instructions in a split or in a step."""

    pairs: int
    instructions: int
    """Instructions with at least one pair."""


@dataclass(frozen=True)
class Window:
    """A few thousand tokenised pairs that are shuffled and sorted by length together. Every worker has the same windows."""

    epoch: int
    number: int
    """Position in its epoch, from 0."""
    encoded: Encoded
    labels: np.ndarray
    """float32 (pairs,), in [0, 1]."""
    groups: np.ndarray
    """int64 (pairs,): equal for the candidates of one instruction, different between instructions of the window."""


@dataclass(frozen=True)
class Step:
    """The part of one optimizer step that one worker computes."""

    index: int
    """Position in the whole run, from 0."""
    window: Window
    size: Size
    """Pairs and instructions of the step, summed over all workers."""
    weight: float
    """Factor of the step's loss in its gradient. It is 1 for steps of equal pairs.

    For steps of equal tokens it is the step's number of pairs divided by the mean over the steps of the window."""
    micro_batches: list[np.ndarray]
    """Rows of the window for each forward pass of this worker; empty when the step has fewer pairs than workers."""
    passes: int
    """Forward passes of this worker, with empty ones. Workers that share weights (FSDP) all make the same number."""
    last_of_window: bool


def window_size(size: Size, config: TrainingConfig) -> int:
    """Return the pairs of a window or, for an objective that compares candidates, the instructions that have about as many pairs."""
    if not config.objective.grouped:
        return config.window
    return max(round(config.window * size.instructions / size.pairs), 1)


def steps_in_epoch(size: Size, config: TrainingConfig) -> int:
    """Return the optimizer steps of an epoch of a split with this size. No step crosses the end of a window."""
    window = window_size(size, config)
    full, rest = divmod(size.instructions if config.objective.grouped else size.pairs, window)
    return full * _steps_in_window(window, size, config) + (_steps_in_window(rest, size, config) if rest else 0)


def position(step: int, size: Size, config: TrainingConfig) -> tuple[int, int, int]:
    """Return (epoch, window in the epoch, step in the window) of a step of the run, each from 0."""
    epoch, within = divmod(step, steps_in_epoch(size, config))
    return epoch, *divmod(within, _steps_in_window(window_size(size, config), size, config))


def _steps_in_window(held: int, size: Size, config: TrainingConfig) -> int:
    """Return the steps of a window of `held` pairs or, for an objective that compares candidates, `held` instructions."""
    if not config.objective.grouped:
        return -(-held // config.batch_size)
    return count_steps(held, config.batch_size, size.pairs / size.instructions)


def count_steps(instructions: int, batch_size: int, pairs_per_instruction: float) -> int:
    """Return the number of steps of about `batch_size` pairs in a window of whole instructions, from 1 to `instructions`."""
    return min(max(round(instructions * pairs_per_instruction / batch_size), 1), instructions)


def plan_steps(
    windows: Iterable[Window], config: TrainingConfig, seed: int, rank: int, world: int, first: int, size: Size
) -> Iterator[Step]:
    """Yield the steps of worker `rank` of `world` workers, from step `first` of the run.

    `windows` starts with the window that contains step `first`. `size` is the size of the split.

    The rows of a step are sorted by length and dealt to the workers in alternating order (0, 1, 1, 0, ...). All workers get the
    same number of pairs, give or take one, and about as many tokens. For an objective that compares candidates, whole instructions
    are dealt (`deal_instructions`).
    """
    index = first
    skip = position(first, size, config)[2]
    for window in windows:
        lengths, groups = window.encoded.lengths, window.groups
        if config.objective.grouped:
            count = _steps_in_window(len(np.unique(groups)), size, config)
            steps = cut_instructions(lengths, groups, count, np.random.default_rng([seed, window.epoch, 2, window.number]))
        else:
            steps = cut_pairs(lengths, config, seed, window.epoch, window.number)
        for number, rows in enumerate(steps):
            if number < skip:
                continue
            shares = {rank: _micro_batches(window, rows, rank, world, config)}
            if config.parallel == "fsdp":  # every forward pass gathers weights from all workers
                shares |= {other: _micro_batches(window, rows, other, world, config) for other in range(world)}
            passes = max(1, *map(len, shares.values()))
            step_size = Size(len(rows), len(np.unique(groups[rows])))
            weight = len(rows) * len(steps) / len(lengths) if config.batch_by == "tokens" else 1.0
            yield Step(index, window, step_size, weight, shares[rank], passes, number == len(steps) - 1)
            index += 1
        skip = 0


def cut_pairs(lengths: np.ndarray, config: TrainingConfig, seed: int, epoch: int, window: int) -> list[np.ndarray]:
    """Cut a window into steps of pairs of similar length, in random order. Each row is in exactly one step.

    With `batch_by: pairs` every step but one has `batch_size` rows. With `batch_by: tokens` the same number of steps have about
    equal tokens.
    """
    draw = np.random.default_rng([seed, epoch, 2, window])
    shuffled = draw.permutation(len(lengths))
    ordered = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    count = -(-len(lengths) // config.batch_size)
    if config.batch_by == "tokens":
        steps = _split_evenly(ordered, lengths[ordered], count)
    else:
        sizes = np.full(count, config.batch_size)
        # The smaller step is at a random position: at the end it would always hold the longest pairs.
        sizes[draw.integers(0, count)] -= count * config.batch_size - len(lengths)
        steps = np.split(ordered, np.cumsum(sizes)[:-1])
    return [steps[number] for number in draw.permutation(count)]


def cut_instructions(lengths: np.ndarray, groups: np.ndarray, count: int, draw: np.random.Generator) -> list[np.ndarray]:
    """Cut a window into `count` steps of whole instructions, in random order. Each row is in exactly one step.

    The instructions of a step have a similar longest pair, and the steps have about as many pairs. There must be at least `count`
    instructions.
    """
    members = rows_by_group(groups)
    shuffled = draw.permutation(len(members))
    longest = np.array([lengths[members[number]].max() for number in shuffled])
    ordered = shuffled[np.argsort(longest, kind="stable")]
    parts = _split_evenly(ordered, np.array([len(members[number]) for number in ordered]), count)
    steps = [np.concatenate([members[number] for number in part]) for part in parts]
    return [steps[number] for number in draw.permutation(count)]


def deal_instructions(rows: np.ndarray, lengths: np.ndarray, groups: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Return the rows of worker `rank` in a step, whole instructions. Empty with fewer instructions than workers.

    The instruction with the most tokens is dealt first, each one to the worker with the fewest tokens so far.
    """
    members = [rows[each] for each in rows_by_group(groups[rows])]
    tokens = np.array([lengths[each].sum() for each in members], np.int64)
    dealt = np.zeros(world, np.int64)
    mine: list[int] = []
    for number in np.argsort(-tokens, kind="stable").tolist():
        worker = int(dealt.argmin())
        dealt[worker] += tokens[number]
        mine += [number] if worker == rank else []
    return np.concatenate([rows[:0], *(members[number] for number in sorted(mine))])


def batch_by_tokens(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Sort pairs by length and cut them into batches of at most `budget` padded tokens (pairs x longest pair).

    A longer pair is its own batch. Returns positions in `lengths`; each pair is in exactly one batch.
    """
    order = np.argsort(lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end - start + 1) * lengths[order[end]] > budget:
            batches.append(order[start:end])
            start = end
    return batches


def batch_instructions(rows: np.ndarray, lengths: np.ndarray, groups: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut a worker's rows of a step into batches of whole instructions, of at most `budget` padded tokens each.

    A larger instruction is its own batch, so memory must hold all its candidates together.
    """
    members = rows_by_group(groups[rows])
    if not members:
        return []
    batches: list[list[np.ndarray]] = [[]]
    order = np.argsort([lengths[rows[each]].max() for each in members], kind="stable")
    for number in order:
        added = [*batches[-1], rows[members[number]]]
        padded_tokens = sum(map(len, added)) * max(int(lengths[each].max()) for each in added)
        if batches[-1] and padded_tokens > budget:
            batches.append([rows[members[number]]])
        else:
            batches[-1] = added
    return [np.concatenate(batch) for batch in batches]


def rows_by_group(groups: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each group. The groups are in the order of their first position."""
    if not len(groups):
        return []
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[number]
    order = np.argsort(rank, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(rank[order])) + 1)


def _micro_batches(window: Window, rows: np.ndarray, rank: int, world: int, config: TrainingConfig) -> list[np.ndarray]:
    """Return the rows of each forward pass of worker `rank` in a step."""
    lengths, groups = window.encoded.lengths, window.groups
    if config.objective.grouped:
        return batch_instructions(deal_instructions(rows, lengths, groups, rank, world), lengths, groups, config.micro_batch_tokens)
    turn, seat = np.divmod(np.arange(len(rows)), world)
    mine = rows[np.where(turn % 2, world - 1 - seat, seat) == rank]
    return [mine[batch] for batch in batch_by_tokens(lengths[mine], config.micro_batch_tokens)] if len(mine) else []


def _split_evenly(items: np.ndarray, sizes: np.ndarray, count: int) -> list[np.ndarray]:
    """Cut `items` into `count` non-empty runs of about the same total size; `sizes` has the size of each item."""
    run = np.arange(1, count)
    sums = np.cumsum(sizes)
    ends = np.searchsorted(sums, sums[-1] * run / count) + 1
    # Each run has one item at least and leaves one for each run behind it.
    ends = np.minimum(np.maximum.accumulate(ends - run), len(items) - count) + run
    return np.split(items, ends)
