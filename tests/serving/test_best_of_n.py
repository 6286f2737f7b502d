"""Rounds, early scoring and failures of a request's candidate pool, with an LLM and a scorer of a few lines each."""

import asyncio
import math

import pytest

from cluster.config import AdaptiveConfig, DecodingConfig
from generation.engines.contract import Candidate, request_seed
from serving import best_of_n
from serving.backend import ApiError

DECODINGS = [DecodingConfig(name="greedy", temperature=0), DecodingConfig(name="a", n=2), DecodingConfig(name="b", n=2)]
NEVER = AdaptiveConfig(target_score=9, round_size=2)


class Models:
    """An LLM that samples the given texts in order, and a scorer that scores a text by its length.

    A decoding takes `turns` iterations of the event loop. A scoring call takes `wait` seconds of real time. The scorer fails after
    `broken_after` calls.
    """

    def __init__(self, *texts, turns=None, wait=0.0, broken_after=99):
        self.texts, self.turns, self.wait, self.broken_after = list(texts), turns or {}, wait, broken_after
        self.sampled, self.seeds, self.scored = [], [], []
        self.now = 100.0

    async def sample(self, decodings, seeds, early):
        self.sampled.append([(each.name, each.n) for each in decodings])
        self.seeds += seeds
        names = [each.name for each in decodings for _ in range(each.n)]
        texts = [self.texts.pop(0) for _ in names]
        for _ in range(self.turns.get(names[0], 0)):
            await asyncio.sleep(0)
        candidates = [
            Candidate(response=t, decoding=n, tokens=1, finish_reason="stop", logprob=None) for t, n in zip(texts, names, strict=True)
        ]
        return {"candidates": candidates, "prompt_tokens": 7}

    async def score(self, responses):
        if len(self.scored) >= self.broken_after:
            raise ApiError("down", 503)
        self.scored.append(list(responses))
        await asyncio.sleep(self.wait)
        return {"scores": [len(each) / 10 for each in responses], "tokens": []}

    def draw(self, stopping=None, n=1, seed=5, on_progress=None, timeout_s=5, early=True):
        return best_of_n.draw_pool(
            DECODINGS,
            self.sample,
            self.score,
            seed=seed,
            n=n,
            stopping=stopping,
            scorer_timeout_s=timeout_s,
            early=early,
            on_progress=on_progress,
            clock=lambda: self.now,
        )


