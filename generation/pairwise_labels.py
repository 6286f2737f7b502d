"""Compute the label metric between all texts of a small pool, each text once as response and once as reference.

Pure: imports no Ray and reads no files. The metrics by words split every text once and compare each pair of texts once, because
their F-measure is symmetric. `benchmarks/consensus.py` compares the time with a loop over `rouge_score`.

Shapes: D texts of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cluster.config import LabelConfig
from generation.labels import METRICS, TEXTS, compute_labels, f_measure, longest_common_subsequence, shared_words
from generation.word_tokenizer import compiled, vocabulary


def label_matrix(texts: Sequence[str], config: LabelConfig) -> np.ndarray:
    """Return the label of each text (row) with each text as its only reference (column); float64 (D, D), in [0, 1].

    The diagonal is the label of a text with itself. It is 0 for a text without words.
    """
    if not texts:
        return np.zeros((0, 0))
    if METRICS[config.metric].by_words:
        ordered = config.metric == "rouge_l"
        words, begins, ends = vocabulary(config.mode, stemmed=ordered).split(pa.array(texts, pa.string()))
        return np.asarray(_pairwise_f_measures(np.unique(words, return_inverse=True)[1], begins, ends, ordered))
    every_text = pa.array([list(texts)] * len(texts), TEXTS)
    labels = compute_labels(every_text, pa.array([[text] for text in texts], TEXTS), config)
    return labels.reshape(len(texts), len(texts)).T


@compiled
def _pairwise_f_measures(words: np.ndarray, begins: np.ndarray, ends: np.ndarray, ordered: bool) -> np.ndarray:
    """Return the F-measure of each pair of texts, (D, D). Text i is `words[begins[i] : ends[i]]`; words are numbered from 0."""
    count = len(begins)
    values = np.zeros((count, count))
    seen = np.full(words.max() + 1 if len(words) else 0, -1, np.int64)
    carries = np.zeros((ends - begins).max(), np.uint8)
    for left in range(count):
        left_words = words[begins[left] : ends[left]]
        values[left, left] = 1.0 if len(left_words) else 0.0
        for right in range(left):
            right_words = words[begins[right] : ends[right]]
            common = (
                longest_common_subsequence(left_words, right_words, seen, carries)
                if ordered
                else shared_words(left_words, right_words, seen)
            )
            values[left, right] = values[right, left] = f_measure(common, len(left_words), len(right_words))
    return values
