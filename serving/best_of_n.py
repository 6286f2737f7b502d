"""Sample and score the candidates of one request, in rounds until enough are good, or all of them.

`draw_pool` gets two functions, one that samples and one that scores, and returns a `Pool`. Each distinct response is scored once.
If scoring fails, the responses of that call stay unscored, sampling stops, and the pool holds the error. Imports neither Ray nor a web
framework.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cluster.config import AdaptiveConfig, DecodingConfig
from generation.engines.contract import Candidate, request_seed
from serving.backend import ApiError, OnFinished, Sampled, Scored
from serving.ranking import distinct_responses
from training import early_stopping
from training.early_stopping import StopReason
from training.selection import Selection

Sample = Callable[[Sequence[DecodingConfig], Sequence[int | None], OnFinished | None], Awaitable[Sampled]]
"""Samples the candidates of decodings, with one seed each. May call the third argument with the responses that finished early."""
Score = Callable[[Sequence[str]], Awaitable[Scored]]
"""Scores responses to the request's instruction."""


@dataclass
class Pool:
    """The candidates and scores of a request so far."""

    parts: list[list[Candidate]] = field(default_factory=list)
    """Candidates by sampling call, in the order of the calls; empty while a call is running."""
    score_of: dict[str, float] = field(default_factory=dict)
    """Raw logit by response; NaN until the scorer has answered, and if it failed."""
    prompt_tokens: int = 0
    """Tokens of the prompt. All rounds have the same prompt, which the engine caches, so it counts once."""
    cost: float | None = None
    """Cost of all sampling calls in dollars, if the LLM is an endpoint with prices."""
    sampling_s: float = 0.0
    scoring_s: float = 0.0
    """Seconds of scoring after the last candidate arrived; scoring during sampling takes no extra time."""
    version: str | None = None
    """Version of the scorer in its last result, see `Scored`. Earlier scores may be from an earlier version."""
    logprob_weight: float | None = None
    """Weight of the blend, if one was fitted with the scorer."""
    selection: Selection | None = None
    """The fitted selection of the scorer, if it has one."""
    stop_reason: StopReason | None = None
    """The reason why sampling stopped; None if all candidates were sampled in one round without an error."""
    scorer_error: ApiError | TimeoutError | None = None
    """The error of the scorer; `TimeoutError` if it was late."""

    @property
    def candidates(self) -> list[Candidate]:
        """All candidates, in the order of the calls."""
        return [candidate for part in self.parts for candidate in part]

    @property
    def scores(self) -> list[float]:
        """The score of each candidate; NaN if it has none."""
        return [self.score_of.get(candidate["response"], math.nan) for candidate in self.candidates]

    @property
    def has_scores(self) -> bool:
        """Whether candidates can be ranked by score: false if the scorer failed before it returned any score."""
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
    on_progress: Callable[[Pool], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Pool:
    """Sample and score candidates; return the pool.

    Args:
        decodings: the decodings, each with its number of candidates.
        sample: samples candidates.
        score: scores responses; None leaves the candidates unscored.
        seed: the request's seed, from which every decoding and round gets its own; None samples without a seed.
        n: number of choices that the request returns.
        stopping: when to stop before all candidates are sampled; None samples all of them in one round.
        scorer_timeout_s: how long to wait for scores after a call's candidates have arrived, in seconds.
        early: score finished candidates while others are sampled. That saves time and makes more, smaller scoring calls.
        on_progress: called when candidates arrive and when they get scores. Without `stopping` the decodings are then sampled in separate
            concurrent calls, so that the results arrive in parts.
        clock: returns the time in seconds.

    Raises the exceptions of `sample`.
    """
    pool = Pool()
    rounds = [list(decodings)] if stopping is None else early_stopping.plan_rounds(decodings, n, stopping.round_size)
    # The LLM reports probabilities at temperature 1. A higher temperature repeats responses less often than they predict.
    use_logprobs = all(decoding.temperature <= 1 for decoding in decodings)
    for number, round_decodings in enumerate(rounds):
        calls = [[decoding] for decoding in round_decodings] if on_progress and stopping is None else [round_decodings]
        await _draw_round(pool, calls, number, sample, score, seed, scorer_timeout_s, early, on_progress or (lambda _: None), clock)
        if pool.scorer_error:
            pool.stop_reason = "scorer"
        elif stopping:
            pool.stop_reason = early_stopping.stop_reason(pool.candidates, pool.scores, stopping, n, use_logprobs=use_logprobs)
        if pool.stop_reason:
            return pool
    pool.stop_reason = "candidates" if stopping else None
    return pool


async def _draw_round(
    pool: Pool,
    calls: Sequence[Sequence[DecodingConfig]],
    number: int,
    sample: Sample,
    score: Score | None,
    seed: int | None,
    scorer_timeout_s: float,
    early: bool,
    on_progress: Callable[[Pool], None],
    clock: Callable[[], float],
) -> None:
    """Sample and score the candidates of a round, with concurrent calls; add them to the pool."""
    start = last_arrival = clock()
    indices = range(len(pool.parts), len(pool.parts) + len(calls))
    pool.parts += [[] for _ in calls]

    async def draw(index: int, decodings: Sequence[DecodingConfig]) -> None:
        nonlocal last_arrival
        scoring: dict[asyncio.Task[Scored], list[str]] = {}
        all_sampled = asyncio.Event()

        def start_scoring(responses: Sequence[str]) -> None:
            new = [response for response in dict.fromkeys(responses) if response not in pool.score_of]
            pool.score_of |= dict.fromkeys(new, math.nan)
            if new and score:
                scoring[asyncio.create_task(_score(score, new, all_sampled))] = new

        try:
            sampled = await sample(decodings, _seeds(seed, decodings, number), start_scoring if score and early else None)
            last_arrival = max(last_arrival, clock())
            pool.parts[index] = sampled["candidates"]
            pool.prompt_tokens = sampled["prompt_tokens"]
            if (cost := sampled.get("cost")) is not None:
                pool.cost = (pool.cost or 0.0) + cost
            all_sampled.set()
            start_scoring(distinct_responses(sampled["candidates"]))
            on_progress(pool)
            if not scoring:
                return
            _, late = await asyncio.wait(scoring, timeout=scorer_timeout_s)
            for task, responses in scoring.items():
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
                pool.selection = scored.get("selection")
            on_progress(pool)
        finally:
            for task in scoring:
                task.cancel()

    tasks = [asyncio.ensure_future(draw(index, decodings)) for index, decodings in zip(indices, calls, strict=True)]
    try:
        await asyncio.gather(*tasks)
    finally:
        # If one call failed, or the client disconnected, the results of the other calls are not needed.
        for task in tasks:
            task.cancel()
    pool.sampling_s += last_arrival - start
    pool.scoring_s += clock() - last_arrival


async def _score(score: Score, responses: Sequence[str], all_sampled: asyncio.Event) -> Scored:
    """Score responses. Retry a call that started during sampling and failed, once, when all candidates are sampled."""
    early = not all_sampled.is_set()
    try:
        return await score(responses)
    except ApiError:
        if not early:
            raise
        await all_sampled.wait()
        return await score(responses)


def _seeds(seed: int | None, decodings: Sequence[DecodingConfig], number: int) -> Sequence[int | None]:
    """Return a 31-bit seed for each decoding, from the request's seed and the number of the round; None if the request has no seed."""
    if seed is None:
        return [None] * len(decodings)
    return [request_seed(seed, str(number) if number else "", decoding.name) for decoding in decodings]
