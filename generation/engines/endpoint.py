"""Any server of the OpenAI protocol as an engine: hosted models, vLLM's own server, ours. Knows HTTP and no Ray.

`form: chat` asks `/chat/completions`, `form: raw` asks `/completions`. What goes wrong ends in one of four ways: the request is
sent again (429, 5xx, no answer), the engine cools down first (`Retry-After`), the row is given up (`RowError`), or the run is
(any other `CappyError`: a refused key, an unknown model, an empty account). Options some servers lack (`n`, `logprobs`,
`seed`, `max_tokens` in favour of `max_completion_tokens`) are left out once a server has refused them; `n` is then made of
single requests, missing log-probabilities are None. What a decoding does not set is the server's default.

Money: a request that was sent and not answered counts as paid in full, and is sent again only while the call stays below
`most`, so that `most` holds whatever the network does.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Sequence
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

# A prompt has at most a token a byte, beside what the chat template puts around it: its own system text, and each turn's marks.
_TEMPLATE_TOKENS = 128
_TURN_TOKENS = 16
# What a call may cost, in times of an answered one: each of its requests may once stay without an answer and be paid all the same.
_MAX_CHARGES_PER_REQUEST = 2
# A server that says "now" and means "later" is not asked more often than this.
_MIN_COOLDOWN_S = 1.0
_OPTIONAL_FIELDS = ("n", "logprobs", "seed", "max_tokens")
_BACKOFF = wait_random_exponential(multiplier=0.5, max=60)
_TOO_LONG = re.compile(r"context.length|maximum.context|max_model_len|maximum model length|(prompt|input) is too long", re.IGNORECASE)


class _RetryableError(Exception):
    """The request may be sent again: when the engine has cooled down, or after a back-off."""

    def __init__(self, reason: str, cooling_down: bool = False, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.cooling_down, self.timed_out = cooling_down, timed_out


@dataclass
class _CallCost:
    """Dollars of one `sample` call."""

    left: float
    """What its requests may still cost."""
    spent: float = 0.0
    prompt_tokens: int | None = None
    """As the server counted them."""


class _CompletionRequest(NamedTuple):
    """What one request to the endpoint asks for: `n` of the decoding's candidates."""

    prompt: list[prompts.Message] | str
    decoding: DecodingConfig
    n: int
    seed: int | None
    logprobs: bool


