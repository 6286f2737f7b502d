"""The train/validation split: a hash of the underlying example decides. Reads no files; imports no Ray.

All instructions made from one example get the same split. The key of a row is its `example` field, if it has one. That is the
longest text of a raw row for PromptSource, and the input of an instance for task files. A rendered row has no `example`, so its
longest sentence is the key. The longest sentence mostly comes from the passage or question and not from the template. A text that
more than a third of the rows share (`SharedTexts`) is not a key; the next longest sentence is.
`python -m benchmarks.split_leak` measures how often.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np

from generation.sources.row import hash_text, hash_to_unit_interval

# A colon ends a sentence too: the text before a colon is mostly a word of the template, e.g. `Review:` or `Question:`.
_SENTENCE_END = re.compile(r'[.!?:]+(?=\s|$)|["\n]')
_WORD = re.compile(r"[^\W_]+")
# Sentences of a row that can be its key, and the number of counters: counts are too low by at most 16 / 512 of the rows.
_KEY_SENTENCES, _COUNTERS = 16, 512
# A text in so few rows can be an example with several questions, also in a small set.
_MIN_SHARED = 4


def assign_split(key: str, validation_fraction: float) -> str:
    """Return `train` or `validation` for the key of an example; `validation_fraction` is in [0, 1)."""
    return "validation" if hash_to_unit_interval(key) < validation_fraction else "train"


def longest_sentence(text: str) -> str:
    """Return the lower-cased words of the longest sentence, quotation or line of a text, joined by spaces.

    A text without words is returned stripped.
    """
    return split_sentences(text)[0]


def split_sentences(text: str) -> list[str]:
    """Return the distinct sentences, quotations and lines of a text as in `longest_sentence`, the longest first."""
    sentences = {" ".join(_WORD.findall(sentence)) for sentence in _SENTENCE_END.split(text.lower())} - {""}
    return sorted(sentences, key=lambda sentence: (len(sentence), sentence), reverse=True) or [text.strip()]


class SharedTexts:
    """The example texts and sentences that more than a third of the rows of a (dataset, template) share.

    Such a text (a system prompt, a fixed instruction) does not distinguish rows. It would put all of them in one split.
    Memory is bounded: a Misra-Gries summary of `_COUNTERS` texts for each (dataset, template). Its counts are too low by at
    most 3 % of the rows.
    """

    def __init__(self) -> None:
        self._rows: Counter[tuple[str, str | None]] = Counter()
        self._counts: dict[tuple[str, str | None], dict[bytes, int]] = {}

    def add(self, dataset: str, template: str | None, instruction: str, example: str | None) -> None:
        """Count the texts of a row."""
        self._rows[dataset, template] += 1
        counts = self._counts.setdefault((dataset, template), {})
        for text in _key_texts(instruction, example):
            digest = hash_text(text, 8)
            if digest in counts or len(counts) < _COUNTERS:
                counts[digest] = counts.get(digest, 0) + 1
            else:
                for other in [each for each in counts if counts[each] == 1]:
                    del counts[other]
                for other in counts:
                    counts[other] -= 1

    def distinguish(self, dataset: str, template: str | None, instruction: str, example: str | None) -> str:
        """Return the example or the longest sentence of a row that is not shared, or the whole instruction if all are shared."""
        rows, counts = self._rows[dataset, template], self._counts.get((dataset, template), {})
        most = max(_MIN_SHARED, rows // 3)
        texts = (text for text in _key_texts(instruction, example) if counts.get(hash_text(text, 8), 0) <= most)
        return next(texts, instruction.strip())


def _key_texts(instruction: str, example: str | None) -> list[str]:
    """Return the texts that can be the key of a row, the best first."""
    return [*([example] if example else []), *split_sentences(instruction)[:_KEY_SENTENCES]]


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
