"""Cross-fitting: score the candidates of train rows by models that were trained without them. No torch, no Ray, no files.

The scores of a scorer are too good on the rows that it was trained on. The gate of `cappy adapt` and the fitted selection are decided
and fitted on train rows, so they use held-out scores.

Shapes: C candidates of one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from generation.dataset import explode
from training.validation import Floats, scores_by_row

Score = Callable[[Sequence[str], Sequence[str]], Floats]
"""Takes instructions and responses, returns a score for each pair."""


def cross_fit(rows: pa.Table, folds: int, seed: int, train: Callable[[frozenset[str]], Score]) -> list[Floats]:
    """Return the held-out scores of the candidates of each row, as `score_candidates` does.

    The instructions are dealt into `folds` parts (`deal_folds`). For each part `train` gets its instructions, trains on other rows
    only, and returns a function that scores the part. With fewer distinct instructions than `folds`, each part has one instruction.

    Args:
        rows: rows with columns `instruction` and `candidates`.
        folds: number of parts, at least 2. `train` is called once for each.
        seed: seed of the parts.
        train: trains a model without the given instructions.

    Raises `ValueError` if the rows have fewer than two distinct instructions.
    """
    texts = rows["instruction"].to_pylist()
    parts = deal_folds(texts, folds, seed)
    if not len(parts) or parts.max() < 1:
        raise ValueError(f"cross-fitting needs two distinct instructions or more; the rows have {len(set(texts))}")
    scores: list[Floats] = [np.empty(0)] * len(rows)
    for part in range(parts.max() + 1):
        positions = np.flatnonzero(parts == part)
        held_out = rows.take(pa.array(positions))
        score = train(frozenset(held_out["instruction"].to_pylist()))
        for position, values_C in zip(positions.tolist(), score_candidates(held_out, score), strict=True):
            scores[position] = values_C
    return scores


def deal_folds(instructions: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Return the part of each instruction, int64 (rows,), from 0 to `folds` - 1.

    The distinct instructions are dealt in the order of a hash of the seed and the text. So the sizes of the parts differ by at most
    one, equal instructions have the same part, and the order of the rows does not matter.
    """
    distinct = sorted(set(instructions), key=lambda text: (hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=12).digest(), text))
    part_of = {text: number % folds for number, text in enumerate(distinct)}
    return np.array([part_of[text] for text in instructions], np.int64)


def remember(score: Score) -> Score:
    """Return the function with a memory: it scores each different pair once."""
    known: dict[tuple[str, str], float] = {}

    def scored(instructions: Sequence[str], responses: Sequence[str]) -> Floats:
        pairs = list(zip(instructions, responses, strict=True))
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        if missing:
            values = score([instruction for instruction, _ in missing], [response for _, response in missing])
            known.update(zip(missing, np.asarray(values, np.float64).tolist(), strict=True))
        return np.array([known[pair] for pair in pairs], np.float64)

    return scored


def score_candidates(rows: pa.Table, score: Score) -> list[Floats]:
    """Return the scores of the candidates of each row, float64 (C,), in the order of `candidates`. Repeats are scored once."""
    pairs = explode(rows)
    scores = np.asarray(score(pairs.instructions, pairs.responses), np.float64)
    candidates = rows["candidates"].to_pylist()
    return [
        np.array([score_of[each["response"]] for each in row], np.float64)
        for row, score_of in zip(candidates, scores_by_row(len(rows), pairs, scores), strict=True)
    ]
