"""Early stopping of sampling: compare the expected gain of one more candidate with a price. Pure: no Ray, no files.

Candidates are sampled in rounds (`plan_rounds`) and scored. After each round `stop_reason` applies the settings of `serving.adaptive`.
Let b be the best score so far. The next candidate is expected to raise it by

    gain = P(new) * E[max(S - b, 0)],   S ~ Normal(m, s)

P(new) is the probability that the next response differs from all sampled ones. It is 1 minus the sum of the LLM's probabilities of
the distinct responses sampled. These probabilities are at temperature 1. At a lower temperature, or with a truncated distribution,
responses repeat more often: the estimate is then too high, and sampling stops later. If a probability is unknown, or a decoding has a
temperature above 1, P(new) is the Good-Turing estimate (Good, Biometrika 1953), which is (N1 + 1) / (N + 1). N is the number of
samples, N1 the number of responses that occur once. The two ones keep it above 0 if all samples are equal.

S is the score of a new response. Its mean and variance are those of the scores of this instruction's distinct responses, shrunk
towards `prior_mean` and `prior_std`, which count as `prior_weight` scores. The expectation is the expected improvement of Bayesian
optimisation (Jones, Schonlau and Welch, J. Global Optimization 1998):

    E[max(S - b, 0)] = (m - b) F(z) + s f(z),   z = (m - b) / s

Here f is the standard normal density and F its distribution function.

Stopping once the gain is below the price is optimal if the distribution of S is known and every earlier candidate can still be chosen
(Weitzman, Econometrica 1979). Here S is estimated during sampling, so this is a one-step lookahead. For a request with `n` choices, b
is the n-th best score, and the gain is that of the sum of the n best scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

from cluster.config import AdaptiveConfig, DecodingConfig
from generation.engines.contract import Candidate

StopReason = Literal["target_score", "min_gain", "candidates", "scorer"]
"""The reason why sampling stopped: target score reached, gain below the price, all candidates sampled, or the scorer failed."""
_STANDARD_NORMAL = NormalDist()


def plan_rounds(decodings: Sequence[DecodingConfig], first: int, size: int) -> list[list[DecodingConfig]]:
    """Return the decodings of each round: the greedy decodings, then one candidate of each other decoding in turn.

    The first round has all greedy candidates and at least `first` candidates, every later round `size`, the last one the remainder.
    """
    order = [index for index, decoding in enumerate(decodings) if decoding.temperature == 0 for _ in range(decoding.n)]
    first = max(first, len(order))
    others = [index for index, decoding in enumerate(decodings) if decoding.temperature > 0]
    for turn in range(max((decodings[index].n for index in others), default=0)):
        order += [index for index in others if turn < decodings[index].n]
    starts = [0, *range(first, len(order), size)]
    cut = [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]
    return [[decodings[index].model_copy(update={"n": n}) for index, n in sorted(Counter(indices).items())] for indices in cut]


def stop_reason(
    candidates: Sequence[Candidate], scores: Sequence[float], settings: AdaptiveConfig, n: int = 1, *, use_logprobs: bool = True
) -> StopReason | None:
    """Return the reason to stop sampling for `n` choices, or None to continue; see `expected_gain` for the arguments."""
    nth_best = nth_best_score(candidates, scores, n)
    if settings.target_score is not None and nth_best >= settings.target_score:
        return "target_score"
    if settings.min_gain and expected_gain(candidates, scores, settings, n, use_logprobs=use_logprobs) < settings.min_gain:
        return "min_gain"
    return None


def nth_best_score(candidates: Sequence[Candidate], scores: Sequence[float], n: int) -> float:
    """Return the n-th highest score of the distinct responses, or minus infinity if fewer have a score; empty responses do not count."""
    ranked = sorted(_distinct_scores(candidates, scores), reverse=True)
    return ranked[n - 1] if len(ranked) >= n else -math.inf


def expected_gain(
    candidates: Sequence[Candidate], scores: Sequence[float], prior: AdaptiveConfig, n: int = 1, *, use_logprobs: bool = True
) -> float:
    """Return the expected increase of the sum of the `n` best scores by the next candidate; infinity if fewer than `n` have a score.

    Args:
        candidates: the candidates sampled so far.
        scores: their raw logits, NaN if unknown.
        prior: the prior of the scores.
        n: number of choices.
        use_logprobs: whether P(new) may use the log-probabilities.
    """
    nth_best = nth_best_score(candidates, scores, n)
    if nth_best == -math.inf:
        return math.inf
    known = _distinct_scores(candidates, scores)
    weight = prior.prior_weight
    sample_mean = math.fsum(known) / len(known)
    mean = (weight * prior.prior_mean + len(known) * sample_mean) / (weight + len(known))
    squares = math.fsum((score - sample_mean) ** 2 for score in known)
    std = math.sqrt((weight * prior.prior_std**2 + squares) / (weight + len(known) - 1))
    z = (mean - nth_best) / std
    improvement = (mean - nth_best) * _STANDARD_NORMAL.cdf(z) + std * _STANDARD_NORMAL.pdf(z)
    return new_response_probability(candidates, use_logprobs=use_logprobs) * improvement


def new_response_probability(candidates: Sequence[Candidate], *, use_logprobs: bool = True) -> float:
    """Return the estimated probability that the next response differs from all sampled ones, in [0, 1]."""
    logprobs = {candidate["response"]: candidate["logprob"] for candidate in candidates}
    known = [logprob for logprob in logprobs.values() if logprob is not None]
    if use_logprobs and len(known) == len(logprobs):
        return max(0.0, 1 - math.fsum(map(math.exp, known)))
    counts = Counter(candidate["response"] for candidate in candidates)
    return (sum(count == 1 for count in counts.values()) + 1) / (len(candidates) + 1)


def _distinct_scores(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[float]:
    """Return the scores of the distinct responses that are not empty and have a score."""
    by_response = {candidate["response"]: score for candidate, score in zip(candidates, scores, strict=True)}
    return [score for response, score in by_response.items() if response and not math.isnan(score)]
