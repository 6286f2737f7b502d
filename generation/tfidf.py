"""Which texts of a small pool are most like another: the cosine of their words' tf-idf weights. Exact, no model, no files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"[^\W_]+")


class TfidfIndex:
    """A pool of texts to compare with. Words in few of its texts weigh most, those in all (a template's) next to nothing."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_WORD.findall(text.lower())) for text in texts]
        found = Counter(word for each in counts for word in each)
        self._vocabulary = {word: number for number, word in enumerate(found)}
        self._rarity = np.log((1 + len(texts)) / np.fromiter(found.values(), np.float64, len(found)))
        self._text = np.repeat(np.arange(len(texts)), [len(each) for each in counts])
        self._word = np.fromiter((self._vocabulary[word] for each in counts for word in each), np.int64, len(self._text))
        count = np.fromiter((number for each in counts for number in each.values()), np.float64, len(self._text))
        weight = np.log1p(count) * self._rarity[self._word]
        norm = np.sqrt(np.bincount(self._text, weight**2, len(texts)))
        self._weight = weight / np.maximum(norm, 1e-12)[self._text]
        self._size = len(texts)

    def similarities(self, text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return a number per text of the pool that grows with its likeness to `text`, 0 where no word is shared."""
        query = np.zeros(len(self._rarity))
        for word, count in Counter(_WORD.findall(text.lower())).items():
            if word in self._vocabulary:
                number = self._vocabulary[word]
                query[number] = np.log1p(count) * self._rarity[number]
        return np.bincount(self._text, self._weight * query[self._word], self._size).astype(np.float64)
