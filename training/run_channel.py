"""The messages between the driver and the workers of a training run, and the entry point of a worker.

Ray Train's controller and the actor's process import this module. It imports neither torch nor transformers, which take seconds.
"""

from __future__ import annotations

import asyncio

from cluster.errors import CappyError
from training.records import Event, Job


class RunChannel:
    """A Ray actor that carries the events of the workers, the error that ended the run, and the request to stop."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._failure: CappyError | None = None
        self._stop = asyncio.Event()

    async def post(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)

    async def take_events(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    async def report_failure(self, error: CappyError) -> None:
        """Record the error that ended the run. The first error counts."""
        self._failure = self._failure or error

    async def failure(self) -> CappyError | None:
        """Return the recorded error, or None."""
        return self._failure

    async def request_stop(self) -> None:
        """Request the workers to stop after their current step."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Return once `request_stop` was called."""
        await self._stop.wait()


def run_worker(job: Job) -> None:
    """Train on one worker of Ray Train.

    An error that the operator must correct is recorded in the channel and not raised: Ray Train would start the workers again. With
    several workers it is raised too, so that Ray Train stops the others. The restarted workers then return immediately.
    """
    import ray
    import ray.train

    if ray.get(job["channel"].failure.remote()):
        return
    from training.worker import train

    try:
        train(job)
    except CappyError as error:
        ray.get(job["channel"].report_failure.remote(error))
        if ray.train.get_context().get_world_size() > 1:
            raise
