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
    """Draws the texts it is given, one after the other, and scores them by their length.

    A decoding takes `turns` of the event loop, the scorer `wait` seconds; it breaks after some calls.
    """

    def __init__(self, *texts, turns=None, wait=0.0, broken_after=99):
        self.texts, self.turns, self.wait, self.broken_after = list(texts), turns or {}, wait, broken_after
        self.drawn, self.seeds, self.read = [], [], []

    async def sample(self, decodings, seeds, early):
        self.drawn.append([(each.name, each.n) for each in decodings])
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
        if len(self.read) >= self.broken_after:
            raise ApiError("down", 503)
        self.read.append(list(responses))
        await asyncio.sleep(self.wait)
        return {"scores": [len(each) / 10 for each in responses], "tokens": []}

    def draw(self, stopping=None, n=1, seed=5, tell=None, timeout_s=5, early=True):
        how = {"seed": seed, "n": n, "stopping": stopping, "scorer_timeout_s": timeout_s, "early": early, "tell": tell}
        return best_of_n.draw_pool(DECODINGS, self.sample, self.score, **how)


async def test_without_stopping_the_pool_is_one_call_with_the_seeds_of_its_decodings():
    models = Models("x", "xx", "x", "xxx", "")
    pool = await models.draw()
    assert models.drawn == [[("greedy", 1), ("a", 2), ("b", 2)]]
    assert models.seeds == [request_seed(5, "", name) for name in ("greedy", "a", "b")]
    assert models.read == [["x", "xx", "xxx", ""]] and pool.scores == [0.1, 0.2, 0.1, 0.3, 0.0]
    assert (pool.stop_reason, pool.prompt_tokens) == (None, 7)


@pytest.mark.parametrize("stopping", [None, AdaptiveConfig(target_score=9, round_size=2)])
async def test_without_a_seed_the_engine_draws_by_chance(stopping):
    models = Models("x", "xx", "x", "xxx", "")
    await models.draw(stopping, seed=None)
    assert models.seeds and set(models.seeds) == {None}


async def test_rounds_end_where_the_target_is_reached_and_a_response_met_again_is_not_scored_again():
    models = Models("x", "x", "xxx", "xxxx")
    pool = await models.draw(AdaptiveConfig(target_score=0.3, round_size=2))
    assert models.drawn == [[("greedy", 1)], [("a", 1), ("b", 1)]]
    assert models.read == [["x"], ["xxx"]] and pool.scores == [0.1, 0.1, 0.3]
    assert (pool.stop_reason, pool.prompt_tokens) == ("target_score", 7)


async def test_a_seed_draws_each_round_anew_and_the_whole_the_same():
    first, second, other = (Models(*"abcde") for _ in range(3))
    assert (await first.draw(NEVER)).stop_reason == "candidates"
    await second.draw(NEVER)
    await other.draw(NEVER, seed=6)
    assert first.drawn == [[("greedy", 1)], [("a", 1), ("b", 1)], [("a", 1), ("b", 1)]]
    assert len(set(first.seeds)) == 5 and first.seeds == second.seeds and not set(first.seeds) & set(other.seeds)


async def test_nothing_is_stopped_before_there_are_as_many_different_responses_as_choices():
    models = Models("xxxxx", "xxxxx", "xxxxx", "xxxxx", "xxxx")
    pool = await models.draw(AdaptiveConfig(target_score=0.4, round_size=1), n=2)
    assert [len(part) for part in pool.parts] == [2, 1, 1, 1] and pool.stop_reason == "target_score"


@pytest.mark.parametrize("trouble", [{"broken_after": 1}, {"wait": 5}])
async def test_a_scorer_that_fails_ends_the_drawing_and_what_it_scored_before_stays(trouble):
    late = "wait" in trouble
    pool = await Models(*"abcde", **trouble).draw(NEVER, timeout_s=0.05 if late else 5)
    assert pool.stop_reason == "scorer" and isinstance(pool.scorer_error, TimeoutError if late else ApiError)
    assert pool.has_scores is not late
    assert len(pool.candidates) == (1 if late else 3) and math.isnan(pool.scores[-1])


