"""Readiness by test requests: a server whose requests all hang is not ready, even if its processes are up. Imports no Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from cluster.config import Config
from cluster.errors import typed_first_line
from serving import boosted, sampling_policy
from serving.backend import Backend
from serving.completions_api import CappyOptions, ChatRequest
from serving.messages import ChatMessage
from serving.prometheus import Metrics

logger = logging.getLogger("ray.serve")
_MAX_TOKENS = 4
_CANDIDATES = 2


class RequestProbe:
    """Whether requests are answered: a request succeeded in the last `interval_s` seconds, or else a test request succeeds now.

    Args:
        send: Sends a test request and raises if it fails.
        interval_s: Time for which a success counts, in seconds.
        timeout_s: Time limit of a test request, in seconds.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, send: Callable[[], Awaitable[object]], interval_s: float, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._send, self._interval_s, self._timeout_s, self._clock = send, interval_s, timeout_s, clock
        self._succeeded_at = float("-inf")
        self._passed = False
        self._running: asyncio.Task[None] | None = None

    def record_success(self) -> None:
        """Count a request of a client that succeeded, so that a busy server needs no test requests."""
        self._succeeded_at, self._passed = self._clock(), True

    async def check(self, wait_s: float | None = None) -> bool:
        """Return whether requests are answered.

        A test request that is not finished after `wait_s` seconds continues; until it ends, the result is that of the last one. With
        `wait_s=None` the call waits until it ends.
        """
        if self._clock() - self._succeeded_at < self._interval_s:
            return True
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._probe())
        await asyncio.wait([self._running], timeout=wait_s)
        return self._passed

    async def check_regularly(self) -> None:
        """Check every `interval_s` seconds until the task is cancelled, so that a server that hangs is detected without `/ready`."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.check()

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send()
        except Exception as error:  # a bug in any part of the server also means that requests fail
            reason = f"no answer in {self._timeout_s:g} s" if isinstance(error, TimeoutError) else typed_first_line(error)
            logger.warning("the test request failed, so the server is not ready: %s", reason)
            self._passed = False
        else:
            self.record_success()


def build_probe(config: Config, backend: Backend, fitted_scorers: set[str] | None = None) -> RequestProbe | None:
    """Return the probe of a server, or None if `serving.probe_s` and the LLM allow no test requests.

    `fitted_scorers` are the names of the scorers that are known to have a fitted selection; see `boosted.BoostedDecoding`.
    """
    serving = config.serving
    scaled_to_zero = not (serving.llm_replicas.min and serving.scorer_replicas.min)
    if serving.probe_s is None or scaled_to_zero or config.sampler.engine.kind == "endpoint":
        return None
    request = ChatRequest(
        model=serving.model_name,
        messages=[ChatMessage(role="user", content="hi")],
        max_tokens=_MAX_TOKENS,
        cappy=CappyOptions(candidates=min(_CANDIDATES, serving.max_candidates), fallback="none", selection="score"),
    )
    decodings = sampling_policy.select_decodings(request, config)
    # Separate metrics: those of the server count the requests of clients.
    decoding = boosted.BoostedDecoding(config, backend, Metrics(), set() if fitted_scorers is None else fitted_scorers)

    async def send() -> None:
        await decoding.complete(request, serving.scorer_name, decodings, lambda _: None, early=False)

    return RequestProbe(send, serving.probe_s, serving.probe_timeout_s)
