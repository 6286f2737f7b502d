"""Batching of pairs, with a scorer that the tests release batch by batch."""

import asyncio
from types import SimpleNamespace

import pytest

from serving.score_batcher import ScoreBatcher


def scorer(name="main", device="cpu"):
    return SimpleNamespace(name=name, model=SimpleNamespace(device=SimpleNamespace(type=device), max_length=512))


class ScoreFunction:
    """Score pairs by the length of their response, after a release of `go`; record the batches and their numbers of threads."""

    def __init__(self, broken=()):
        self.batches, self.threads, self.broken = [], [], broken
        self.started, self.go = asyncio.Semaphore(0), asyncio.Semaphore(0)
        self.loop = asyncio.get_running_loop()

    def __call__(self, scorer, instructions, responses, threads):
        assert len(instructions) == len(responses)
        self.batches.append((scorer.name, responses))
        self.threads.append(threads)
        asyncio.run_coroutine_threadsafe(self._turn(), self.loop).result(10)
        if any(response in self.broken for response in responses):
            raise RuntimeError("broken")
        return {"scores": [float(len(each)) for each in responses], "tokens": [7] * len(responses), "version": scorer.name}

    async def _turn(self):
        self.started.release()
        await self.go.acquire()

    def send(self, batcher, main, *lists, size=4):
        """Start one task per list of responses; each pair has `size` tokens."""
        return [asyncio.create_task(batcher.score(main, ["q" * 4 * (size - 3)] * len(each), each)) for each in lists]


async def test_waiting_requests_are_scored_together_and_each_gets_its_scores():
    score, main = ScoreFunction(), scorer()
    batcher = ScoreBatcher(score, 1)
    (first,) = score.send(batcher, main, ["a"])
    await score.started.acquire()
    others = score.send(batcher, main, ["bb", "c"], ["ddd"])
    await asyncio.sleep(0)
    for _ in range(2):
        score.go.release()
    assert (await first)["scores"] == [1.0]
    assert [(await each)["scores"] for each in others] == [[2.0, 1.0], [3.0]]
    assert [len(responses) for _, responses in score.batches] == [1, 3]
    assert (await others[0])["tokens"] == [7, 7] and (await others[0])["version"] == "main"


async def test_a_long_request_is_scored_in_several_batches_and_a_short_one_runs_between_them():
    score, main = ScoreFunction(), scorer()
    batcher = ScoreBatcher(score, 1)
    texts = [str(number) for number in range(8)]
    (long,) = score.send(batcher, main, texts, size=500)
    await score.started.acquire()
    (short,) = score.send(batcher, main, ["x"], size=500)
    await asyncio.sleep(0)
    for _ in range(5):
        score.go.release()
    scored = await long
    assert scored["scores"] == [1.0] * 8 and len(scored["tokens"]) == 8
    assert (await short)["scores"] == [1.0]
    order = [response for _, responses in score.batches for response in responses]
    assert order[:3] == ["0", "1", "x"] and sorted(order) == sorted([*texts, "x"])
    assert all(len(responses) <= 2 for _, responses in score.batches)


async def test_pairs_of_similar_length_share_a_batch_and_scores_keep_the_order_of_the_request():
    score, main = ScoreFunction(), scorer()
    batcher = ScoreBatcher(score, 1)
    responses = [letter * 4 * length for letter, length in zip("abcdef", (400, 10, 390, 20, 500, 30), strict=True)]
    scoring = asyncio.create_task(batcher.score(main, [""] * 6, responses))
    for _ in range(2):
        score.go.release()
    assert (await scoring)["scores"] == [float(len(each)) for each in responses]
    assert ["".join(each[0] for each in batch) for _, batch in score.batches] == ["ea", "cfdb"]


