"""A request's pool: candidates drawn in rounds and scored as they come, until there are enough. Knows no HTTP and no Ray.

`draw` is given two functions, one that samples and one that scores, and returns a `Pool`. Each different response is scored once.
A scorer that fails costs the scores of the responses it was asked for then, and ends the drawing; the pool says so.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cluster.config import AdaptiveConfig, DecodingConfig
from generation.engines.contract import Candidate, request_seed
from serving import early_stopping
from serving.backend import ApiError, OnFinished, Sampled, Scored
from serving.early_stopping import StopReason
from serving.responses import distinct_responses

Sample = Callable[[Sequence[DecodingConfig], Sequence[int | None], OnFinished | None], Awaitable[Sampled]]
"""Draws the candidates of some decodings, with a seed for each; may tell early which have ended, to be scored meanwhile."""
Score = Callable[[Sequence[str]], Awaitable[Scored]]
"""Scores responses to the request's instruction."""


@dataclass
class Pool:
    """What was drawn and scored so far."""

    parts: list[list[Candidate]] = field(default_factory=list)
    """Candidates by the call that drew them, in the order asked for; empty while a call is under way."""
    score_of: dict[str, float] = field(default_factory=dict)
    """Raw logit by response, NaN where the scorer was asked and gave none yet."""
    prompt_tokens: int = 0
    """Tokens of the prompt, counted once: the same prompt is drawn from in each round, and the engine keeps it."""
    cost: float | None = None
    """Dollars all calls cost, where the LLM is an endpoint with prices."""
    sampling_s: float = 0.0
    scoring_s: float = 0.0
    version: str | None = None
    """Of the scorer that answered last, where it has one: see `Scored`. One published anew in between leaves scores of both."""
    logprob_weight: float | None = None
    """The blend's weight, where one was fitted with the scorer."""
    stop_reason: StopReason | None = None
    """Why the drawing ended, where it went in rounds or the scorer failed."""
    scorer_error: ApiError | TimeoutError | None = None
    """What the scorer failed with; a time-out where it was late."""

    @property
    def candidates(self) -> list[Candidate]:
        return [candidate for part in self.parts for candidate in part]

    @property
    def scores(self) -> list[float]:
        """The score of each candidate, NaN where it has none."""
        return [self.score_of.get(candidate["response"], math.nan) for candidate in self.candidates]

    @property
    def has_scores(self) -> bool:
        """Whether any candidate can be chosen by its score."""
        return not self.scorer_error or any(not math.isnan(score) for score in self.score_of.values())


async def draw_pool(
    decodings: Sequence[DecodingConfig],
    sample: Sample,
    score: Score | None,
    *,
    seed: int | None,
    n: int,
    stopping: AdaptiveConfig | None,
    scorer_timeout_s: float,
    early: bool,
    tell: Callable[[Pool], None] | None = None,
) -> Pool:
    """Return the pool of `decodings`: all of it, or with `stopping` as much as `n` choices need; without `score` nothing is scored.

    With `early` candidates that have ended are scored while others are sampled: sooner done, for more calls of smaller batches.

    `tell` is called whenever candidates arrived or got scores; so that there is something to tell, a pool that is not drawn in rounds
    is then sampled decoding by decoding, all at once. Raises what `sample` raises.
    """
    pool = Pool()
    rounds = [list(decodings)] if stopping is None else early_stopping.plan_rounds(decodings, n, stopping.round_size)
    # The LLM's probabilities are at temperature 1: a hotter decoding repeats itself less than they say.
    likelihoods = all(decoding.temperature <= 1 for decoding in decodings)
    for number, drawn in enumerate(rounds):
        calls = [[decoding] for decoding in drawn] if tell and stopping is None else [drawn]
        await _round(pool, calls, number, sample, score, seed, scorer_timeout_s, early, tell or (lambda _: None))
        if pool.scorer_error:
            pool.stop_reason = "scorer"
        elif stopping:
            pool.stop_reason = early_stopping.stop_reason(pool.candidates, pool.scores, stopping, n, likelihoods=likelihoods)
        if pool.stop_reason:
            return pool
    pool.stop_reason = "candidates" if stopping else None
    return pool


async def _round(
    pool: Pool,
    calls: Sequence[Sequence[DecodingConfig]],
    number: int,
    sample: Sample,
    score: Score | None,
    seed: int | None,
    scorer_timeout_s: float,
    early: bool,
    tell: Callable[[Pool], None],
) -> None:
    """Draw and score what some calls give, at once; add it to the pool."""
    start = drawn = time.monotonic()
    places = range(len(pool.parts), len(pool.parts) + len(calls))
    pool.parts += [[] for _ in calls]

    async def one(place: int, decodings: Sequence[DecodingConfig]) -> None:
        nonlocal drawn
        asked: dict[asyncio.Task[Scored], list[str]] = {}
        all_there = asyncio.Event()

        def ask(responses: Sequence[str]) -> None:
            new = [response for response in dict.fromkeys(responses) if response not in pool.score_of]
            pool.score_of |= dict.fromkeys(new, math.nan)
            if new and score:
                asked[asyncio.create_task(_score(score, new, all_there))] = new

        try:
            sampled = await sample(decodings, _seeds(seed, decodings, number), ask if score and early else None)
            drawn = max(drawn, time.monotonic())
            pool.parts[place] = sampled["candidates"]
            pool.prompt_tokens = sampled["prompt_tokens"]
            if (cost := sampled.get("cost")) is not None:
                pool.cost = (pool.cost or 0.0) + cost
            all_there.set()
            ask(distinct_responses(sampled["candidates"]))
            tell(pool)
            if not asked:
                return
            _, late = await asyncio.wait(asked, timeout=scorer_timeout_s)
            for task, responses in asked.items():
                if task in late:
                    pool.scorer_error = TimeoutError()
                    continue
                try:
                    scored = task.result()
                except (ApiError, TimeoutError) as error:
                    pool.scorer_error = error
                    continue
                pool.score_of |= zip(responses, scored["scores"], strict=True)
                pool.version, pool.logprob_weight = scored.get("version"), scored.get("logprob_weight")
            tell(pool)
        finally:
            for task in asked:
                task.cancel()

    tasks = [asyncio.ensure_future(one(place, decodings)) for place, decodings in zip(places, calls, strict=True)]
    try:
        await asyncio.gather(*tasks)
    finally:
        # After one failed, or the client went away, nobody reads the others.
        for task in tasks:
            task.cancel()
    pool.sampling_s += drawn - start
    pool.scoring_s += time.monotonic() - drawn


async def _score(score: Score, responses: Sequence[str], all_there: asyncio.Event) -> Scored:
    """Score responses; those asked for early, and in vain, once more when the whole pool is there."""
    early = not all_there.is_set()
    try:
        return await score(responses)
    except ApiError:
        if not early:
            raise
        await all_there.wait()
        return await score(responses)


def _seeds(seed: int | None, decodings: Sequence[DecodingConfig], number: int) -> Sequence[int | None]:
    """One 31-bit seed a decoding, from the request's own seed and the number of the round; none where it has none."""
    if seed is None:
        return [None] * len(decodings)
    return [request_seed(seed, str(number) if number else "", decoding.name) for decoding in decodings]
