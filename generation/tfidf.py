"""Similarity of texts by the cosine of their tf-idf word vectors. Exact; imports no model and reads no files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"[^\W_]+")


class TfidfIndex:
    """The tf-idf vectors of a small pool of texts.

    A word has tf-idf weight log(1 + count) * log((1 + T) / (texts with the word)), with T texts in the pool. A word of all
    texts, such as a word of their template, has a weight near 0.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_WORD.findall(text.lower())) for text in texts]
        text_counts = Counter(word for each in counts for word in each)
        self._vocabulary = {word: number for number, word in enumerate(text_counts)}
        self._idf = np.log((1 + len(texts)) / np.fromiter(text_counts.values(), np.float64, len(text_counts)))
        # A sparse matrix in coordinate form: text, word and weight of each entry.
        self._text = np.repeat(np.arange(len(texts)), [len(each) for each in counts])
        self._word = np.fromiter((self._vocabulary[word] for each in counts for word in each), np.int64, len(self._text))
        count = np.fromiter((number for each in counts for number in each.values()), np.float64, len(self._text))
        weight = np.log1p(count) * self._idf[self._word]
        norm = np.sqrt(np.bincount(self._text, weight**2, len(texts)))
        self._weight = weight / np.maximum(norm, 1e-12)[self._text]
        self._size = len(texts)

    def similarities(self, text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the similarity of each text of the pool to `text`, shape (texts,); 0 if they share no word.

        The values are cosines times the norm of the vector of `text`, so their order is that of the cosines.
        """
        query = np.zeros(len(self._idf))
        for word, count in Counter(_WORD.findall(text.lower())).items():
            if word in self._vocabulary:
                number = self._vocabulary[word]
                query[number] = np.log1p(count) * self._idf[number]
        return np.bincount(self._text, self._weight * query[self._word], self._size).astype(np.float64)
