"""The connection to an endpoint: one request at a time is sent within the rate limits, the pauses and the cost of its call. No Ray.

Cost: a request that was sent and not answered counts as charged in full. It is retried only if the call then stays within
`max_cost`, so `max_cost` is an upper bound for any network failure.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from cluster.config import EndpointConfig
from cluster.errors import UsageError, first_line
from cluster.progress import log
from generation import prompts
from generation.engines.contract import EngineUnavailable, read_api_key
from generation.engines.endpoint_answers import read_usage
from generation.engines.endpoint_errors import ErrorAnswer, read_error
from generation.engines.rate_limit import RateLimiter, parse_retry_after

# An upper bound of prompt tokens: one per byte, and the tokens that a chat template adds once (system text) and to each turn (marks).
_TEMPLATE_TOKENS = 128
_TURN_TOKENS = 16
# Minimum pause after a `Retry-After`: some servers send 0 and still reject the next request.
_MIN_COOLDOWN_S = 1.0
# Pauses without an answer between them double up to this length, because some servers always send the same short time.
_MAX_GROWN_PAUSE_S = 32.0
# A pause of at least this length is always logged, shorter ones at most once in this time.
_LOGGED_PAUSE_S = 10.0
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_CERTIFICATES = ("ssl_cert_file", "ssl_cert_dir")


class RetryableError(Exception):
    """The request may be retried: after the pause of the engine (`cooling_down`), else after a back-off."""

    def __init__(self, reason: str, cooling_down: bool = False, timed_out: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.cooling_down, self.timed_out, self.retry_after_s = cooling_down, timed_out, retry_after_s


@dataclass
class CallCost:
    """The cost of one `sample` call, in dollars."""

    left: float
    """The part of `max_cost` that is neither spent nor reserved for a running request."""
    spent: float = 0.0
    prompt_tokens: int | None = None
    """Prompt tokens, as counted by the server."""


class EndpointClient:
    """An HTTP client of one server. It is created once per engine, because all requests share the limits of rate and concurrency.

    Raises `UsageError` for an API key, an address or proxy variables that cannot be used.
    """

    def __init__(self, config: EndpointConfig, max_wait_s: float) -> None:
        self.config, self.max_wait_s = config, max_wait_s
        self._key = read_api_key(config.api_key_env)
        self._http = open_http(config, self._key)
        self._concurrency = asyncio.Semaphore(config.concurrency)
        self._requests, self._tokens = RateLimiter(config.requests_per_minute), RateLimiter(config.tokens_per_minute)
        # End of the current pause, and the time of the last log line about one, by `time.monotonic`.
        self._resume_at, self._pause_logged_at = 0.0, -math.inf
        # Pauses since the last success.
        self._pauses = 0

    def cost(self, prompt_tokens: float, sampled_tokens: float) -> float:
        """Return the cost in dollars, 0 without prices."""
        prices = self.config.price_per_million_prompt or 0.0, self.config.price_per_million_sampled or 0.0
        return (prompt_tokens * prices[0] + sampled_tokens * prices[1]) / 1e6

    async def send(
        self, prompt: list[prompts.Message] | str, body: dict[str, Any], sampled: int, request_id: str, call_cost: CallCost
    ) -> tuple[httpx.Response, ErrorAnswer | None]:
        """Send one request and record its cost. Return the answer, and its error or None for a success.

        Raises `RetryableError` without an answer, and `EngineUnavailable` if the request could exceed the cost of the call.

        Args:
            prompt: the messages or the text.
            body: the JSON body.
            sampled: tokens that the request can sample at most.
            request_id: value of the `X-Request-Id` header.
            call_cost: the cost of the `sample` call; a request that could exceed `left` is not sent.
        """
        reserved = self.cost(max_prompt_tokens(prompt), sampled)
        if reserved > call_cost.left + 1e-12:
            raise unavailable(
                "endpoint did not answer requests of this row and may have charged for them; the row is not retried", timed_out=True
            )
        call_cost.left -= reserved
        # For the token rate: about 4 bytes per prompt token; corrected when the answer reports the exact number.
        expected = max_prompt_tokens(prompt) / 4 + sampled
        async with self._concurrency:
            try:
                await self._wait_for_rate(expected)
            except EngineUnavailable:
                call_cost.left += reserved
                raise
            try:
                path = "/completions" if isinstance(prompt, str) else "/chat/completions"
                response = await self._http.post(path, json=body, headers={"X-Request-Id": request_id})
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
                # The request was not sent, so the server cannot charge for it.
                call_cost.left += reserved
                raise RetryableError(f"{type(error).__name__}: {error}") from None
            except httpx.RequestError as error:
                call_cost.spent += reserved
                timed_out = isinstance(error, httpx.TimeoutException)
                raise RetryableError(
                    f"{type(error).__name__} after {self.config.timeout_s:g} s at most: {error}", timed_out=timed_out
                ) from None
            except asyncio.CancelledError:
                call_cost.spent += reserved
                raise
        failure = read_error(response, self._key)
        if failure is None:
            self._pauses = 0
        charged = reserved if failure is None else 0.0
        usage = read_usage(response)
        if usage is not None and response.is_success:
            charged = self.cost(*usage)
            call_cost.prompt_tokens = usage.prompt
            self._tokens.release(expected - sum(usage))
        elif failure is not None:
            self._tokens.release(expected)
        call_cost.left += reserved - charged
        call_cost.spent += charged
        return response, failure

    async def _wait_for_rate(self, tokens: float) -> None:
        """Wait until the rate limits and a pause of the engine allow a request of `tokens` tokens.

        Raises `EngineUnavailable` if the wait is longer than `max_wait_s`.
        """
        while True:
            cooling_s = max(0.0, self._resume_at - time.monotonic())
            wait_s = max(cooling_s, self._requests.delay_s, self._tokens.delay_s)
            if wait_s > self.max_wait_s:
                raise unavailable(f"endpoint accepts no request for {wait_s:.0f} s", retry_after_s=wait_s)
            if cooling_s:
                await asyncio.sleep(cooling_s)
                continue
            await asyncio.sleep(max(self._requests.reserve(), self._tokens.reserve(tokens)))
            if time.monotonic() >= self._resume_at:
                return

    def retryable(self, error: ErrorAnswer, response: httpx.Response) -> RetryableError:
        """Return the exception of an answer that may pass. A `Retry-After` pauses the engine first, and a log line reports the pause.

        A run does not wait longer than `max_retry_after_s`: above it the request is retried with back-off. A server (`max_wait_s`)
        pauses, so that its clients get the time.
        """
        reason = f"it answered {error.status}: {error.message}"
        named_s = parse_retry_after(response) if error.status in (429, 503) else None
        if named_s is None:
            return RetryableError(reason)
        limit_s, now = self.config.max_retry_after_s, time.monotonic()
        cooling_down = named_s <= limit_s or not math.isinf(self.max_wait_s)
        # Other requests that were sent before the pause belong to it.
        if now >= self._resume_at:
            pause_s = max(min(named_s, limit_s), min(_MIN_COOLDOWN_S * 2**self._pauses, _MAX_GROWN_PAUSE_S, limit_s))
            if (cooling_down and pause_s >= _LOGGED_PAUSE_S) or now - self._pause_logged_at >= _LOGGED_PAUSE_S:
                self._pause_logged_at = now
                action = f"no request for {pause_s:.0f} s" if cooling_down else f"above max_retry_after_s={limit_s:g}, so retrying sooner"
                log(f"sampler.engine.base_url={self.config.base_url} answered {error.status}, Retry-After {named_s:.0f} s: {action}")
            if cooling_down:
                self._pauses += 1
                self._resume_at = now + pause_s
        elif cooling_down:
            self._resume_at = max(self._resume_at, now + min(named_s, limit_s))
        return RetryableError(reason, cooling_down, retry_after_s=named_s)


def open_http(config: EndpointConfig, key: str | None) -> httpx.AsyncClient:
    """Return the HTTP client of an endpoint; httpx reads the variables of proxies and certificates here.

    Raises `UsageError` if the address or a variable cannot be used.
    """
    setting = f"sampler.engine.base_url={config.base_url}"
    try:
        url = httpx.URL(config.base_url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{setting} cannot be parsed: {first_line(error)}; correct it") from None
    if not url.host or not 0 < (url.port or 80) < 65536:
        raise UsageError(f"{setting} has no host or no valid port; correct it")
    try:
        return httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
        )
    except OSError as error:
        variables = _variables(_CERTIFICATES)
        raise UsageError(f"{setting}: certificates of {variables} cannot be read: {first_line(error)}; correct or unset it") from None
    except ImportError:
        raise UsageError(
            f"{setting}: {_variables(_PROXIES)} names a SOCKS proxy, which needs the package socksio; "
            f"use an http:// proxy, unset the variable or install httpx[socks]"
        ) from None
    except (ValueError, TypeError, httpx.InvalidURL) as error:
        raise UsageError(f"{setting}: {_variables(_PROXIES)} cannot be used: {first_line(error)}; correct or unset it") from None


def _variables(names: Sequence[str]) -> str:
    """Return the environment variables that are set, with their values, for an error text."""
    found = {name: value for lower in names for name in (lower, lower.upper()) if (value := os.environ.get(name))}
    return " ".join(f"{name}={_without_password(value)}" for name, value in found.items())


def _without_password(url: str) -> str:
    """Return a proxy address without user and password."""
    return re.sub(r"[^/@,\s]*@", "<redacted>@", url)


def unavailable(message: str, *, retry_after_s: float | None = None, timed_out: bool = False) -> EngineUnavailable:
    """Return an `EngineUnavailable` with its attributes."""
    error = EngineUnavailable(message)
    error.retry_after_s, error.timed_out = retry_after_s, timed_out
    return error


def prompt_text(prompt: list[prompts.Message] | str) -> str:
    """Return the text of a prompt, without the marks of a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def max_prompt_tokens(prompt: list[prompts.Message] | str) -> int:
    """Return an upper bound of the tokens of a prompt: its UTF-8 bytes plus the tokens that a chat template adds."""
    if isinstance(prompt, str):
        return len(prompt.encode()) + _TEMPLATE_TOKENS
    return sum(len(turn["content"].encode()) + _TURN_TOKENS for turn in prompt) + _TEMPLATE_TOKENS
