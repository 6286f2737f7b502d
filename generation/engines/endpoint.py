"""The engine for any server with an OpenAI-compatible API: hosted models, vLLM's server, `cappy serve`. Imports no Ray.

`form: chat` uses `/chat/completions`, `form: raw` uses `/completions`. A failure has one of four results:
- the request is retried with back-off (429, 5xx, no answer);
- all requests of the engine pause first (`Retry-After`), then the request is retried;
- the row fails (`RowError`);
- the run fails (another `CappyError`: rejected API key, unknown model, no credit).

Some servers lack an option: `n`, `logprobs`, `seed`, or `max_tokens` (replaced by `max_completion_tokens`). An option that a server
rejects is left out of all later requests. Without `n`, one request is sent per candidate; without `logprobs`, they are None. Options
that a decoding does not set have the default of the server.

Cost: a request that was sent and not answered counts as charged in full. It is retried only if the call then stays within
`max_cost`, so `max_cost` is an upper bound for any network failure.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cluster.config import DecodingConfig, EndpointConfig
from cluster.errors import CappyError
from generation import prompts
from generation.engines.contract import Candidate, EngineUnavailable, OnCandidate, PromptTooLong, RowError, read_api_key, request_seed

# An upper bound of prompt tokens: one per byte, and the tokens that a chat template adds once (system text) and to each turn (marks).
_TEMPLATE_TOKENS = 128
_TURN_TOKENS = 16
# Each request may be charged twice: once without an answer, and once for the retry.
_MAX_CHARGES_PER_REQUEST = 2
# Minimum pause after a `Retry-After`: some servers send 0 and still reject the next request.
_MIN_COOLDOWN_S = 1.0
_OPTIONAL_FIELDS = ("n", "logprobs", "seed", "max_tokens")
_BACKOFF = wait_random_exponential(multiplier=0.5, max=60)
_TOO_LONG = re.compile(r"context.length|maximum.context|max_model_len|maximum model length|(prompt|input) is too long", re.IGNORECASE)


class _RetryableError(Exception):
    """The request may be retried: after the pause of the engine (`cooling_down`), else after a back-off."""

    def __init__(self, reason: str, cooling_down: bool = False, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.cooling_down, self.timed_out = cooling_down, timed_out


@dataclass
class _CallCost:
    """The cost of one `sample` call, in dollars."""

    left: float
    """The part of `max_cost` that is neither spent nor reserved for a running request."""
    spent: float = 0.0
    prompt_tokens: int | None = None
    """Prompt tokens, as counted by the server."""


class _CompletionRequest(NamedTuple):
    """The parameters of one request: `n` candidates of a decoding."""

    prompt: list[prompts.Message] | str
    decoding: DecodingConfig
    n: int
    seed: int | None
    logprobs: bool


class RateLimiter:
    """A rate limit of `per_minute` requests or tokens, evenly spaced; None has no limit."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._clock = clock

    @property
    def delay_s(self) -> float:
        """Seconds until the next reservation may start."""
        return max(0.0, self._next - self._clock())

    def reserve(self, amount: float = 1.0) -> float:
        """Reserve `amount` requests or tokens, and return the seconds to wait before using them."""
        delay_s = self.delay_s
        self._next = self._clock() + delay_s + amount * self._seconds
        return delay_s

    def release(self, amount: float) -> None:
        """Return an unused `amount` of a reservation, so that later reservations start earlier."""
        self._next -= amount * self._seconds


