"""The queue that limits how many requests the gateway accepts. Imports neither Ray nor a web framework."""

from __future__ import annotations

import asyncio

from serving.backend import ApiError


class AdmissionQueue:
    """Lets `max_running` requests in, keeps `waiting` more at the door and turns the rest away."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._slots = asyncio.Semaphore(max_running)
        self._capacity = max_running + max_waiting
        self.active = 0

    @property
    def has_capacity(self) -> bool:
        """Whether one more may come in."""
        return self.active < self._capacity

    def check_capacity(self) -> None:
        """Raise `ApiError` (503) where one more may not come in."""
        if not self.has_capacity:
            raise ApiError(f"the server has {self.active} requests in work or waiting; try again", 503, code="overloaded")

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