class RateLimiter:
    """Turns of at most `per_minute` in a minute, evenly spaced; None has no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    @property
    def delay_s(self) -> float:
        """Seconds until the next turn."""
        return max(0.0, self._next - time.monotonic())

    def take(self, amount: float = 1.0) -> float:
        """Take the next turn for `amount` requests or tokens, and return the seconds until then."""
        delay_s = self.delay_s
        self._next = time.monotonic() + delay_s + amount * self._seconds
        return delay_s

    def give_back(self, amount: float) -> None:
        """Let those behind come earlier: `amount` was waited for and not used."""
        self._next -= amount * self._seconds


class EndpointEngine:
    """The model `model` behind `config.base_url`.

    A request that would wait longer than `max_wait_s` for its turn, or for the end of a cool-down, is given up at once.
    """

    dead = False

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
        self._resume_at = 0.0
        self._unsupported: set[str] = set() if config.logprobs else {"logprobs"}
        self._accounts: dict[str, _CallCost] = {}

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int, drop_shots: bool = True) -> list[prompts.Message] | str:
        """Return the messages, or the text where the form has one. How long they are only the server knows."""
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

        Raises `PromptTooLong` or another `RowError` for this row, `CappyError` where no row will be answered.
        """
        account = _CallCost(left=self.max_cost(prompt, decoding))
        try:
            whole = decoding.n == 1 or "n" not in self._unsupported
            asked = _CompletionRequest(prompt, decoding, decoding.n, seed, logprobs)
            candidates = await self._ask(asked, request_id, account) if whole else []
            if len(candidates) < decoding.n:
                self._unsupported.add("n")
                rest = range(len(candidates), decoding.n)
                seeds = [None if seed is None else request_seed(seed, str(draw), decoding.name) for draw in rest]
                single = (
                    self._ask(asked._replace(n=1, seed=own), f"{request_id}-{draw}", account) for draw, own in zip(rest, seeds, strict=True)
                )
                # All end before any error is raised, so that the bill is complete.
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
            if request_id in self._accounts:
                account.spent += self._accounts[request_id].spent
            self._accounts[request_id] = account

    def max_cost(self, prompt: list[prompts.Message] | str, decoding: DecodingConfig) -> float:
        return _MAX_CHARGES_PER_REQUEST * decoding.n * self._cost(_max_prompt_tokens(prompt), decoding.max_tokens)

    def pop_cost(self, request_id: str) -> float:
        return self._accounts.pop(request_id).spent if request_id in self._accounts else 0.0

    def prompt_tokens(self, prompt: list[prompts.Message] | str, request_id: str) -> int:
        """Return the prompt's tokens as the server counted them, or its words where it does not tell."""
        counted = self._accounts[request_id].prompt_tokens
        return len(_text(prompt).split()) if counted is None else counted

    def close(self) -> None:
        """Nothing runs beside: connections end with the process."""

    async def _ask(self, asked: _CompletionRequest, request_id: str, account: _CallCost) -> list[Candidate]:
        """Return the candidates of one answer, at most `asked.n`, none where the server refuses `n`."""
        tries = AsyncRetrying(
            stop=stop_after_attempt(self.config.tries), wait=_BACKOFF, retry=retry_if_exception_type(_RetryableError), reraise=True
        )
        try:
            async for attempt in tries:
                with attempt:
                    return await self._try(asked, request_id, account)
        except _RetryableError as error:
            raise _unavailable(f"endpoint gave no answer in {self.config.tries} tries, last: {error}", timed_out=error.timed_out) from None
        raise AssertionError("tenacity returns or raises")

    async def _try(self, asked: _CompletionRequest, request_id: str, account: _CallCost) -> list[Candidate]:
        """Send the request, again after each cool-down, and again without each option the server refuses. Raises `_RetryableError`."""
        while True:
            body = self._body(asked)
            try:
                response = await self._send(asked.prompt, body, asked.n * asked.decoding.max_tokens, request_id, account)
            except _RetryableError as error:
                if error.cooling_down:
                    continue
                raise
            if response.status_code == 200:
                return self._candidates(response, asked.decoding)[: asked.n]
            code, parameter, message = self._error(response)
            refused = next((name for name in _OPTIONAL_FIELDS if name in body and _refuses(name, parameter, message)), None)
            if response.status_code == 413 or code == "context_length_exceeded" or _TOO_LONG.search(message):
                raise PromptTooLong(f"the prompt is too long for {self.model}: {message}")
            if refused is None or response.status_code not in (400, 422):
                raise RowError(f"endpoint refused: {response.status_code} {message}")
            self._unsupported.add(refused)
            if refused == "n":
                return []

    def _body(self, asked: _CompletionRequest) -> dict[str, Any]:
        prompt, decoding, n, seed, logprobs = asked
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
        self, prompt: list[prompts.Message] | str, body: dict[str, Any], sampled: int, request_id: str, account: _CallCost
    ) -> httpx.Response:
        """Return an answer that is final, its cost booked. Raises `_RetryableError` where there is none, `CappyError` for the whole run."""
        most = self._cost(_max_prompt_tokens(prompt), sampled)
        if most > account.left + 1e-12:
            raise _unavailable(
                "endpoint left requests of this row unanswered and may have charged for them; it is not sent again", timed_out=True
            )
        account.left -= most
        expected = _max_prompt_tokens(prompt) / 4 + sampled
        async with self._concurrency:
            try:
                await self._wait_for_rate(expected)
            except EngineUnavailable:
                account.left += most
                raise
            try:
                path = "/completions" if isinstance(prompt, str) else "/chat/completions"
                response = await self._http.post(path, json=body, headers={"X-Request-Id": request_id})
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                account.left += most
                raise _RetryableError(f"{type(error).__name__}: {error}") from None
            except httpx.RequestError as error:
                account.spent += most
                timed_out = isinstance(error, httpx.TimeoutException)
                raise _RetryableError(
                    f"{type(error).__name__} after {self.config.timeout_s:g} s at most: {error}", timed_out=timed_out
                ) from None
            except asyncio.CancelledError:
                account.spent += most
                raise
        cost = most
        if response.status_code == 200:
            usage = _usage(response)
            if usage is not None:
                cost = self._cost(*usage)
                account.prompt_tokens = usage[0]
                self._tokens.give_back(expected - sum(usage))
        else:
            cost = 0.0
            self._tokens.give_back(expected)
        account.left += most - cost
        account.spent += cost
        self._raise_for_status(response)
        return response

    async def _wait_for_rate(self, tokens: float) -> None:
        """Wait until the rates, and any cool-down of the engine, let a request of so many tokens go."""
        while True:
            cooling_s = max(0.0, self._resume_at - time.monotonic())
            wait_s = max(cooling_s, self._requests.delay_s, self._tokens.delay_s)
            if wait_s > self.max_wait_s:
                raise _unavailable(f"endpoint takes requests again in {wait_s:.0f} s", retry_after_s=wait_s)
            if cooling_s:
                await asyncio.sleep(cooling_s)
                continue
            await asyncio.sleep(max(self._requests.take(), self._tokens.take(tokens)))
            if time.monotonic() >= self._resume_at:
                return

    def _raise_for_status(self, response: httpx.Response) -> None:
        """Raise what a status means beyond this request."""
        status, where = response.status_code, f"sampler.engine.base_url={self.config.base_url}"
        if status in (401, 403):
            name = self.config.api_key_env
            remedy = (
                f"it refuses the key in api_key_env={name}; export a valid one"
                if name
                else "it wants a key; name its variable in api_key_env"
            )
            raise CappyError(f"{where} answered {status}: {remedy}")
        code, _, message = ("", "", "") if status == 200 else self._error(response)
        if status == 402 or code == "insufficient_quota":
            raise CappyError(f"{where} answered {status}: the account has no money left ({message}); top it up and run again to go on")
        if status == 404:
            raise CappyError(f"{where} answered 404 ({message}); check it, and sampler.model={self.model}")
        if status in (408, 409, 425, 429) or status >= 500:
            wait = parse_retry_after(response) if status in (429, 503) else None
            if wait is not None:
                self._resume_at = max(self._resume_at, time.monotonic() + max(wait, _MIN_COOLDOWN_S))
            raise _RetryableError(f"it answered {status}: {message}", cooling_down=wait is not None)
        if 300 <= status < 400:
            raise CappyError(
                f"{where} answered {status}, a redirection to {response.headers.get('Location', 'nowhere')}; give that address"
            )

    def _candidates(self, response: httpx.Response, decoding: DecodingConfig) -> list[Candidate]:
        """Return the candidates of a good answer. Raises `_RetryableError` where it is none, `RowError` for one a filter stopped."""
        try:
            choices = sorted(response.json()["choices"], key=lambda choice: choice.get("index", 0))
            texts = [str((choice["message"]["content"] if "message" in choice else choice["text"]) or "") for choice in choices]
            logprobs = [_logprobs(choice) for choice in choices]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _RetryableError(f"its answer is not of the OpenAI protocol: {type(error).__name__} {error}") from None
        if not choices:
            raise _RetryableError("its answer has no choice")
        if any(choice.get("finish_reason") == "content_filter" or _refusal(choice) for choice in choices):
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
        """Return code, parameter and message of an error answer, at most 300 characters, the key blotted out."""
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
        """Dollars; 0 without prices."""
        prices = self.config.price_per_million_prompt or 0.0, self.config.price_per_million_sampled or 0.0
        return (prompt_tokens * prices[0] + sampled_tokens * prices[1]) / 1e6


