"""Draw mismatched references: right answers of other instructions, which are wrong answers of this one. No Ray, no files.

A text is not drawn if it can be right. This is so if its row has the same instruction, or if a metric gives it 1 against a
reference. The metrics are the label metric, and Rouge-L over the words of every script. Such words have no case, punctuation
or Unicode form, so "Yes." is not drawn for "yes". The references of other rows with the same instruction count as references.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence

from cluster.config import Config
from generation import labels
from generation.sources.row import Instruction, fold_text

Pool = Sequence[Instruction]

# Draws for each reference. Draws that are refused because the text can be right have a separate limit.
_DRAWS, _REFUSED_DRAWS = 4, 16


def draw_mismatched(
    rows: Sequence[Instruction], pools: Callable[[Instruction], Sequence[tuple[Pool, int]]], config: Config
) -> list[list[str]]:
    """Return the mismatched references of each row; they depend only on the row, the pools and the seed.

    Args:
        rows: The rows; classification rows get none, because their wrong answers are their other choices.
        pools: Returns the pools of a row, each with the number of texts to draw from it for each reference.
        config: The config with the seed and the label metric.
    """
    found: list[list[str]] = [[] for _ in rows]
    draws = {
        number: _draw(row, pools(row), random.Random(f"{config.seed}:{row.id}"))
        for number, row in enumerate(rows)
        if row.answer_choices is None
    }
    drawn: dict[int, str | None] = dict.fromkeys(draws)
    refused: dict[int, bool] = {}
    # The metric is compiled code over columns, so each round checks one text of every row in one call.
    while drawn:
        texts: dict[int, str] = {}
        for number in drawn:
            try:
                texts[number] = draws[number].send(refused[number]) if number in refused else next(draws[number])
            except StopIteration as stop:
                found[number] = stop.value
        right = labels.are_right(
            list(texts.values()), [rows[number].references + rows[number].also_right for number in texts], config.generate.label
        )
        refused = dict(zip(texts, right, strict=True))
        drawn = dict(texts)
    return found


def _draw(row: Instruction, pools: Sequence[tuple[Pool, int]], draw: random.Random) -> Generator[str, bool, list[str]]:
    """Yield texts to check, take whether each can be right, and return the mismatched references."""
    instruction = fold_text(row.instruction)
    mismatched: list[str] = []
    for pool, each in pools:
        count = each * len(row.references)
        found: list[str] = []
        draws, refused = _DRAWS * count if pool else 0, 0
        while draws and len(found) < count:
            other = draw.choice(pool)
            text = draw.choice(other.references)
            if text in row.references or text in mismatched or text in found:
                draws -= 1
            elif fold_text(other.instruction) == instruction or (yield text):
                refused += 1
                draws -= refused > _REFUSED_DRAWS * count
            else:
                draws -= 1
                found.append(text)
        mismatched += found
    return mismatched
