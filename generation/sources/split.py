"""The train/validation split: a hash of the underlying example decides. Reads no files; imports no Ray.

All instructions made from one example get the same split. The key of a row is its `example` field, if it has one. That is the
longest text of a raw row for PromptSource, and the input of an instance for task files. A rendered row has no `example`, so its
longest sentence is the key. The longest sentence mostly comes from the passage or question and not from the template.
`python -m benchmarks.split_leak` measures how often.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

import numpy as np

from generation.sources.row import hash_text, hash_to_unit_interval

# A colon ends a sentence too: the text before a colon is mostly a word of the template, e.g. `Review:` or `Question:`.
_SENTENCE_END = re.compile(r'[.!?:]+(?=\s|$)|["\n]')
_WORD = re.compile(r"[^\W_]+")


def assign_split(key: str, validation_fraction: float) -> str:
    """Return `train` or `validation` for the key of an example; `validation_fraction` is in [0, 1)."""
    return "validation" if hash_to_unit_interval(key) < validation_fraction else "train"


def longest_sentence(text: str) -> str:
    """Return the lower-cased words of the longest sentence, quotation or line of a text, joined by spaces.

    A text without words is returned stripped.
    """
    sentences = [" ".join(_WORD.findall(sentence)) for sentence in _SENTENCE_END.split(text.lower())]
    return max(sentences, key=lambda sentence: (len(sentence), sentence)) or text.strip()


class HeldOutTexts:
    """A set of the instruction texts of the validation split, stored as sorted 64-bit hashes (8 bytes per text)."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        # Hashes that are not merged into `_hashes` yet: they are sorted in bulk at the next lookup.
        self._unsorted = array("Q", map(_hash, texts))
        self._hashes = np.empty(0, np.uint64)

    def add(self, text: str) -> None:
        """Add a text; surrounding white space is ignored."""
        self._unsorted.append(_hash(text))

    def __contains__(self, text: str) -> bool:
        if self._unsorted:
            self._hashes = np.unique(np.concatenate([self._hashes, np.frombuffer(self._unsorted, np.uint64)]))
            self._unsorted = array("Q")
        value = np.uint64(_hash(text))
        index = int(self._hashes.searchsorted(value))
        return index < len(self._hashes) and bool(self._hashes[index] == value)


def _hash(text: str) -> int:
    """Return a 64-bit hash of the stripped text."""
    return int.from_bytes(hash_text(text.strip(), 8), "big")