async def run_ready_tasks():
    """Let every task that can run do so until it waits for something else."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_without_stopping_the_pool_is_one_call_with_the_seeds_of_its_decodings():
    models = Models("x", "xx", "x", "xxx", "")
    pool = await models.draw()
    assert models.sampled == [[("greedy", 1), ("a", 2), ("b", 2)]]
    assert models.seeds == [request_seed(5, "", name) for name in ("greedy", "a", "b")]
    assert models.scored == [["x", "xx", "xxx", ""]] and pool.scores == [0.1, 0.2, 0.1, 0.3, 0.0]
    assert (pool.stop_reason, pool.prompt_tokens) == (None, 7)


@pytest.mark.parametrize("stopping", [None, AdaptiveConfig(target_score=9, round_size=2)])
async def test_without_a_seed_no_decoding_gets_a_seed(stopping):
    models = Models("x", "xx", "x", "xxx", "")
    await models.draw(stopping, seed=None)
    assert models.seeds and set(models.seeds) == {None}


async def test_rounds_end_when_the_target_score_is_reached_and_a_repeated_response_is_scored_once():
    models = Models("x", "x", "xxx", "xxxx")
    pool = await models.draw(AdaptiveConfig(target_score=0.3, round_size=2))
    assert models.sampled == [[("greedy", 1)], [("a", 1), ("b", 1)]]
    assert models.scored == [["x"], ["xxx"]] and pool.scores == [0.1, 0.1, 0.3]
    assert (pool.stop_reason, pool.prompt_tokens) == ("target_score", 7)


async def test_each_round_has_different_seeds_and_the_same_request_seed_gives_the_same_ones():
    first, second, other = (Models(*"abcde") for _ in range(3))
    assert (await first.draw(NEVER)).stop_reason == "candidates"
    await second.draw(NEVER)
    await other.draw(NEVER, seed=6)
    assert first.sampled == [[("greedy", 1)], [("a", 1), ("b", 1)], [("a", 1), ("b", 1)]]
    assert len(set(first.seeds)) == 5 and first.seeds == second.seeds and not set(first.seeds) & set(other.seeds)


async def test_sampling_continues_until_there_are_as_many_distinct_responses_as_choices():
    models = Models("xxxxx", "xxxxx", "xxxxx", "xxxxx", "xxxx")
    pool = await models.draw(AdaptiveConfig(target_score=0.4, round_size=1), n=2)
    assert [len(part) for part in pool.parts] == [2, 1, 1, 1] and pool.stop_reason == "target_score"


@pytest.mark.parametrize("fault", [{"broken_after": 1}, {"wait": 5}])
async def test_a_failing_scorer_ends_sampling_and_earlier_scores_stay(fault):
    late = "wait" in fault
    pool = await Models(*"abcde", **fault).draw(NEVER, timeout_s=0.05 if late else 5)
    assert pool.stop_reason == "scorer" and isinstance(pool.scorer_error, TimeoutError if late else ApiError)
    assert pool.has_scores is not late
    assert len(pool.candidates) == (1 if late else 3) and math.isnan(pool.scores[-1])


async def test_progress_reports_each_decoding_when_it_arrives_in_the_order_of_the_pool():
    reported = []
    models = Models("x", "xx", "xxx", "xx", "x", turns={"greedy": 50, "a": 100})
    pool = await models.draw(
        on_progress=lambda pool: reported.append(
            [(each["response"], score) for each, score in zip(pool.candidates, pool.scores, strict=True)]
        )
    )
    whole = await Models("x", "xx", "xxx", "xx", "x").draw()
    assert (pool.candidates, pool.scores) == (whole.candidates, whole.scores)
    assert [len(each) for each in reported] == [2, 2, 3, 5, 5]
    assert reported[1] == [("xx", 0.2), ("x", 0.1)] and reported[2] == [("x", 0.1), ("xx", 0.2), ("x", 0.1)]
    assert reported[-1][2] == ("xxx", 0.3)
    assert sorted(models.seeds) == sorted(request_seed(5, "", each.name) for each in DECODINGS)
    assert [response for call in models.scored for response in call] == ["xx", "x", "xxx"]


async def test_a_failing_decoding_fails_the_request_and_cancels_the_other_decodings():
    class Half(Models):
        cancelled = 0

        async def sample(self, decodings, seeds, early):
            if decodings[0].name == "b":
                raise ApiError("down", 503)
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    models = Half()
    with pytest.raises(ApiError, match="down"):
        await models.draw(on_progress=lambda _: None)
    await asyncio.sleep(0)
    assert models.cancelled == 2


class Staggered(Models):
    """The first `ended` candidates finish early, the others when `go` is set. The first `failing` scoring calls fail."""

    def __init__(self, *texts, ended, failing=0, **more):
        super().__init__(*texts, **more)
        self.ended, self.failing, self.go, self.calls = ended, failing, asyncio.Event(), 0

    async def sample(self, decodings, seeds, early):
        sampled = await super().sample(decodings, seeds, early)
        if early:
            early([each["response"] for each in sampled["candidates"][: self.ended]])
        await self.go.wait()
        return sampled

    async def score(self, responses):
        self.calls += 1
        if self.calls <= self.failing:
            raise ApiError("down", 503)
        return await super().score(responses)


class TimedScoring(Staggered):
    """A scoring call takes `seconds` on the clock of the pool."""

    def __init__(self, *texts, seconds, **more):
        super().__init__(*texts, **more)
        self.seconds = list(seconds)

    async def score(self, responses):
        scored = await super().score(responses)
        self.now += self.seconds.pop(0)
        return scored


async def test_finished_responses_are_scored_during_sampling_and_only_the_rest_adds_to_the_scoring_time():
    models = TimedScoring("x", "xx", "x", "xx", "xxx", ended=4, seconds=[3.0, 1.0])
    drawing = asyncio.create_task(models.draw())
    await run_ready_tasks()
    assert models.scored == [["x", "xx"]] and not drawing.done()
    models.now += 4.0
    models.go.set()
    pool = await drawing
    assert models.scored == [["x", "xx"], ["xxx"]] and pool.scores == [0.1, 0.2, 0.1, 0.2, 0.3]
    assert (pool.sampling_s, pool.scoring_s, pool.scorer_error) == (7.0, 1.0, None)


async def test_an_early_scoring_call_that_still_runs_is_awaited_and_not_repeated():
    class Blocked(Staggered):
        released = asyncio.Event()

        async def score(self, responses):
            await self.released.wait()
            return await super().score(responses)

    models = Blocked("x", "xx", "x", "xx", "x", ended=4)
    models.go.set()
    drawing = asyncio.create_task(models.draw())
    await run_ready_tasks()
    models.now += 2.0
    models.released.set()
    pool = await drawing
    assert models.scored == [["x", "xx"]] and pool.scores == [0.1, 0.2, 0.1, 0.2, 0.1]
    assert (pool.sampling_s, pool.scoring_s) == (0.0, 2.0)
    late = Staggered("x", "xx", "x", "xx", "x", ended=4, wait=5)
    late.go.set()
    assert isinstance((await late.draw(timeout_s=0.05)).scorer_error, TimeoutError)


async def test_without_early_scoring_all_responses_are_scored_at_the_end():
    models = Staggered("x", "xx", "x", "xx", "xxx", ended=4)
    models.go.set()
    assert (await models.draw(early=False)).scores == [0.1, 0.2, 0.1, 0.2, 0.3] and models.scored == [["x", "xx", "xxx"]]


@pytest.mark.parametrize("failing", [1, 9])
async def test_a_failed_early_scoring_call_is_repeated_once_all_candidates_are_sampled(failing):
    models = Staggered("x", "xx", "x", "xx", "xxx", ended=4, failing=failing)
    drawing = asyncio.create_task(models.draw())
    await run_ready_tasks()
    assert models.calls == 1
    models.go.set()
    pool = await drawing
    assert models.calls == 3
    if failing == 1:
        assert sorted(models.scored) == [["x", "xx"], ["xxx"]] and pool.scores == [0.1, 0.2, 0.1, 0.2, 0.3] and pool.scorer_error is None
    else:
        assert isinstance(pool.scorer_error, ApiError) and not pool.has_scores


async def test_cancelling_a_request_cancels_its_scoring_call():
    stopped = []

    class Recording(Staggered):
        async def score(self, responses):
            try:
                return await super().score(responses)
            except asyncio.CancelledError:
                stopped.append(responses)
                raise

    drawing = asyncio.create_task(Recording("x", "xx", "x", "xx", "xxx", ended=4, wait=5).draw())
    await run_ready_tasks()
    drawing.cancel()
    await asyncio.wait([drawing])
    await run_ready_tasks()
    assert stopped == [["x", "xx"]]
