"""What Ray ships to other processes of a training run: the board, and a worker's entry.

Ray Train's controller and the board's actor import this module, and need neither torch nor transformers, which take six seconds.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import CappyError


class Board:
    """What the first worker tells the driver: progress, and the error that ended it. A Ray actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._failure: CappyError | None = None

    def post(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def fail(self, error: CappyError) -> None:
        self._failure = self._failure or error

    def failure(self) -> CappyError | None:
        return self._failure


def work(job: dict[str, Any]) -> None:
    """Train on one worker.

    `job`: `config` as a plain tree, `size` of the train split (`stream.Size`), `board` (the actor), `threads` of torch (null is a
    fair share).
    """
    import ray

    # An error the operator must mend comes again at every restart, so the restarts Ray Train still grants end at once.
    failure = ray.get(job["board"].failure.remote())
    if failure:
        raise failure
    from training.worker import train

    try:
        train(job)
    except CappyError as error:
        ray.get(job["board"].fail.remote(error))
        raise
