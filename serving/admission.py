"""The queue that limits how many requests the gateway accepts. Imports neither Ray nor a web framework."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from serving.backend import ApiError


class AdmissionQueue:
    """Runs up to `max_running` requests, queues up to `max_waiting` and rejects the rest.

    A request has a place from the start of its body to its end, so that slow bodies also count.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.slots = asyncio.Semaphore(max_running)
        self._capacity = max_running + max_waiting
        # Requests whose body arrives or is checked.
        self.arriving = 0
        # Requests that are running or queued.
        self.active = 0

    @property
    def has_capacity(self) -> bool:
        """Whether the queue accepts another request."""
        return self.arriving + self.active < self._capacity

    @contextmanager
    def reserve(self) -> Iterator[Place]:
        """Give the request in the block a place. If `Place.run` starts in the block, the place is free when that has ended.

        Raises `ApiError` (503) if the queue is full.
        """
        if not self.has_capacity:
            taken = self.arriving + self.active
            raise ApiError(f"the server is full: {taken} requests are running, queued or arriving; retry later", 503, code="overloaded")
        place = Place(self)
        self.arriving += 1
        try:
            yield place
        finally:
            if not place.started:
                self.arriving -= 1


class Place:
    """The place of one request in an `AdmissionQueue`; `AdmissionQueue.reserve` makes it."""

    def __init__(self, queue: AdmissionQueue) -> None:
        self._queue, self.started = queue, False

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Wait until the request may run, and run the block. The place is free after it, or if the wait is cancelled."""
        self.started = True
        self._queue.arriving -= 1
        self._queue.active += 1
        try:
            async with self._queue.slots:
                yield
        finally:
            self._queue.active -= 1
