"""Decontamination: find train rows that share an n-gram of words with an evaluation row. Reads no files; imports no Ray.

The index holds a hash of each distinct n-gram of the evaluation rows (10 bytes each); train rows are streamed. A word is a
lower-cased sequence of letters and digits. A text with fewer than n words is one n-gram, which overlaps only with an equal text.
An evaluation row that cannot be read is counted, and the texts of its dead letter are compared.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from generation.sources.row import DeadLetter, Instruction

MAX_EXAMPLES = 50
"""Overlapping rows in the report, at most."""

_WORD = re.compile(r"[^\W_]+")
_JSON_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)')
_Hashes = np.ndarray[Any, np.dtype[np.uint64]]


class NgramIndex:
    """An index of the word n-grams of evaluation rows, by file.

    `check_row` returns whether a train row overlaps and counts it for `report`.
    """

    def __init__(self, files: Iterable[tuple[str, Iterable[Instruction | DeadLetter]]], n: int) -> None:
        """Index the rows of `(file name, rows)` pairs by n-grams of `n` words."""
        self.n = n
        # Random odd factors of a polynomial hash, one for each position in an n-gram; the seed is fixed, so indexes agree.
        self._factors = np.random.default_rng(13).integers(1, 2**63, n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._files: list[str] = []
        self._rows: list[int] = []
        self._unreadable: list[int] = []
        self.first_unreadable: DeadLetter | None = None
        """The first evaluation row that could not be read."""
        self._hashes: _Hashes = np.empty(0, np.uint64)
        self._file_of = np.empty(0, np.uint16)
        self._checked = 0
        self._overlaps: Counter[tuple[str, str]] = Counter()
        self._examples: list[dict[str, str]] = []
        for name, rows in files:
            self._add_file(name, rows)

    def _add_file(self, name: str, rows: Iterable[Instruction | DeadLetter]) -> None:
        """Add the n-grams of the rows of one file, in chunks of about a million hashes."""
        number = len(self._files)
        count = unreadable = 0
        buffer: list[_Hashes] = []
        buffered = 0
        for row in rows:
            if isinstance(row, Instruction):
                count += 1
                texts = [row.instruction]
            else:
                unreadable += 1
                self.first_unreadable = self.first_unreadable or row
                texts = _json_texts(row.row)
            for text in texts:
                buffer.append(self.hash_ngrams(text))
                buffered += len(buffer[-1])
            if buffered > 1 << 20:
                self._merge(buffer, number)
                buffer, buffered = [], 0
        self._merge(buffer, number)
        self._files.append(name)
        self._rows.append(count)
        self._unreadable.append(unreadable)

    def _merge(self, buffer: list[_Hashes], number: int) -> None:
        """Add the hashes of file `number` to the sorted index."""
        merged = np.concatenate([self._hashes, *buffer])
        files = np.concatenate([self._file_of, np.full(len(merged) - len(self._hashes), number, np.uint16)])
        # An n-gram of several files belongs to the first file: `unique` keeps the first of equal values.
        self._hashes, first = np.unique(merged, return_index=True)
        self._file_of = files[first]

    def hash_ngrams(self, text: str) -> _Hashes:
        """Return the uint64 hashes of the n-grams of a text, in order; a single hash of the whole text if it has fewer words."""
        return self._hash_words(_words(text))

    def _hash_words(self, words: list[str]) -> _Hashes:
        """Return the hashes of the n-grams of a list of words.

        Python's `hash` of a word differs between processes. That is correct here, because the hashes stay in this process.
        """
        values = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        width = min(self.n, len(words))
        count = len(words) - width + 1 if words else 0
        hashes = np.full(count, width, np.uint64)
        for position in range(width):
            hashes += values[position : position + count] * self._factors[position]
        return hashes ^ (hashes >> np.uint64(29))

    def find_overlap(self, text: str) -> tuple[str, str] | None:
        """Return `(evaluation file, shared n-gram)` for the first n-gram of a text that the index has, or None."""
        if not len(self._hashes):
            return None
        words = _words(text)
        hashes = self._hash_words(words)
        if not len(hashes):
            return None
        indices = np.minimum(self._hashes.searchsorted(hashes), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[indices] == hashes)
        if not len(hits):
            return None
        start = int(hits[0])
        return self._files[int(self._file_of[indices[start]])], " ".join(words[start : start + self.n])

    def check_row(self, row: Instruction) -> bool:
        """Return whether a train row overlaps with an evaluation row, and count the row for the report."""
        self._checked += 1
        overlap = self.find_overlap(row.instruction)
        if overlap is None:
            return False
        name, ngram = overlap
        self._overlaps[row.dataset, name] += 1
        if len(self._examples) < MAX_EXAMPLES:
            self._examples.append({"dataset": row.dataset, "file": name, "words": ngram, "instruction": row.instruction[:500]})
        return True

    @property
    def left_out(self) -> int:
        """Train rows that overlapped so far."""
        return self._overlaps.total()

    @property
    def unreadable(self) -> int:
        """Evaluation rows that could not be read."""
        return sum(self._unreadable)

    def report(self) -> dict[str, Any]:
        """Return the content of `decontamination.json`: the compared files and the train rows left out, by dataset and file."""
        datasets: dict[str, dict[str, int]] = {}
        for (dataset, name), count in sorted(self._overlaps.items()):
            datasets.setdefault(dataset, {})[name] = count
        return {
            "n": self.n,
            "files": [
                {"file": name, "rows": rows, "unreadable": unreadable}
                for name, rows, unreadable in zip(self._files, self._rows, self._unreadable, strict=True)
            ],
            "unreadable_rows": self.unreadable,
            "runs": len(self._hashes),
            "train_rows_checked": self._checked,
            "train_rows_left_out": self.left_out,
            "datasets": datasets,
            "examples": self._examples,
        }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _json_texts(row: str) -> list[str]:
    """Return the texts in the JSON of a row, which can be cut off, or the row itself if it is not JSON."""
    if not row.startswith(("{", "[", '"')):
        return [row]
    return [_unescape(text) for text in _JSON_TEXT.findall(row)]


def _unescape(text: str) -> str:
    """Return a text without the escapes of JSON."""
    try:
        return str(json.loads(f'"{text}"'))
    except ValueError:  # an escape that is cut off
        return text
