import asyncio
from types import SimpleNamespace

import pytest

from serving.score_batcher import ScoreBatcher


def held(name="main", device="cpu"):
    return SimpleNamespace(name=name, model=SimpleNamespace(device=SimpleNamespace(type=device), max_length=512))


class Reader:
    """Scores pairs by the length of their response, once `go` lets it; keeps the batches it was given and with how many threads."""

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

    def answered(self, batcher, main, *lists, size=4):
        """Ask for lists of responses, one task each; each pair has `size` tokens."""
        return [asyncio.create_task(batcher.score(main, ["q" * 4 * (size - 3)] * len(each), each)) for each in lists]


async def test_what_waits_is_scored_together_and_everyone_gets_the_own_scores():
    reader, main = Reader(), held()
    batcher = ScoreBatcher(reader, 1)
    (first,) = reader.answered(batcher, main, ["a"])
    await reader.started.acquire()
    others = reader.answered(batcher, main, ["bb", "c"], ["ddd"])
    await asyncio.sleep(0)
    for _ in range(2):
        reader.go.release()
    assert (await first)["scores"] == [1.0]
    assert [(await each)["scores"] for each in others] == [[2.0, 1.0], [3.0]]
    assert [len(responses) for _, responses in reader.batches] == [1, 3]
    assert (await others[0])["tokens"] == [7, 7] and (await others[0])["version"] == "main"


async def test_a_long_request_is_scored_in_pieces_and_a_short_one_need_not_wait_for_all_of_it():
    reader, main = Reader(), held()
    batcher = ScoreBatcher(reader, 1)
    texts = [str(number) for number in range(8)]
    (long,) = reader.answered(batcher, main, texts, size=500)
    await reader.started.acquire()
    (short,) = reader.answered(batcher, main, ["x"], size=500)
    await asyncio.sleep(0)
    for _ in range(5):
        reader.go.release()
    scored = await long
    assert scored["scores"] == [1.0] * 8 and len(scored["tokens"]) == 8
    assert (await short)["scores"] == [1.0]
    read = [response for _, responses in reader.batches for response in responses]
    assert read[:3] == ["0", "1", "x"] and sorted(read) == sorted([*texts, "x"])
    assert all(len(responses) <= 2 for _, responses in reader.batches)


async def test_pairs_of_like_lengths_are_scored_together_and_answered_in_the_order_asked_for():
    reader, main = Reader(), held()
    batcher = ScoreBatcher(reader, 1)
    responses = [letter * 4 * length for letter, length in zip("abcdef", (400, 10, 390, 20, 500, 30), strict=True)]
    asked = asyncio.create_task(batcher.score(main, [""] * 6, responses))
    for _ in range(2):
        reader.go.release()
    assert (await asked)["scores"] == [float(len(each)) for each in responses]
    assert ["".join(each[0] for each in batch) for _, batch in reader.batches] == ["ea", "cfdb"]


async def test_threads_score_batches_side_by_side_and_are_done_together():
    reader, main = Reader(), held()
    batcher = ScoreBatcher(reader, 4)
    (asked,) = reader.answered(batcher, main, [f"{number:02}" for number in range(12)], size=250)
    for _ in range(4):
        await reader.started.acquire()
    # A share of what waits for each, though not too small a one; the rest is for who is done first.
    assert [len(responses) for _, responses in reader.batches] == [3, 2, 2, 2]
    await asyncio.sleep(0.05)
    assert len(reader.batches) == 4 and reader.threads == [1] * 4
    for _ in range(12):
        reader.go.release()
    assert (await asked)["scores"] == [2.0] * 12
    assert sorted(response for _, responses in reader.batches for response in responses) == [f"{number:02}" for number in range(12)]


async def test_threads_that_nothing_else_waits_for_compute_together():
    reader, main = Reader(), held()
    batcher = ScoreBatcher(reader, 8)
    (alone,) = reader.answered(batcher, main, ["a"], size=400)
    await reader.started.acquire()
    assert reader.threads == [8]
    three = reader.answered(batcher, main, ["b", "c", "d"], size=400)
    await asyncio.sleep(0.05)
    assert reader.threads == [8] and not three[0].done()
    for _ in range(4):
        reader.go.release()
    await asyncio.gather(alone, *three)
    assert reader.threads == [8, 2, 3, 3] and [len(responses) for _, responses in reader.batches] == [1] * 4


async def test_short_requests_that_go_on_coming_hold_a_long_one_up_for_its_own_length_alone():
    reader, main = Reader(), held()
    batcher = ScoreBatcher(reader, 1)
    (blocker,) = reader.answered(batcher, main, ["blocker"], size=400)
    await reader.started.acquire()
    (long,) = reader.answered(batcher, main, [str(number) for number in range(4)], size=500)
    short, done_after = [], None
    for turn in range(12):
        short += reader.answered(batcher, main, [f"short {turn}"] * 2, size=450)
        await asyncio.sleep(0)
        reader.go.release()
        await reader.started.acquire()
        if done_after is None and long.done():
            done_after = turn
    for _ in range(30):
        reader.go.release()
    await asyncio.gather(blocker, *short, long)
    # Two thousand tokens of its own, and about as many of others.
    assert done_after is not None and 3 <= done_after <= 6


async def test_a_batch_is_of_one_scorer():
    reader, one, two = Reader(), held("one"), held("two")
    batcher = ScoreBatcher(reader, 1)
    (first,) = reader.answered(batcher, one, ["a"])
    await reader.started.acquire()
    rest = [*reader.answered(batcher, one, ["b"]), *reader.answered(batcher, two, ["c"]), *reader.answered(batcher, one, ["d"])]
    await asyncio.sleep(0)
    for _ in range(3):
        reader.go.release()
    await asyncio.gather(first, *rest)
    assert reader.batches == [("one", ["a"]), ("one", ["b", "d"]), ("two", ["c"])]


async def test_what_is_given_up_is_not_read_and_what_fails_fails_its_batch_alone():
    reader, main = Reader(broken=("bad",)), held()
    batcher = ScoreBatcher(reader, 1)
    (first,) = reader.answered(batcher, main, ["a"])
    await reader.started.acquire()
    (gone,) = reader.answered(batcher, main, ["gone"] * 4, size=500)
    bad, beside = reader.answered(batcher, main, ["bad"], ["b"])
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    (elsewhere,) = reader.answered(batcher, held("other"), ["gone too"])
    await asyncio.sleep(0)
    elsewhere.cancel()
    await asyncio.sleep(0)
    for _ in range(2):
        reader.go.release()
    assert (await first)["scores"] == [1.0]
    for each in (bad, beside):
        with pytest.raises(RuntimeError, match="broken"):
            await each
    (after,) = reader.answered(batcher, main, ["after"])
    reader.go.release()
    assert (await after)["scores"] == [5.0]
    assert "gone" not in str(reader.batches)


async def test_no_pairs_have_no_scores():
    assert (await ScoreBatcher(Reader(), 1).score(held(), [], []))["scores"] == []
