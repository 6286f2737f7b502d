"""A load generator for HTTP servers: so many clients without a pause, or requests at given moments. Knows no server in particular.

In an open load latency counts from the moment a request was due, sent late or not, so that a server that stalls is not asked less.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

Body = dict[str, Any]
_GIVEN_UP_S = 300.0


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    due: float
    """When it was to be sent, in seconds after the load began."""
    latency: float
    """Seconds from then until the whole answer was there."""
    status: int
    """0 where the connection broke."""
    tree: dict[str, Any] = field(default_factory=dict)
    """The JSON answered, or `{"error": ...}`."""


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the moments of a Poisson process of `rate` a second, in seconds, below `seconds`."""
    draw = random.Random(seed)
    moments = itertools.accumulate(iter(lambda: draw.expovariate(rate), None))
    return list(itertools.takewhile(lambda moment: moment < seconds, moments))


def quantiles(values: Sequence[float], *shares: float) -> list[float]:
    """Return the quantiles of some values, interpolated; NaN where there are none."""
    return [float(value) for value in np.quantile(values, shares)] if values else [float("nan")] * len(shares)


async def closed(url: str, bodies: Sequence[Body], clients: int) -> list[Answer]:
    """Have `clients` post the bodies, each the next one when its last is answered; return the answers as they came."""
    answers: list[Answer] = []
    waiting = iter(bodies)
    async with _session() as session:
        start = time.perf_counter()

        async def client() -> None:
            for body in waiting:
                answers.append(await _post(session, url, body, start, time.perf_counter() - start))

        await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def opened(url: str, bodies: Iterable[Body], moments: Sequence[float]) -> list[Answer]:
    """Post a body at each of `moments`, whatever became of the ones before; return the answers in that order."""
    tasks = []
    async with _session() as session:
        start = time.perf_counter()
        for moment, body in zip(moments, bodies, strict=False):
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(_post(session, url, body, start, moment)))
        return list(await asyncio.gather(*tasks))


def rate(answers: Sequence[Answer], clients: int) -> float:
    """Return the answers a second of a closed load while all its clients were busy: between the first and the last `clients` answers.

    Without that one long request at the end would decide, which the server has then to itself.
    """
    ends = sorted(answer.due + answer.latency for answer in answers)
    if len(ends) < 3 * clients:
        raise ValueError(f"{len(ends)} answers to {clients} clients say nothing of a rate; ask for {3 * clients} at least")
    return (len(ends) - 2 * clients) / (ends[-clients - 1] - ends[clients - 1])


def seconds(answers: Sequence[Answer]) -> float:
    """Return how long a load took, from its first request to its last answer."""
    return max(answer.due + answer.latency for answer in answers)


def _session() -> aiohttp.ClientSession:
    # Without a limit on connections: it would be a queue that no clock sees.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_GIVEN_UP_S))


async def _post(session: aiohttp.ClientSession, url: str, body: Body, start: float, due: float) -> Answer:
    try:
        async with session.post(url, json=body) as response:
            tree, status = await response.json(content_type=None), response.status
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        tree, status = {"error": {"message": f"{type(error).__name__}: {error}"}}, 0
    return Answer(due, time.perf_counter() - start - due, status, tree)
