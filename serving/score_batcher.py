"""Batch the pairs of many requests for a scorer: pairs that arrive while a batch is scored go into the next batches.

Imports neither Ray nor a web framework.

On a CPU several batches are scored in parallel, each on one core. Threads that share a batch wait for each other at every layer, and
one thread is often delayed when an LLM uses the same cores. A batch gets several threads only if fewer pairs wait than threads are free.

The number of tokens in a batch is limited. A longer request is scored in several batches, so that it delays other requests little.
Requests are ordered by arrival plus length, smallest sum first. The unit of these numbers is the token: the arrival is the number of
tokens scored so far. Shorter requests can therefore run before a longer one that arrived earlier. Together they delay it by at most
the time that the longer request itself takes.
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
"""Scores pairs, given a scorer, the instructions, the responses and the number of threads."""
# Maximum tokens of a batch, by device type. The limit bounds the time that a batch occupies a thread.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
# Waiting tokens up to this number are not split among threads: the overhead of another batch would exceed the gain.
_UNSPLIT_TOKENS = 512
# Estimated characters per token; the exact number is known only after tokenisation.
_CHARACTERS_PER_TOKEN = 4


@dataclass(eq=False)
class _Request:
    """A request while its pairs are scored."""

    result: asyncio.Future[Scored]
    scorer: LoadedScorer
    scores: list[float]
    tokens: list[int]
    remaining: int
    """Number of pairs without a score."""


@dataclass(order=True)
class _Pair:
    """A waiting pair. Pairs sort by request, and within a request the longest first, so that a batch has pairs of similar length."""

    order: tuple[int, int, int]
    """Priority of the request, negative length, running number."""
    request: _Request = field(compare=False)
    index: int = field(compare=False)
    """Position in the request."""
    instruction: str = field(compare=False)
    response: str = field(compare=False)
    tokens: int = field(compare=False)
    """Estimated length."""


class ScoreBatcher:
    """Score pairs in batches with up to `threads` threads in total.

    `score` is called in worker threads. An exception that it raises fails every request with a pair in that batch.
    """

    def __init__(self, score: ScoreFunction, threads: int) -> None:
        self._score = score
        self._threads = self._free_threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="scoring")
        # One heap per scorer, by the identity of the object: two versions of a scorer are two scorers.
        self._waiting: dict[int, list[_Pair]] = {}
        self._waiting_tokens = 0
        self._numbers = itertools.count()
        self._scored_tokens = 0
        self._running: set[asyncio.Task[None]] = set()

    async def score(self, scorer: LoadedScorer, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
        """Return the raw logits and token counts of pairs. Cancelling the call removes its waiting pairs from the queue.

        Raises `ValueError` if the lists differ in length.
        """
        count = len(instructions)
        lengths = [_estimate_tokens(scorer, *pair) for pair in zip(instructions, responses, strict=True)]
        if not count:
            return Scored(scores=[], tokens=[])
        request = _Request(asyncio.get_running_loop().create_future(), scorer, [math.nan] * count, [0] * count, count)
        priority = self._scored_tokens + sum(lengths)
        waiting = self._waiting.setdefault(id(scorer), [])
        for index, (length, instruction, response) in enumerate(zip(lengths, instructions, responses, strict=True)):
            order = (priority, -length, next(self._numbers))
            heapq.heappush(waiting, _Pair(order, request, index, instruction, response, length))
        self._waiting_tokens += sum(lengths)
        self._start_batches()
        return await request.result

    def _start_batches(self) -> None:
        """Start batches while threads are free and pairs wait."""
        while self._free_threads and (batch := self._next_batch()):
            # The free threads are divided between this batch and the pairs that still wait.
            threads = max(1, self._free_threads // (1 + sum(map(len, self._waiting.values()))))
            self._free_threads -= threads
            task = asyncio.create_task(self._run_batch(batch, threads))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run_batch(self, batch: Sequence[_Pair], threads: int) -> None:
        texts = [pair.instruction for pair in batch], [pair.response for pair in batch]
        try:
            # In a worker thread: the event loop must keep accepting requests and answering health checks.
            scored = await asyncio.get_running_loop().run_in_executor(self._pool, self._score, batch[0].request.scorer, *texts, threads)
        except Exception as error:
            for pair in batch:
                if not pair.request.result.done():
                    pair.request.result.set_exception(error)
        else:
            for pair, score, tokens in zip(batch, scored["scores"], scored["tokens"], strict=True):
                request = pair.request
                request.scores[pair.index], request.tokens[pair.index] = score, tokens
                request.remaining -= 1
                if not request.remaining and not request.result.done():
                    request.result.set_result({**scored, "scores": request.scores, "tokens": request.tokens})
        finally:
            self._free_threads += threads
            self._scored_tokens += sum(pair.tokens for pair in batch)
            self._start_batches()

    def _next_batch(self) -> list[_Pair]:
        """Remove the next batch from the queue: one pair or more, all for the scorer of the first pair. Return [] if none waits.

        A batch has at most one thread's share of the waiting tokens, so that the threads finish at about the same time
        (guided self-scheduling: Polychronopoulos and Kuck, 1987).
        """
        batch: list[_Pair] = []
        while self._waiting and not batch:
            waiting = min(self._waiting.values(), key=lambda pairs: pairs[0])
            scorer, tokens = waiting[0].request.scorer, 0
            share = self._waiting_tokens / self._threads
            max_tokens = min(_BATCH_TOKENS[scorer.model.device.type], max(_UNSPLIT_TOKENS, share))
            while waiting:
                # A request is done here if it was cancelled, or if another of its batches failed.
                needed = not waiting[0].request.result.done()
                if needed and batch and tokens + waiting[0].tokens > max_tokens:
                    break
                pair = heapq.heappop(waiting)
                self._waiting_tokens -= pair.tokens
                if needed:
                    tokens += pair.tokens
                    batch.append(pair)
            if not waiting:
                del self._waiting[id(scorer)]
        return batch


def _estimate_tokens(scorer: LoadedScorer, instruction: str, response: str) -> int:
    """Return the estimated number of tokens of a pair, at most the scorer's maximum length."""
    return min(scorer.model.max_length, (len(instruction) + len(response)) // _CHARACTERS_PER_TOKEN + 3)
