"""Pairs of many requests, scored together: what waits while a batch is scored goes into the next ones. Knows no Ray and no HTTP.

A batch is bounded by tokens, and a request of more is scored in pieces, so that nobody waits long for a long request of somebody
else. Who is next: the request with the least sum of its arrival and its length, both in tokens, where the clock of arrivals is the
tokens scored so far. So a short request overtakes a long one, but only for as long as the long one would take by itself.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serving.protocol import Scored, joined
from serving.shelf import Held

Pairs = tuple[Held, Sequence[str], Sequence[str]]
"""A scorer, and the instructions and responses it reads."""
# Tokens of a batch by device. On a CPU a scorer of 22 million weights reads so many in less than a tenth of a second.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
# Characters of a token, about; what a request really has is known when it is scored.
_CHARACTERS = 4


@dataclass(eq=False)
class _Request:
    """A request's pieces as they are scored."""

    answer: asyncio.Future[Scored]
    parts: list[Scored | None] = field(default_factory=list)


@dataclass(order=True)
class _Piece:
    """Some of a request's pairs; pieces are in the order they are scored in."""

    key: int
    number: int
    request: _Request = field(compare=False)
    place: int = field(compare=False)
    pairs: Pairs = field(compare=False)
    tokens: int = field(compare=False)


class Batcher:
    """`score` answers the pairs of some requests at once, in a thread; what it raises fails the requests it was given."""

    def __init__(self, score: Callable[[Sequence[Pairs]], list[Scored]]) -> None:
        self._score = score
        self._waiting: list[_Piece] = []
        self._numbers = itertools.count()
        self._clock = 0
        self._worker: asyncio.Task[None] | None = None

    async def score(self, held: Held, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
        """Return the raw logits and token counts of pairs. Cancelling the call takes out of the queue what is not scored yet."""
        lengths = [_tokens(held, *pair) for pair in zip(instructions, responses, strict=True)]
        request = _Request(asyncio.get_running_loop().create_future())
        key = self._clock + sum(lengths)
        for place, (start, end) in enumerate(_pieces(lengths, _BATCH_TOKENS[held.model.device.type])):
            pairs = (held, instructions[start:end], responses[start:end])
            heapq.heappush(self._waiting, _Piece(key, next(self._numbers), request, place, pairs, sum(lengths[start:end])))
            request.parts.append(None)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await request.answer

    async def _work(self) -> None:
        while batch := self._take():
            try:
                # In a thread, so that the event loop goes on taking requests and answering health checks.
                scored = await asyncio.to_thread(self._score, [piece.pairs for piece in batch])
            except Exception as error:
                for piece in batch:
                    if not piece.request.answer.done():
                        piece.request.answer.set_exception(error)
                continue
            finally:
                self._clock += sum(piece.tokens for piece in batch)
            for piece, part in zip(batch, scored, strict=True):
                parts = piece.request.parts
                parts[piece.place] = part
                known = [each for each in parts if each is not None]
                if len(known) == len(parts) and not piece.request.answer.done():
                    piece.request.answer.set_result(joined(known))

    def _take(self) -> list[_Piece]:
        """Take the next pieces that fit a batch, one at least, all of the scorer of the first."""
        batch: list[_Piece] = []
        others: list[_Piece] = []
        tokens = 0
        while self._waiting:
            piece = heapq.heappop(self._waiting)
            if piece.request.answer.done():  # given up, or failed with another piece
                continue
            if batch and piece.pairs[0] is not batch[0].pairs[0]:
                others.append(piece)
                continue
            tokens += piece.tokens
            if batch and tokens > _BATCH_TOKENS[piece.pairs[0].model.device.type]:
                others.append(piece)
                break
            batch.append(piece)
        for piece in others:
            heapq.heappush(self._waiting, piece)
        return batch


def _tokens(held: Held, instruction: str, response: str) -> int:
    """Return about how many tokens a pair has."""
    return min(held.model.max_length, (len(instruction) + len(response)) // _CHARACTERS + 3)


def _pieces(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Return the (start, end) of pieces of at most `budget` tokens, or of one pair; one empty piece for no pairs."""
    cuts, tokens = [0], 0
    for place, length in enumerate(lengths):
        if place > cuts[-1] and tokens + length > budget:
            cuts.append(place)
            tokens = 0
        tokens += length
    return list(itertools.pairwise([*cuts, len(lengths)]))