async def test_progress_tells_of_each_decoding_when_it_arrives_in_the_order_of_the_pool():
    told = []
    models = Models("x", "xx", "xxx", "xx", "x", turns={"greedy": 50, "a": 100})
    pool = await models.draw(
        tell=lambda pool: told.append([(each["response"], score) for each, score in zip(pool.candidates, pool.scores, strict=True)])
    )
    whole = await Models("x", "xx", "xxx", "xx", "x").draw()
    assert (pool.candidates, pool.scores) == (whole.candidates, whole.scores)
    assert [len(each) for each in told] == [2, 2, 3, 5, 5]
    assert told[1] == [("xx", 0.2), ("x", 0.1)] and told[2] == [("x", 0.1), ("xx", 0.2), ("x", 0.1)] and told[-1][2] == ("xxx", 0.3)
    assert sorted(models.seeds) == sorted(request_seed(5, "", each.name) for each in DECODINGS)
    assert [response for read in models.read for response in read] == ["xx", "x", "xxx"]


async def test_one_decoding_that_fails_fails_the_whole_and_stops_the_others():
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
        await models.draw(tell=lambda _: None)
    await asyncio.sleep(0)
    assert models.cancelled == 2


class Staggered(Models):
    """The first `ended` candidates end before the others, which wait for `go`; `failing` calls of the scorer fail first."""

    def __init__(self, *texts, ended, failing=0, **more):
        super().__init__(*texts, **more)
        self.ended, self.failing, self.go, self.asked = ended, failing, asyncio.Event(), 0

    async def sample(self, decodings, seeds, early):
        sampled = await super().sample(decodings, seeds, early)
        if early:
            early([each["response"] for each in sampled["candidates"][: self.ended]])
        await self.go.wait()
        return sampled

    async def score(self, responses):
        self.asked += 1
        if self.asked <= self.failing:
            raise ApiError("down", 503)
        return await super().score(responses)


async def test_what_has_ended_is_scored_while_the_rest_is_sampled_and_the_rest_alone_adds_to_the_time():
    models = Staggered("x", "xx", "x", "xx", "xxx", ended=4, wait=0.2)
    drawing = asyncio.create_task(models.draw())
    await asyncio.sleep(0.3)
    assert models.read == [["x", "xx"]] and not drawing.done()
    models.wait = 0.0
    models.go.set()
    pool = await drawing
    assert models.read == [["x", "xx"], ["xxx"]] and pool.scores == [0.1, 0.2, 0.1, 0.2, 0.3]
    assert pool.sampling_s >= 0.3 and pool.scoring_s < pool.sampling_s and pool.scorer_error is None


async def test_a_scorer_still_busy_with_what_ended_early_is_waited_for_and_not_asked_again():
    models = Staggered("x", "xx", "x", "xx", "x", ended=4, wait=0.5)
    models.go.set()
    pool = await models.draw()
    assert models.read == [["x", "xx"]] and pool.scores == [0.1, 0.2, 0.1, 0.2, 0.1] and pool.scoring_s >= 0.1
    late = Staggered("x", "xx", "x", "xx", "x", ended=4, wait=5)
    late.go.set()
    assert isinstance((await late.draw(timeout_s=0.05)).scorer_error, TimeoutError)


async def test_all_is_scored_at_the_end_where_early_is_not_wanted():
    models = Staggered("x", "xx", "x", "xx", "xxx", ended=4)
    models.go.set()
    assert (await models.draw(early=False)).scores == [0.1, 0.2, 0.1, 0.2, 0.3] and models.read == [["x", "xx", "xxx"]]


@pytest.mark.parametrize("failing", [1, 9])
async def test_what_was_scored_early_in_vain_is_asked_again_when_all_is_there(failing):
    models = Staggered("x", "xx", "x", "xx", "xxx", ended=4, failing=failing)
    drawing = asyncio.create_task(models.draw())
    await asyncio.sleep(0.05)
    assert models.asked == 1
    models.go.set()
    pool = await drawing
    assert models.asked == 3
    if failing == 1:
        assert sorted(models.read) == [["x", "xx"], ["xxx"]] and pool.scores == [0.1, 0.2, 0.1, 0.2, 0.3] and pool.scorer_error is None
    else:
        assert isinstance(pool.scorer_error, ApiError) and not pool.has_scores


async def test_a_request_given_up_while_some_of_it_is_scored_stops_the_scorer():
    stopped = []

    class Watched(Staggered):
        async def score(self, responses):
            try:
                return await super().score(responses)
            except asyncio.CancelledError:
                stopped.append(responses)
                raise

    drawing = asyncio.create_task(Watched("x", "xx", "x", "xx", "xxx", ended=4, wait=5).draw())
    await asyncio.sleep(0.05)
    drawing.cancel()
    await asyncio.wait([drawing])
    await asyncio.sleep(0)
    assert stopped == [["x", "xx"]]