class EndpointEngine:
    """The model `model` of the server at `config.base_url`.

    If a request must wait longer than `max_wait_s` for a rate limit or a pause, `sample` raises `EngineUnavailable` immediately.
    """

    dead = False
    """Never: a failed server may recover."""

    def __init__(self, model: str, config: EndpointConfig, max_wait_s: float = math.inf) -> None:
        self.model, self.config, self.max_wait_s = model, config, max_wait_s
        self._key = read_api_key(config.api_key_env)
        self._http = httpx.AsyncClient(
            base_url=config.base_url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._concurrency = asyncio.Semaphore(config.concurrency)
        self._requests, self._tokens = RateLimiter(config.requests_per_minute), RateLimiter(config.tokens_per_minute)
        # End of the current pause, by `time.monotonic`.
        self._resume_at = 0.0
        # Options that the server rejected, or that the config turns off.
        self._unsupported: set[str] = set() if config.logprobs else {"logprobs"}
        # By request id, until `pop_cost`.
        self._costs: dict[str, _CallCost] = {}

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int, drop_shots: bool = True) -> list[prompts.Message] | str:
        """Return the messages for `form: chat`, or the text for `form: raw`. The length is not checked: only the server has a tokenizer."""
        text = prompts.prompt_text(turns, form)
        return list(turns) if text is None else text

    async def sample(
        self,
        prompt: list[prompts.Message] | str,
        decoding: DecodingConfig,
        seed: int | None,
        request_id: str,
        *,
        logprobs: bool = True,
        on_candidate: OnCandidate | None = None,
    ) -> list[Candidate]:
        """Return the `decoding.n` candidates of one prompt.

        Raises `PromptTooLong` or another `RowError` for this row, and another `CappyError` if no row can be answered.
        """
        call_cost = _CallCost(left=self.max_cost(prompt, decoding))
        try:
            in_one_request = decoding.n == 1 or "n" not in self._unsupported
            request = _CompletionRequest(prompt, decoding, decoding.n, seed, logprobs)
            candidates = await self._complete(request, request_id, call_cost) if in_one_request else []
            if len(candidates) < decoding.n:
                self._unsupported.add("n")
                rest = range(len(candidates), decoding.n)
                seeds = [None if seed is None else request_seed(seed, str(draw), decoding.name) for draw in rest]
                single = (
                    self._complete(request._replace(n=1, seed=own), f"{request_id}-{draw}", call_cost)
                    for draw, own in zip(rest, seeds, strict=True)
                )
                # Wait for all requests before an error is raised, so that the cost is complete.
                answers = await asyncio.gather(*single, return_exceptions=True)
                for answer in answers:
                    if isinstance(answer, BaseException):
                        raise answer
                    candidates += answer
            if on_candidate:
                for candidate in candidates:
                    on_candidate(candidate)
            return candidates
        finally:
            if request_id in self._costs:
                call_cost.spent += self._costs[request_id].spent
            self._costs[request_id] = call_cost

    def max_cost(self, prompt: list[prompts.Message] | str, decoding: DecodingConfig) -> float:
        """Return an upper bound of the cost of one `sample` call, in dollars."""
        return _MAX_CHARGES_PER_REQUEST * decoding.n * self._cost(_max_prompt_tokens(prompt), decoding.max_tokens)

    def pop_cost(self, request_id: str) -> float:
        """Return and remove the cost of the finished `sample` calls with an id, in dollars; 0 if there is none."""
        return self._costs.pop(request_id).spent if request_id in self._costs else 0.0

    def prompt_tokens(self, prompt: list[prompts.Message] | str, request_id: str) -> int:
        """Return the prompt tokens that the server counted, or the number of words if the server does not report them."""
        counted = self._costs[request_id].prompt_tokens
        return len(_text(prompt).split()) if counted is None else counted

    def close(self) -> None:
        """Do nothing: the engine has no processes, and its connections close with this process."""

    async def _complete(self, request: _CompletionRequest, request_id: str, call_cost: _CallCost) -> list[Candidate]:
        """Return the candidates of one request, with retries: at most `request.n`, or none if the server rejects `n`.

        Raises `EngineUnavailable` after the last try.
        """
        tries = AsyncRetrying(
            stop=stop_after_attempt(self.config.tries), wait=_BACKOFF, retry=retry_if_exception_type(_RetryableError), reraise=True
        )
        try:
            async for attempt in tries:
                with attempt:
                    return await self._send_until_final(request, request_id, call_cost)
        except _RetryableError as error:
            raise _unavailable(f"endpoint gave no answer in {self.config.tries} tries, last: {error}", timed_out=error.timed_out) from None
        raise AssertionError("tenacity returns or raises")

    async def _send_until_final(self, request: _CompletionRequest, request_id: str, call_cost: _CallCost) -> list[Candidate]:
        """Send the request, and again after each pause of the engine and without each option that the server rejects.

        Raises `_RetryableError` for a failure that needs a back-off, and `RowError` if the server will never answer the request.
        """
        while True:
            body = self._body(request)
            try:
                response = await self._send(request.prompt, body, request.n * request.decoding.max_tokens, request_id, call_cost)
            except _RetryableError as error:
                if error.cooling_down:
                    continue
                raise
            if response.status_code == 200:
                return self._candidates(response, request.decoding)[: request.n]
            code, parameter, message = self._error(response)
            rejected = next((name for name in _OPTIONAL_FIELDS if name in body and _rejects_option(name, parameter, message)), None)
            if response.status_code == 413 or code == "context_length_exceeded" or _TOO_LONG.search(message):
                raise PromptTooLong(f"the prompt is too long for {self.model}: {message}")
            if rejected is None or response.status_code not in (400, 422):
                raise RowError(f"endpoint refused: {response.status_code} {message}")
            self._unsupported.add(rejected)
            if rejected == "n":
                return []

    def _body(self, request: _CompletionRequest) -> dict[str, Any]:
        """Return the JSON body of a request, without the options that the server rejected before."""
        prompt, decoding, n, seed, logprobs = request
        limit = "max_completion_tokens" if "max_tokens" in self._unsupported else "max_tokens"
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            limit: decoding.max_tokens,
        }
        body |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        if n > 1:
            body["n"] = n
        if decoding.top_k:
            body["top_k"] = decoding.top_k
        if decoding.min_tokens:
            body["min_tokens"] = decoding.min_tokens
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if seed is not None and "seed" not in self._unsupported:
            body["seed"] = seed
        if logprobs and "logprobs" not in self._unsupported:
            body["logprobs"] = 1 if isinstance(prompt, str) else True
        return body

    async def _send(
        self, prompt: list[prompts.Message] | str, body: dict[str, Any], sampled: int, request_id: str, call_cost: _CallCost
    ) -> httpx.Response:
        """Send one request and record its cost. Return an answer that needs no back-off: a success or a rejected request.

        Raises `_RetryableError` for a failure that may pass, and `CappyError` for a failure of the whole run.

        Args:
            prompt: the messages or the text.
            body: the JSON body.
            sampled: tokens that the request can sample at most.
            request_id: value of the `X-Request-Id` header.
            call_cost: the cost of the `sample` call; a request that could exceed `left` is not sent.
        """
        reserved = self._cost(_max_prompt_tokens(prompt), sampled)
        if reserved > call_cost.left + 1e-12:
            raise _unavailable(
                "endpoint did not answer requests of this row and may have charged for them; the row is not retried", timed_out=True
            )
        call_cost.left -= reserved
        # For the token rate: about 4 bytes per prompt token; corrected when the answer reports the exact number.
        expected = _max_prompt_tokens(prompt) / 4 + sampled
        async with self._concurrency:
            try:
                await self._wait_for_rate(expected)
            except EngineUnavailable:
                call_cost.left += reserved
                raise
            try:
                path = "/completions" if isinstance(prompt, str) else "/chat/completions"
                response = await self._http.post(path, json=body, headers={"X-Request-Id": request_id})
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                # The request was not sent, so the server cannot charge for it.
                call_cost.left += reserved
                raise _RetryableError(f"{type(error).__name__}: {error}") from None
            except httpx.RequestError as error:
                call_cost.spent += reserved
                timed_out = isinstance(error, httpx.TimeoutException)
                raise _RetryableError(
                    f"{type(error).__name__} after {self.config.timeout_s:g} s at most: {error}", timed_out=timed_out
                ) from None
            except asyncio.CancelledError:
                call_cost.spent += reserved
                raise
        charged = reserved
        if response.status_code == 200:
            usage = _usage(response)
            if usage is not None:
                charged = self._cost(*usage)
                call_cost.prompt_tokens = usage[0]
                self._tokens.release(expected - sum(usage))
        else:
            charged = 0.0
            self._tokens.release(expected)
        call_cost.left += reserved - charged
        call_cost.spent += charged
        self._raise_for_status(response)
        return response

    async def _wait_for_rate(self, tokens: float) -> None:
        """Wait until the rate limits and a pause of the engine allow a request of `tokens` tokens.

        Raises `EngineUnavailable` if the wait is longer than `max_wait_s`.
        """
        while True:
            cooling_s = max(0.0, self._resume_at - time.monotonic())
            wait_s = max(cooling_s, self._requests.delay_s, self._tokens.delay_s)
            if wait_s > self.max_wait_s:
                raise _unavailable(f"endpoint accepts no request for {wait_s:.0f} s", retry_after_s=wait_s)
            if cooling_s:
                await asyncio.sleep(cooling_s)
                continue
            await asyncio.sleep(max(self._requests.reserve(), self._tokens.reserve(tokens)))
            if time.monotonic() >= self._resume_at:
                return

    def _raise_for_status(self, response: httpx.Response) -> None:
        """Raise the error of a status that ends the run or needs a retry. Record the pause of a `Retry-After` header."""
        status, setting = response.status_code, f"sampler.engine.base_url={self.config.base_url}"
        if status in (401, 403):
            name = self.config.api_key_env
            remedy = (
                f"it rejected the key in api_key_env={name}; export a valid key"
                if name
                else "it requires an API key; set api_key_env to the environment variable that holds the key"
            )
            raise CappyError(f"{setting} answered {status}: {remedy}")
        code, _, message = ("", "", "") if status == 200 else self._error(response)
        if status == 402 or code == "insufficient_quota":
            raise CappyError(
                f"{setting} answered {status}: the account has no credit left ({message}); add credit and run the same command to resume"
            )
        if status == 404:
            raise CappyError(f"{setting} answered 404 ({message}); check base_url and sampler.model={self.model}")
        if status in (408, 409, 425, 429) or status >= 500:
            pause_s = parse_retry_after(response) if status in (429, 503) else None
            if pause_s is not None:
                self._resume_at = max(self._resume_at, time.monotonic() + max(pause_s, _MIN_COOLDOWN_S))
            raise _RetryableError(f"it answered {status}: {message}", cooling_down=pause_s is not None)
        if 300 <= status < 400:
            target = response.headers.get("Location", "an unknown address")
            raise CappyError(f"{setting} answered {status}, a redirect to {target}; set base_url to that address")

    def _candidates(self, response: httpx.Response, decoding: DecodingConfig) -> list[Candidate]:
        """Return the candidates of an answer with status 200.

        Raises `_RetryableError` if the answer is malformed, and `RowError` if a content filter stopped it.
        """
        try:
            choices = sorted(response.json()["choices"], key=lambda choice: choice.get("index", 0))
            texts = [str((choice["message"]["content"] if "message" in choice else choice["text"]) or "") for choice in choices]
            logprobs = [_logprobs(choice) for choice in choices]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _RetryableError(f"its answer does not follow the OpenAI API: {type(error).__name__} {error}") from None
        if not choices:
            raise _RetryableError("its answer has no choices")
        if any(choice.get("finish_reason") == "content_filter" or _is_refusal(choice) for choice in choices):
            raise RowError("endpoint refused: its content filter stopped the answer")
        usage = _usage(response)
        known = [len(values) for values in logprobs if values is not None]
        if usage is not None and (len(choices) == 1 or len(known) < len(choices)):
            tokens = _split_tokens(usage[1], texts)
        else:
            tokens = known if len(known) == len(choices) else [len(text.split()) for text in texts]
        return [
            Candidate(
                response=text.strip(),
                text=text,
                decoding=decoding.name,
                tokens=count,
                finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
                logprob=sum(values) if values is not None else None,
            )
            for choice, text, values, count in zip(choices, texts, logprobs, tokens, strict=True)
        ]

    def _error(self, response: httpx.Response) -> tuple[str, str, str]:
        """Return code, parameter and message of an error answer. The message has at most 300 characters; the API key is masked."""
        try:
            answer = response.json()
            error = answer.get("error", answer)
            error = error if isinstance(error, dict) else {"message": error}
            message = str(error.get("message") or error.get("detail") or answer)
        except (ValueError, AttributeError):
            error, message = {}, response.text
        if self._key:
            message = message.replace(self._key, "***")
        return str(error.get("code") or ""), str(error.get("param") or ""), " ".join(message.split())[:300]

    def _cost(self, prompt_tokens: float, sampled_tokens: float) -> float:
        """Return the cost in dollars, 0 without prices."""
        prices = self.config.price_per_million_prompt or 0.0, self.config.price_per_million_sampled or 0.0
        return (prompt_tokens * prices[0] + sampled_tokens * prices[1]) / 1e6


