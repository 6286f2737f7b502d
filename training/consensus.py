"""Consensus: how much a response agrees with the other responses of its pool (minimum Bayes risk decoding). No model, no Ray, no files.

The agreement of two responses is the label metric with one of them as the reference. Equal responses agree fully, except empty ones.
A response that was sampled several times counts once for each draw, so its repeats support it.

Shapes: C draws of a pool, D distinct responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config import LabelConfig
from generation.labels import METRICS
from generation.pairwise_labels import label_matrix

Floats = NDArray[np.float64]

DEFAULT_METRIC = LabelConfig()
"""Rouge-L, as in the labels of the paper."""


def consensus_metric(described: Mapping[str, Any] | None) -> LabelConfig:
    """Return the metric of the consensus for a set whose manifest describes its label metric as `described` (`name`, `mode`).

    It is the label metric. A label function of the user checks a response against references and cannot compare two responses. For
    such labels it is Rouge-L in `unicode` mode, and for a manifest without the metric Rouge-L in `paper` mode.
    """
    if not described:
        return DEFAULT_METRIC
    if described["name"] not in METRICS:
        return LabelConfig(mode="unicode")
    return LabelConfig(metric=described["name"], mode=described.get("mode") or "paper")


def consensus(responses: Sequence[str], metric: LabelConfig = DEFAULT_METRIC) -> Floats:
    """Return the mean agreement of each draw with the other draws of its pool, (C,), in [0, 1]. It is 0 for a single draw.

    Args:
        responses: the draws of one pool, repeats included.
        metric: the label metric that compares two responses.
    """
    agreement_CC = agreement_matrix(responses, metric)
    return weighted_agreement(agreement_CC, np.zeros(len(responses)))


def agreement_matrix(responses: Sequence[str], metric: LabelConfig = DEFAULT_METRIC) -> Floats:
    """Return the agreement of each draw (row) with each draw as the reference (column), (C, C), in [0, 1]."""
    numbers = {response: number for number, response in enumerate(dict.fromkeys(responses))}
    agreement_DD = np.asarray(label_matrix(list(numbers), metric), np.float64)
    # A metric can see no words in a text, for example "+" with Rouge-L.
    np.fill_diagonal(agreement_DD, [float(bool(response)) for response in numbers])
    positions_C = np.array([numbers[response] for response in responses], np.int64)
    return agreement_DD[np.ix_(positions_C, positions_C)]


def weighted_agreement(agreement_CC: Floats, scores_C: Floats) -> Floats:
    """Return the mean agreement of each draw with the others, (C,), each of the others weighted by the softmax of `scores_C`."""
    if len(scores_C) < 2:
        return np.zeros(len(scores_C))
    weights_C = np.exp(scores_C - scores_C.max())
    weights_CC = np.where(np.eye(len(scores_C), dtype=bool), 0.0, weights_C)
    return np.asarray((agreement_CC * weights_CC).sum(axis=1) / weights_CC.sum(axis=1), np.float64)