def parse_retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of a `Retry-After` header, a number or an HTTP date, or None where there is none to be read."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        # By the server's own clock where it tells it; whole seconds then err on the late side.
        now = parsedate_to_datetime(response.headers["Date"]) if "Date" in response.headers else datetime.now(UTC)
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _unavailable(message: str, *, retry_after_s: float | None = None, timed_out: bool = False) -> EngineUnavailable:
    error = EngineUnavailable(message)
    error.retry_after_s, error.timed_out = retry_after_s, timed_out
    return error


def _text(prompt: list[prompts.Message] | str) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def _max_prompt_tokens(prompt: list[prompts.Message] | str) -> int:
    """The most tokens a prompt can have: its UTF-8 bytes, and what a template adds."""
    if isinstance(prompt, str):
        return len(prompt.encode()) + _TEMPLATE_TOKENS
    return sum(len(turn["content"].encode()) + _TURN_TOKENS for turn in prompt) + _TEMPLATE_TOKENS


def _usage(response: httpx.Response) -> tuple[int, int] | None:
    """Prompt and sampled tokens of an answer, or None where it does not tell or is cut."""
    try:
        usage = response.json()["usage"]
        return int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return None


def _refuses(option: str, parameter: str, message: str) -> bool:
    """Whether an error is about an option: by its parameter, or by a message that names it (`n is`, 'n', n=4).

    About `max_tokens` only where the error names the other: that it is too large is no reason to leave it out.
    """
    if option == "max_tokens" and "max_completion_tokens" not in message:
        return False
    named = rf"(^|[\s`'\"(]){option}([`'\"=:]|\s+(is|was|must|should|of|greater|>))"
    return parameter == option or (not parameter and re.search(named, message) is not None)


def _logprobs(choice: dict[str, Any]) -> list[float] | None:
    """The log-probability of each sampled token, or None where the server does not tell."""
    found = choice.get("logprobs") or {}
    if found.get("content"):
        return [float(token["logprob"]) for token in found["content"]]
    if found.get("token_logprobs"):
        return [float(value) for value in found["token_logprobs"] if value is not None]
    return None


def _refusal(choice: dict[str, Any]) -> bool:
    return bool((choice.get("message") or {}).get("refusal"))


def _split_tokens(total: int, texts: Sequence[str]) -> list[int]:
    """Share out tokens told only as a sum, by the length of the texts."""
    lengths = [len(text.encode()) + 1 for text in texts]
    ends = [round(total * sum(lengths[: place + 1]) / sum(lengths)) for place in range(len(lengths))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
