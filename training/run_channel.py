"""What Ray ships to other processes of a training run: the board, and a worker's entry.

Ray Train's controller and the board's actor import this module, and need neither torch nor transformers, which take six seconds.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.errors import CappyError


class RunChannel:
    """What the driver and its workers tell each other: progress, the error that ended the run, the order to stop. A Ray actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._failure: CappyError | None = None
        self._stop = asyncio.Event()

    async def post(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    async def take(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    async def fail(self, error: CappyError) -> None:
        self._failure = self._failure or error

    async def failure(self) -> CappyError | None:
        return self._failure

    async def stop(self) -> None:
        """Tell the workers to end after the step they are at."""
        self._stop.set()

    async def stopped(self) -> None:
        """Return once they are told to."""
        await self._stop.wait()


def run_worker(job: dict[str, Any]) -> None:
    """Train on one worker.

    `job`: `config` as a plain tree, `size` of the train split (`training.batch_plan.Size`), `checkpoints` (the run's folder), `claim` (the
    driver's `cluster.lease.Claim`), `board` (the actor), `threads` of torch (null is a fair share). What the operator must mend is
    left on the board, not raised: Ray Train would start again.
    """
    import ray
    import ray.train

    if ray.get(job["board"].failure.remote()):
        return
    from training.worker import train

    try:
        train(job)
    except CappyError as error:
        ray.get(job["board"].fail.remote(error))
        if ray.train.get_context().get_world_size() > 1:
            raise  # or the others would wait for this one; started again, they all return above
