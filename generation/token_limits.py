"""Limit the length of candidates by the lengths of the references of their dataset (`sampler.max_tokens_from: references`).

Pure: imports no Ray and reads no files. The limit of a dataset is `ceil(bytes / 3) + 8` tokens. `bytes` is the 95th percentile over its
sampled train rows of the longest reference, in UTF-8 bytes. References of validation rows are not used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.config import DecodingConfig
from generation.sources.row import Instruction

_SHARE = 0.95
_BYTES_PER_TOKEN = 3
_EXTRA_TOKENS = 8


class ReferenceLengths:
    """The lengths of the references of sampled train rows, by dataset; memory holds one count per length."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[int]] = {}

    def add(self, row: Instruction) -> None:
        """Count a row; validation rows and classification rows have no effect."""
        if row.split == "train" and row.answer_choices is None:
            longest = max(len(text.encode()) for text in row.references)
            self._counts.setdefault(row.dataset, Counter())[longest] += 1

    def limits(self) -> dict[str, int]:
        """Return the limit of each dataset with sampled train rows, in tokens."""
        return {
            dataset: math.ceil(_percentile(counts, _SHARE) / _BYTES_PER_TOKEN) + _EXTRA_TOKENS
            for dataset, counts in sorted(self._counts.items())
        }


def limit_decodings(decodings: Sequence[DecodingConfig], limit: int | None) -> tuple[DecodingConfig, ...]:
    """Return the decodings with `max_tokens` lowered to `limit`; None leaves them unchanged.

    `min_tokens` of a decoding takes precedence over the limit.
    """
    if limit is None:
        return tuple(decodings)
    return tuple(
        each if each.max_tokens <= limit else each.model_copy(update={"max_tokens": max(limit, each.min_tokens)}) for each in decodings
    )


def _percentile(counts: Mapping[int, int], share: float) -> int:
    """Return the smallest value that at least `share` of the counted values do not exceed (nearest rank)."""
    rank, below = math.ceil(share * sum(counts.values())), 0
    for value in sorted(counts):
        below += counts[value]
        if below >= rank:
            return value
    raise ValueError("no counts")
