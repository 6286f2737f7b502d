"""Pairs of many requests, scored in batches: what waits while others are scored goes into the next ones. Knows no Ray and no HTTP.

On a CPU batches are scored side by side, each with one of the cores: threads that share a batch wait for each other at every layer, and
so wait for all that the slowest of them waits for, where an LLM wants the same cores. Only where less waits than there are cores does a
batch get several.

A batch is bounded by tokens, and a request of more is scored in several, so that nobody waits long for a long request of somebody
else. Who is next: the request with the least sum of its arrival and its length, both in tokens, where the clock of arrivals is the
tokens scored so far. So a short request overtakes a long one, but only for as long as the long one would take by itself.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from serving.backend import Scored
from serving.scorer_cache import LoadedScorer

ScoreFunction = Callable[[LoadedScorer, Sequence[str], Sequence[str], int], Scored]
"""Scores the pairs of some instructions and responses with so many threads."""
# Tokens of a batch at most, by device. On a CPU core a scorer of 22 million weights reads so many in less than a tenth of a second.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
# And what is not shared out among threads: fewer tokens in each of more batches would cost more than it saves.
_UNSHARED_TOKENS = 512
# Characters of a token, about; what a pair really has is known when it is scored.
_CHARACTERS = 4


@dataclass(eq=False)
class _Request:
    """A request as its pairs are scored."""

    answer: asyncio.Future[Scored]
    held: LoadedScorer
    scores: list[float]
    tokens: list[int]
    left: int


@dataclass(order=True)
class _Pair:
    """Pairs are in the order they are scored in: by request, the longest of one first, so that batches have pairs of like lengths."""

    order: tuple[int, int, int]
    request: _Request = field(compare=False)
    place: int = field(compare=False)
    instruction: str = field(compare=False)
    response: str = field(compare=False)
    tokens: int = field(compare=False)


class ScoreBatcher:
    """`score` is called in `threads` threads, with that many to compute with in all of them; what it raises fails the requests in it."""

    def __init__(self, score: ScoreFunction, threads: int) -> None:
        self._score = score
        self._threads = self._free = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="scoring")
        # A heap for each scorer, by its identity: two versions of one are two.
        self._waiting: dict[int, list[_Pair]] = {}
        self._tokens = 0  # of those that wait
        self._numbers = itertools.count()
        self._clock = 0
        self._running: set[asyncio.Task[None]] = set()

    async def score(self, held: LoadedScorer, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
        """Return the raw logits and token counts of pairs. Cancelling the call takes out of the queue what is not scored yet.

        Raises `ValueError` when the lists differ in length.
        """
        count = len(instructions)
        lengths = [_tokens(held, *pair) for pair in zip(instructions, responses, strict=True)]
        if not count:
            return Scored(scores=[], tokens=[])
        request = _Request(asyncio.get_running_loop().create_future(), held, [math.nan] * count, [0] * count, count)
        key = self._clock + sum(lengths)
        waiting = self._waiting.setdefault(id(held), [])
        for place, (length, instruction, response) in enumerate(zip(lengths, instructions, responses, strict=True)):
            order = (key, -length, next(self._numbers))
            heapq.heappush(waiting, _Pair(order, request, place, instruction, response, length))
        self._tokens += sum(lengths)
        self._start()
        return await request.answer

    def _start(self) -> None:
        """Begin as many batches as there are threads for."""
        while self._free and (batch := self._take()):
            # What is left of the threads is shared with the batches that are begun next.
            threads = max(1, self._free // (1 + sum(map(len, self._waiting.values()))))
            self._free -= threads
            task = asyncio.create_task(self._run(batch, threads))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: Sequence[_Pair], threads: int) -> None:
        texts = [pair.instruction for pair in batch], [pair.response for pair in batch]
        try:
            # Not in the event loop, which goes on taking requests and answering health checks.
            scored = await asyncio.get_running_loop().run_in_executor(self._pool, self._score, batch[0].request.held, *texts, threads)
        except Exception as error:
            for pair in batch:
                if not pair.request.answer.done():
                    pair.request.answer.set_exception(error)
        else:
            for pair, score, tokens in zip(batch, scored["scores"], scored["tokens"], strict=True):
                request = pair.request
                request.scores[pair.place], request.tokens[pair.place] = score, tokens
                request.left -= 1
                if not request.left and not request.answer.done():
                    request.answer.set_result({**scored, "scores": request.scores, "tokens": request.tokens})
        finally:
            self._free += threads
            self._clock += sum(pair.tokens for pair in batch)
            self._start()

    def _take(self) -> list[_Pair]:
        """Take the next pairs that make a batch, one at least, all of the scorer of the first.

        A batch has no more than a thread's share of all that waits (guided self-scheduling: Polychronopoulos and Kuck, 1987), so that
        the threads are done at about the same time.
        """
        batch: list[_Pair] = []
        while self._waiting and not batch:
            waiting = min(self._waiting.values(), key=lambda pairs: pairs[0])
            held, tokens = waiting[0].request.held, 0
            most = min(_BATCH_TOKENS[held.model.device.type], max(_UNSHARED_TOKENS, self._tokens / self._threads))
            while waiting:
                alive = not waiting[0].request.answer.done()  # else given up, or failed with another pair
                if alive and batch and tokens + waiting[0].tokens > most:
                    break
                pair = heapq.heappop(waiting)
                self._tokens -= pair.tokens
                if alive:
                    tokens += pair.tokens
                    batch.append(pair)
            if not waiting:
                del self._waiting[id(held)]
        return batch


def _tokens(held: LoadedScorer, instruction: str, response: str) -> int:
    """Return about how many tokens a pair has."""
    return min(held.model.max_length, (len(instruction) + len(response)) // _CHARACTERS + 3)
