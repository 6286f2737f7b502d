"""Which side of the split an example falls on: a function of the example alone, so that all its instructions fall together.

The underlying example of a row is its `example` field where it has one (PromptSource rows: the raw row's longest text; task
files: the instance's input). Of a rendered row it is not known and its longest sentence stands for it, which is the passage's or
question's own far more often than the template's: `python -m benchmarks.split_leak` measures that.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

import numpy as np

from generation.sources.row import hash_text, hash_to_unit_interval

# A colon ends one too: before it stands mostly a template's word, `Review:` or `Question:`.
_SENTENCE_END = re.compile(r'[.!?:]+(?=\s|$)|["\n]')
_WORD = re.compile(r"[^\W_]+")


def assign_split(key: str, validation_fraction: float) -> str:
    """Return `train` or `validation` for an example's key."""
    return "validation" if hash_to_unit_interval(key) < validation_fraction else "train"


def longest_sentence(text: str) -> str:
    """Return the words of the longest sentence, quotation or line of a text, lower-cased; the text where it has no word."""
    sentences = [" ".join(_WORD.findall(sentence)) for sentence in _SENTENCE_END.split(text.lower())]
    return max(sentences, key=lambda sentence: (len(sentence), sentence)) or text.strip()


class HeldOutTexts:
    """The instruction texts of a validation split, as sorted 64-bit hashes: 8 bytes a text."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._waiting = array("Q", map(_hash, texts))
        self._hashes = np.empty(0, np.uint64)

    def add(self, text: str) -> None:
        self._waiting.append(_hash(text))

    def __contains__(self, text: str) -> bool:
        if self._waiting:
            self._hashes = np.unique(np.concatenate([self._hashes, np.frombuffer(self._waiting, np.uint64)]))
            self._waiting = array("Q")
        value = np.uint64(_hash(text))
        place = int(self._hashes.searchsorted(value))
        return place < len(self._hashes) and bool(self._hashes[place] == value)


def _hash(text: str) -> int:
    return int.from_bytes(hash_text(text.strip(), 8), "big")
