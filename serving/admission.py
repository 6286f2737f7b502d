"""The queue that limits how many requests the gateway accepts. Imports neither Ray nor a web framework."""

from __future__ import annotations

import asyncio

from serving.backend import ApiError


class AdmissionQueue:
    """An asynchronous context manager that runs up to `max_running` requests, queues up to `max_waiting` and rejects the rest."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._capacity = max_running + max_waiting
        # Requests that are running or queued.
        self.active = 0

    @property
    def has_capacity(self) -> bool:
        """Whether the queue accepts another request."""
        return self.active < self._capacity

    def check_capacity(self) -> None:
        """Raise `ApiError` (503) if the queue is full."""
        if not self.has_capacity:
            raise ApiError(f"the server is full: {self.active} requests are running or queued; retry later", 503, code="overloaded")

    async def __aenter__(self) -> None:
        self.check_capacity()
        self.active += 1
        try:
            await self._slots.acquire()
        except BaseException:
            self.active -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._slots.release()
        self.active -= 1
