"""Mean log-probability per token of sampled candidates. Pure: no Ray, no files, no model.

A candidate's `logprob` is the sum over its sampled tokens, in nats. The mean over its tokens is the self-score that the
baselines, the blend and the report use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Floats = np.ndarray[Any, np.dtype[np.float64]]


# The lowest finite value that is a log-probability: servers send -9999 for minus infinity.
_LOWEST = -9999.0
# Rounding can put a log-probability slightly above 0.
_HIGHEST = 0.01


def are_of_several_llms(candidates: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the candidates of an instruction are of several LLMs, whose log-probabilities are not comparable."""
    return len({each.get("model") for each in candidates}) > 1


def comparable_logprobs(candidates: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the `logprob` of each candidate of an instruction; all are None if the candidates are of several LLMs."""
    several = are_of_several_llms(candidates)
    return [None if several else each.get("logprob") for each in candidates]


def sum_logprobs(values: Iterable[Any]) -> float | None:
    """Return the sum of the log-probabilities of sampled tokens, in nats; None if one of them is null or not a log-probability.

    A sampled token has a probability above 0, so NaN, infinities and values of -9999 and below are not log-probabilities.
    """
    total = 0.0
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if not _LOWEST < number <= _HIGHEST:
            return None
        total += number
    return total


def finite_or_none(logprob: float) -> float | None:
    """Return a sum of log-probabilities, or None if it is NaN or infinite."""
    return float(logprob) if math.isfinite(logprob) else None


def mean_logprob(logprob: float | None, tokens: int | None) -> float | None:
    """Return the mean log-probability per token of one candidate, in nats.

    Args:
        logprob: The sum over the tokens; None where it is not known, and the result is then None.
        tokens: The number of sampled tokens. 0 and None count as 1, so an empty response keeps its sum.
    """
    return None if logprob is None else logprob / max(tokens or 0, 1)


def mean_logprobs(logprobs: ArrayLike, tokens: ArrayLike) -> Floats:
    """Return the mean log-probability per token of many candidates, in nats, float64.

    Args:
        logprobs: The sums over the tokens, of any shape; NaN where a sum is not known.
        tokens: The numbers of sampled tokens, of the same shape; 0 counts as 1, NaN gives NaN.
    """
    means: Floats = np.asarray(logprobs, np.float64) / np.maximum(tokens, 1)
    return means