async def test_threads_score_batches_in_parallel_and_share_the_pairs_evenly():
    score, main = ScoreFunction(), scorer()
    batcher = ScoreBatcher(score, 4)
    (scoring,) = score.send(batcher, main, [f"{number:02}" for number in range(12)], size=250)
    for _ in range(4):
        await score.started.acquire()
    # Each batch is a share of the waiting pairs, with a minimum size; the rest goes to the threads that finish first.
    assert [len(responses) for _, responses in score.batches] == [3, 2, 2, 2]
    await asyncio.sleep(0.05)
    assert len(score.batches) == 4 and score.threads == [1] * 4
    for _ in range(12):
        score.go.release()
    assert (await scoring)["scores"] == [2.0] * 12
    assert sorted(response for _, responses in score.batches for response in responses) == [f"{number:02}" for number in range(12)]


async def test_a_batch_gets_the_free_threads_that_no_waiting_pair_needs():
    score, main = ScoreFunction(), scorer()
    batcher = ScoreBatcher(score, 8)
    (alone,) = score.send(batcher, main, ["a"], size=400)
    await score.started.acquire()
    assert score.threads == [8]
    three = score.send(batcher, main, ["b", "c", "d"], size=400)
    await asyncio.sleep(0.05)
    assert score.threads == [8] and not three[0].done()
    for _ in range(4):
        score.go.release()
    await asyncio.gather(alone, *three)
    assert score.threads == [8, 2, 3, 3] and [len(responses) for _, responses in score.batches] == [1] * 4


async def test_a_stream_of_short_requests_delays_a_long_one_by_at_most_its_own_length():
    score, main = ScoreFunction(), scorer()
    batcher = ScoreBatcher(score, 1)
    (blocker,) = score.send(batcher, main, ["blocker"], size=400)
    await score.started.acquire()
    (long,) = score.send(batcher, main, [str(number) for number in range(4)], size=500)
    short, done_after = [], None
    for turn in range(12):
        short += score.send(batcher, main, [f"short {turn}"] * 2, size=450)
        await asyncio.sleep(0)
        score.go.release()
        await score.started.acquire()
        if done_after is None and long.done():
            done_after = turn
    for _ in range(30):
        score.go.release()
    await asyncio.gather(blocker, *short, long)
    # The long request has 2,000 tokens, and about as many of the short ones run before it.
    assert done_after is not None and 3 <= done_after <= 6


async def test_a_batch_has_the_pairs_of_one_scorer():
    score, one, two = ScoreFunction(), scorer("one"), scorer("two")
    batcher = ScoreBatcher(score, 1)
    (first,) = score.send(batcher, one, ["a"])
    await score.started.acquire()
    rest = [*score.send(batcher, one, ["b"]), *score.send(batcher, two, ["c"]), *score.send(batcher, one, ["d"])]
    await asyncio.sleep(0)
    for _ in range(3):
        score.go.release()
    await asyncio.gather(first, *rest)
    assert score.batches == [("one", ["a"]), ("one", ["b", "d"]), ("two", ["c"])]


async def test_a_cancelled_request_is_not_scored_and_an_error_fails_only_its_batch():
    score, main = ScoreFunction(broken=("bad",)), scorer()
    batcher = ScoreBatcher(score, 1)
    (first,) = score.send(batcher, main, ["a"])
    await score.started.acquire()
    (cancelled,) = score.send(batcher, main, ["cancelled"] * 4, size=500)
    bad, beside = score.send(batcher, main, ["bad"], ["b"])
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    (elsewhere,) = score.send(batcher, scorer("other"), ["cancelled too"])
    await asyncio.sleep(0)
    elsewhere.cancel()
    await asyncio.sleep(0)
    for _ in range(2):
        score.go.release()
    assert (await first)["scores"] == [1.0]
    for each in (bad, beside):
        with pytest.raises(RuntimeError, match="broken"):
            await each
    (after,) = score.send(batcher, main, ["after"])
    score.go.release()
    assert (await after)["scores"] == [5.0]
    assert "cancelled" not in str(score.batches)


async def test_a_request_without_pairs_gets_no_scores():
    assert (await ScoreBatcher(ScoreFunction(), 1).score(scorer(), [], []))["scores"] == []
