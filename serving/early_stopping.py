"""When a request has candidates enough: what another one is expected to add, against a price. Pure: no Ray, no HTTP.

Candidates are drawn in rounds (`rounds`) and scored; after each round `why_stop` compares with `serving.adaptive`. What the next
candidate is expected to add to the best score b is

    gain = P(new) * E[max(S - b, 0)],   S ~ Normal(m, s)

- P(new), the chance that it is no repeat of one drawn, is 1 less the probabilities that the LLM itself gave the different responses
  drawn. Those are at temperature 1; a lower one or a cut distribution repeats itself more, so there it errs towards drawing. Where they
  are unknown, or a decoding is hotter, it is the estimate of Good and Turing (Good, Biometrika 1953): of N draws the share that came
  once, (N1 + 1) / (N + 1), where the ones keep it above 0 when all draws were equal.
- S, the score of a new response, has the mean and variance of this instruction's different scores, shrunk towards `prior_mean`
  and `prior_std` with `prior_weight` scores' worth. The expectation is the expected improvement of Bayesian optimisation (Jones,
  Schonlau and Welch, J. Global Optimization 1998): (m - b) F(z) + s f(z) at z = (m - b) / s, with f and F the standard normal
  density and distribution.

To stop once the gain is below the price is optimal where S is known and what was drawn may still be taken (Weitzman, Econometrica
1979). Here S is learned on the way, so it is a one-step look ahead. With `n` choices b is the n-th best score: then the gain is
that of the sum of the n best.
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
"""Why a pool grew no further: good enough, no gain expected, all drawn, or the scorer failed."""
_STANDARD = NormalDist()


def plan_rounds(decodings: Sequence[DecodingConfig], first: int, size: int) -> list[list[DecodingConfig]]:
    """Return the rounds a pool is drawn in: the greedy decodings, then one candidate of each decoding in turn.

    The first round has all greedy candidates and at least `first`, each other one `size`, the last what is left.
    """
    order = [place for place, decoding in enumerate(decodings) if decoding.temperature == 0 for _ in range(decoding.n)]
    first = max(first, len(order))
    others = [place for place, decoding in enumerate(decodings) if decoding.temperature > 0]
    for turn in range(max((decodings[place].n for place in others), default=0)):
        order += [place for place in others if turn < decodings[place].n]
    starts = [0, *range(first, len(order), size)]
    cut = [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]
    return [[decodings[place].model_copy(update={"n": n}) for place, n in sorted(Counter(places).items())] for places in cut]


def stop_reason(
    candidates: Sequence[Candidate], scores: Sequence[float], settings: AdaptiveConfig, n: int = 1, *, likelihoods: bool = True
) -> StopReason | None:
    """Return why no more candidates should be drawn for `n` choices, None where more should. See `expected_gain`."""
    bar = nth_best_score(candidates, scores, n)
    if settings.target_score is not None and bar >= settings.target_score:
        return "target_score"
    if settings.min_gain and expected_gain(candidates, scores, settings, n, likelihoods=likelihoods) < settings.min_gain:
        return "min_gain"
    return None


def nth_best_score(candidates: Sequence[Candidate], scores: Sequence[float], n: int) -> float:
    """Return the n-th highest score of different responses, minus infinity where there are fewer (empty and scoreless ones are none)."""
    ranked = sorted(_scores(candidates, scores), reverse=True)
    return ranked[n - 1] if len(ranked) >= n else -math.inf


def expected_gain(
    candidates: Sequence[Candidate], scores: Sequence[float], prior: AdaptiveConfig, n: int = 1, *, likelihoods: bool = True
) -> float:
    """Return what the next candidate is expected to add to the sum of the `n` best scores; infinity while there are fewer than `n`.

    `scores` are raw logits, one for each candidate, NaN where unknown. Without `likelihoods` the log-probabilities are not used.
    """
    bar = nth_best_score(candidates, scores, n)
    if bar == -math.inf:
        return math.inf
    known = _scores(candidates, scores)
    weight = prior.prior_weight
    own = math.fsum(known) / len(known)
    mean = (weight * prior.prior_mean + len(known) * own) / (weight + len(known))
    spread = math.fsum((score - own) ** 2 for score in known)
    std = math.sqrt((weight * prior.prior_std**2 + spread) / (weight + len(known) - 1))
    z = (mean - bar) / std
    return new_response_probability(candidates, likelihoods=likelihoods) * ((mean - bar) * _STANDARD.cdf(z) + std * _STANDARD.pdf(z))


def new_response_probability(candidates: Sequence[Candidate], *, likelihoods: bool = True) -> float:
    """Return the estimated chance that the next candidate is none of those drawn, in [0, 1]."""
    logprobs = {candidate["response"]: candidate["logprob"] for candidate in candidates}
    known = [logprob for logprob in logprobs.values() if logprob is not None]
    if likelihoods and len(known) == len(logprobs):
        return max(0.0, 1 - math.fsum(map(math.exp, known)))
    times = Counter(candidate["response"] for candidate in candidates)
    return (sum(count == 1 for count in times.values()) + 1) / (len(candidates) + 1)


def _scores(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[float]:
    """Return the scores of the different responses that can be chosen."""
    by_response = {candidate["response"]: score for candidate, score in zip(candidates, scores, strict=True)}
    return [score for response, score in by_response.items() if response and not math.isnan(score)]
