"""Train rows that share a run of words with an evaluation row, found by hashes of the evaluation side's runs.

Memory is 10 bytes for each distinct run of the evaluation rows; train rows stream by. Words are lower-cased runs of letters and
digits; a text shorter than a run counts as one run, overlapping only with an equal text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from generation.sources.row import DeadLetter, Instruction

MAX_EXAMPLES = 50
"""Overlapping rows the report shows."""

_WORD = re.compile(r"[^\W_]+")
_Hashes = np.ndarray[Any, np.dtype[np.uint64]]


class NgramIndex:
    """The runs of `n` words of evaluation rows, by file; `take` tells whether a train row may stay and counts those that may not."""

    def __init__(self, files: Iterable[tuple[str, Iterable[Instruction | DeadLetter]]], n: int) -> None:
        self.n = n
        self._factors = np.random.default_rng(13).integers(1, 2**63, n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._files: list[str] = []
        self._rows: list[int] = []
        self._hashes: _Hashes = np.empty(0, np.uint64)
        self._file_of = np.empty(0, np.uint16)
        self._checked = 0
        self._found: Counter[tuple[str, str]] = Counter()
        self._examples: list[dict[str, str]] = []
        for name, rows in files:
            self._add(name, rows)

    def _add(self, name: str, rows: Iterable[Instruction | DeadLetter]) -> None:
        number = len(self._files)
        count = 0
        waiting: list[_Hashes] = []
        held = 0
        for row in rows:
            if isinstance(row, Instruction):
                count += 1
                waiting.append(self.hash_ngrams(row.instruction))
                held += len(waiting[-1])
                if held > 1 << 20:
                    self._merge(waiting, number)
                    waiting, held = [], 0
        self._merge(waiting, number)
        self._files.append(name)
        self._rows.append(count)

    def _merge(self, waiting: list[_Hashes], number: int) -> None:
        new = np.concatenate([self._hashes, *waiting])
        files = np.concatenate([self._file_of, np.full(len(new) - len(self._hashes), number, np.uint16)])
        # A run of several files belongs to the first: `unique` keeps the first of equal values.
        self._hashes, first = np.unique(new, return_index=True)
        self._file_of = files[first]

    def hash_ngrams(self, text: str) -> _Hashes:
        """Return the hashes of a text's runs of `n` words, in order; one of the whole text where it is shorter."""
        return self._hash_words(_words(text))

    def _hash_words(self, words: list[str]) -> _Hashes:
        """As `runs`; Python's own hash of a word will do, since they never leave this process."""
        values = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        width = min(self.n, len(words))
        count = len(words) - width + 1 if words else 0
        runs = np.full(count, width, np.uint64)
        for place in range(width):
            runs += values[place : place + count] * self._factors[place]
        return runs ^ (runs >> np.uint64(29))

    def find_overlap(self, text: str) -> tuple[str, str] | None:
        """Return the first evaluation file a text shares a run with, and that run; None where it shares none."""
        if not len(self._hashes):
            return None
        words = _words(text)
        runs = self._hash_words(words)
        if not len(runs):
            return None
        places = np.minimum(self._hashes.searchsorted(runs), len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[places] == runs)
        if not len(hits):
            return None
        start = int(hits[0])
        return self._files[int(self._file_of[places[start]])], " ".join(words[start : start + self.n])

    def check_row(self, row: Instruction) -> bool:
        """Return whether a train row overlaps, and count it for the report."""
        self._checked += 1
        found = self.find_overlap(row.instruction)
        if found is None:
            return False
        name, run = found
        self._found[row.dataset, name] += 1
        if len(self._examples) < MAX_EXAMPLES:
            self._examples.append({"dataset": row.dataset, "file": name, "words": run, "instruction": row.instruction[:500]})
        return True

    @property
    def left_out(self) -> int:
        """Train rows left out so far."""
        return self._found.total()

    def report(self) -> dict[str, Any]:
        """What was compared and left out, for `decontamination.json`."""
        datasets: dict[str, dict[str, int]] = {}
        for (dataset, name), count in sorted(self._found.items()):
            datasets.setdefault(dataset, {})[name] = count
        return {
            "n": self.n,
            "files": [{"file": name, "rows": rows} for name, rows in zip(self._files, self._rows, strict=True)],
            "runs": len(self._hashes),
            "train_rows_checked": self._checked,
            "train_rows_left_out": self.left_out,
            "datasets": datasets,
            "examples": self._examples,
        }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
