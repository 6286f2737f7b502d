"""Generate load on an HTTP server: a closed loop of clients without pauses, or an open loop with requests at given times.

In an open loop, latency counts from the time a request was due, even if it was sent late. A slow server then does not lower the load.
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
    """The outcome of one request."""

    due: float
    """Time when the request was due, in seconds after the start of the load."""
    latency: float
    """Seconds from `due` until the whole answer arrived."""
    status: int
    """HTTP status; 0 if the connection broke."""
    tree: dict[str, Any] = field(default_factory=dict)
    """The JSON of the answer, or `{"error": ...}`."""


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the times, in seconds, of a Poisson process of `rate` events per second, below `seconds`."""
    draw = random.Random(seed)
    moments = itertools.accumulate(iter(lambda: draw.expovariate(rate), None))
    return list(itertools.takewhile(lambda moment: moment < seconds, moments))


def quantiles(values: Sequence[float], *shares: float) -> list[float]:
    """Return the quantiles of some values, interpolated; NaN if there are no values."""
    return [float(value) for value in np.quantile(values, shares)] if values else [float("nan")] * len(shares)


async def closed_loop(url: str, bodies: Sequence[Body], clients: int) -> list[Answer]:
    """Post the bodies with `clients` clients, which wait for an answer before the next request; return answers in order of arrival."""
    answers: list[Answer] = []
    waiting = iter(bodies)
    async with _session() as session:
        start = time.perf_counter()

        async def client() -> None:
            for body in waiting:
                answers.append(await _post(session, url, body, start, time.perf_counter() - start))

        await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(url: str, bodies: Iterable[Body], moments: Sequence[float]) -> list[Answer]:
    """Post one body at each time of `moments`, without waiting for earlier answers; return the answers in order of `moments`."""
    tasks = []
    async with _session() as session:
        start = time.perf_counter()
        for moment, body in zip(moments, bodies, strict=False):
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            tasks.append(asyncio.create_task(_post(session, url, body, start, moment)))
        return list(await asyncio.gather(*tasks))


def closed_loop_rate(answers: Sequence[Answer], clients: int) -> float:
    """Return the answers per second of a closed loop, without its first and last `clients` answers.

    All clients are busy in between. At the end, one long request alone would lower the rate. Raises `ValueError` if there are fewer
    than 3 answers per client.
    """
    ends = sorted(answer.due + answer.latency for answer in answers)
    if len(ends) < 3 * clients:
        raise ValueError(f"{len(ends)} answers to {clients} clients are too few for a rate; send at least {3 * clients} requests")
    return (len(ends) - 2 * clients) / (ends[-clients - 1] - ends[clients - 1])


def duration_s(answers: Sequence[Answer]) -> float:
    """Return the duration of a load in seconds, from its start to its last answer."""
    return max(answer.due + answer.latency for answer in answers)


def _session() -> aiohttp.ClientSession:
    # A limit on connections would be a queue in the client.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_GIVEN_UP_S))


async def _post(session: aiohttp.ClientSession, url: str, body: Body, start: float, due: float) -> Answer:
    try:
        async with session.post(url, json=body) as response:
            tree, status = await response.json(content_type=None), response.status
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        tree, status = {"error": {"message": f"{type(error).__name__}: {error}"}}, 0
    return Answer(due, time.perf_counter() - start - due, status, tree)
