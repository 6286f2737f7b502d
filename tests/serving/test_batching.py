import asyncio
from types import SimpleNamespace

import pytest

from serving.batching import Batcher


def held(name="main", device="cpu"):
    return SimpleNamespace(name=name, model=SimpleNamespace(device=SimpleNamespace(type=device), max_length=512))


class Reader:
    """Scores pairs by the length of their response, once `go` lets it; keeps the batches it was given."""

    def __init__(self, broken=()):
        self.batches, self.broken, self.started, self.go = [], broken, asyncio.Semaphore(0), asyncio.Semaphore(0)
        self.loop = asyncio.get_running_loop()

    def __call__(self, pieces):
        self.batches.append([(each.name, responses) for each, _, responses in pieces])
        asyncio.run_coroutine_threadsafe(self._turn(), self.loop).result(10)
        if any(response in self.broken for _, _, responses in pieces for response in responses):
            raise RuntimeError("broken")
        return [
            {"scores": [float(len(each)) for each in some], "tokens": [7] * len(some), "version": each.name} for each, _, some in pieces
        ]

    async def _turn(self):
        self.started.release()
        await self.go.acquire()

    def answered(self, batcher, main, *lists, size=4):
        """Ask for lists of responses, one task each; each pair has `size` tokens."""
        return [asyncio.create_task(batcher.score(main, ["q" * 4 * (size - 3)] * len(each), each)) for each in lists]


async def test_what_waits_is_scored_together_and_everyone_gets_the_own_scores():
    reader, main = Reader(), held()
    batcher = Batcher(reader)
    (first,) = reader.answered(batcher, main, ["a"])
    await reader.started.acquire()
    others = reader.answered(batcher, main, ["bb", "c"], ["ddd"])
    await asyncio.sleep(0)
    for _ in range(2):
        reader.go.release()
    assert (await first)["scores"] == [1.0]
    assert [(await each)["scores"] for each in others] == [[2.0, 1.0], [3.0]]
    assert [len(batch) for batch in reader.batches] == [1, 2]
    assert (await others[0])["tokens"] == [7, 7] and (await others[0])["version"] == "main"


async def test_a_long_request_is_scored_in_pieces_and_a_short_one_need_not_wait_for_all_of_it():
    reader, main = Reader(), held()
    batcher = Batcher(reader)
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
    read = [response for batch in reader.batches for _, responses in batch for response in responses]
    assert read[:3] == ["0", "1", "x"] and sorted(read) == sorted([*texts, "x"])
    assert all(sum(len(responses) for _, responses in batch) <= 2 for batch in reader.batches)


async def test_short_requests_that_go_on_coming_hold_a_long_one_up_for_its_own_length_alone():
    reader, main = Reader(), held()
    batcher = Batcher(reader)
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


async def test_scorers_are_read_one_at_a_time():
    reader, one, two = Reader(), held("one"), held("two")
    batcher = Batcher(reader)
    (first,) = reader.answered(batcher, one, ["a"])
    await reader.started.acquire()
    rest = [*reader.answered(batcher, one, ["b"]), *reader.answered(batcher, two, ["c"]), *reader.answered(batcher, one, ["d"])]
    await asyncio.sleep(0)
    for _ in range(3):
        reader.go.release()
    await asyncio.gather(first, *rest)
    assert [{name for name, _ in batch} for batch in reader.batches] == [{"one"}, {"one"}, {"two"}]
    assert len(reader.batches[1]) == 2


async def test_what_is_given_up_is_not_read_and_what_fails_fails_its_batch_alone():
    reader, main = Reader(broken=("bad",)), held()
    batcher = Batcher(reader)
    (first,) = reader.answered(batcher, main, ["a"])
    await reader.started.acquire()
    (gone,) = reader.answered(batcher, main, ["gone"] * 4, size=500)
    bad, beside = reader.answered(batcher, main, ["bad"], ["b"])
    await asyncio.sleep(0)
    gone.cancel()
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
    reader = Reader()
    reader.go.release()
    assert (await Batcher(reader).score(held(), [], []))["scores"] == []