def parse_retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of a `Retry-After` header (a number or an HTTP date), or None if it is missing or invalid."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        # Compare with the clock of the server, if it sends one. Its dates have whole seconds, so the result may be up to 1 s too long.
        now = parsedate_to_datetime(response.headers["Date"]) if "Date" in response.headers else datetime.now(UTC)
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _unavailable(message: str, *, retry_after_s: float | None = None, timed_out: bool = False) -> EngineUnavailable:
    """Return an `EngineUnavailable` with its attributes."""
    error = EngineUnavailable(message)
    error.retry_after_s, error.timed_out = retry_after_s, timed_out
    return error


def _text(prompt: list[prompts.Message] | str) -> str:
    """Return the text of a prompt, without the marks of a chat template."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def _max_prompt_tokens(prompt: list[prompts.Message] | str) -> int:
    """Return an upper bound of the tokens of a prompt: its UTF-8 bytes plus the tokens that a chat template adds."""
    if isinstance(prompt, str):
        return len(prompt.encode()) + _TEMPLATE_TOKENS
    return sum(len(turn["content"].encode()) + _TURN_TOKENS for turn in prompt) + _TEMPLATE_TOKENS


def _usage(response: httpx.Response) -> tuple[int, int] | None:
    """Return the prompt and sampled tokens of an answer, or None if it does not report them or is truncated."""
    try:
        usage = response.json()["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return None


def _rejects_option(option: str, parameter: str, message: str) -> bool:
    """Return whether an error rejects an option, by its parameter or by a message with its name (`n is`, 'n', n=4).

    `max_tokens` is rejected only if the message names `max_completion_tokens`: a value that is too large must not remove it.
    """
    if option == "max_tokens" and "max_completion_tokens" not in message:
        return False
    named = rf"(^|[\s`'\"(]){option}([`'\"=:]|\s+(is|was|must|should|of|greater|>))"
    return parameter == option or (not parameter and re.search(named, message) is not None)


def _logprobs(choice: dict[str, Any]) -> list[float] | None:
    """Return the log-probability of each sampled token, or None if the server does not return them."""
    found = choice.get("logprobs") or {}
    if found.get("content"):
        return [float(token["logprob"]) for token in found["content"]]
    if found.get("token_logprobs"):
        return [float(value) for value in found["token_logprobs"] if value is not None]
    return None


def _is_refusal(choice: dict[str, Any]) -> bool:
    """Return whether the model refused to answer."""
    return bool((choice.get("message") or {}).get("refusal"))


def _split_tokens(total: int, texts: Sequence[str]) -> list[int]:
    """Split a total number of tokens over texts, in proportion to their lengths in bytes. The parts sum to `total`."""
    lengths = [len(text.encode()) + 1 for text in texts]
    ends = [round(total * sum(lengths[: index + 1]) / sum(lengths)) for index in range(len(lengths))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
