"""The engine for any server with an OpenAI-compatible API: hosted models, vLLM's server, `cappy serve`. Imports no Ray.

`form: chat` uses `/chat/completions`, `form: raw` uses `/completions`. A failure has one of four results:
- the request is retried with back-off (429, 5xx, no answer);
- all requests of the engine pause first (`Retry-After`), then the request is retried;
- the row fails (`RowError`);
- the run fails (another `CappyError`: rejected API key, unknown model, no credit).

Some servers lack an option, e.g. `n`, `logprobs` or `temperature` together with `top_p`. An option that a server rejects, or that
`sampler.engine.omit` names, is left out of all later requests. Without `n`, one request is sent per candidate; without `logprobs`, they
are None; without `stop`, the engine cuts the candidates; `max_tokens` becomes `max_completion_tokens`. Without the others, candidates
are drawn with the default of the server.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import httpx

from cluster.config import DecodingConfig, EndpointConfig
from cluster.errors import CappyError
from cluster.progress import log
from generation import prompts
from generation.engines.contract import Candidate, ContentFiltered, OnCandidate, PromptTooLong, RowError, request_seed
from generation.engines.endpoint_answers import Choice, cut_at_stop, read_choices
from generation.engines.endpoint_client import CallCost, EndpointClient, RetryableError, max_prompt_tokens, prompt_text, unavailable
from generation.engines.endpoint_errors import ErrorAnswer, Kind, classify
from generation.engines.endpoint_options import CompletionRequest, RequestOptions
from generation.engines.reasoning import strip_reasoning

# Each request may be charged twice: once without an answer, and once for the retry.
_MAX_CHARGES_PER_REQUEST = 2
_MAX_BACKOFF_S = 60.0
# An answer 403 without a known reason fails its row, and after this many in a row the run.
_MAX_FORBIDDEN = 5


class EndpointEngine:
    """The model `model` of the server at `config.base_url`.

    If a request must wait longer than `max_wait_s` for a rate limit or a pause, `sample` raises `EngineUnavailable` immediately.
    """

    dead = False
    """Never: a failed server may recover."""

    def __init__(
        self,
        model: str,
        config: EndpointConfig,
        max_wait_s: float = math.inf,
        *,
        keep_reasoning: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.config, self.max_wait_s = model, config, max_wait_s
        self._keep_reasoning = keep_reasoning
        self._client = EndpointClient(config, max_wait_s)
        self._options = RequestOptions(config, template_kwargs or {})
        # Answers with candidates; answers 403 without a known reason since the last one; choices without a text.
        self._answered = self._forbidden = self._without_text = 0
        # By request id, until `pop_cost`.
        self._costs: dict[str, CallCost] = {}

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int, drop_shots: bool = True) -> list[prompts.Message] | str:
        """Return the messages for `form: chat`, or the text for `form: raw`. The length is not checked: only the server has a tokenizer.

        Raises `RowError` for a text that UTF-8 cannot encode.
        """
        text = prompts.prompt_text(turns, form)
        prompt = list(turns) if text is None else text
        try:
            prompt_text(prompt).encode()
        except UnicodeEncodeError as error:
            raise RowError(f"the prompt cannot be sent as UTF-8: it has a lone surrogate ({error.reason})") from None
        return prompt

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
        """Return the candidates of one prompt: at most `decoding.n`. A content filter can have stopped others.

        Raises `ContentFiltered` if the filter stopped all of them, `PromptTooLong` or another `RowError` for this row, and another
        `CappyError` if no row can be answered.
        """
        call_cost = CallCost(left=self.max_cost(prompt, decoding))
        filtered = ContentFiltered("endpoint refused: its content filter stopped the answer, or the answer is not valid Unicode text")
        try:
            in_one_request = decoding.n == 1 or "n" in self._options
            request = CompletionRequest(prompt, decoding, decoding.n, seed, logprobs)
            choices = await self._complete(request, request_id, call_cost) if in_one_request else []
            if len(choices) < decoding.n:
                self._options.leave_out("n")
            kept = [choice for choice in choices if choice.end != "failed"]
            rest = [draw for draw in range(decoding.n) if draw >= len(choices) or choices[draw].end == "failed"]
            if rest:
                seeds = [None if seed is None else request_seed(seed, str(draw), decoding.name) for draw in rest]
                single = (
                    self._complete(request._replace(n=1, seed=own), f"{request_id}-{draw}", call_cost)
                    for draw, own in zip(rest, seeds, strict=True)
                )
                # Wait for all requests before an error is raised, so that the cost is complete.
                answers = await asyncio.gather(*single, return_exceptions=True)
                for answer in answers:
                    if isinstance(answer, ContentFiltered):
                        filtered = answer
                    elif isinstance(answer, BaseException):
                        raise answer
                    else:
                        kept += answer
            candidates = [self._candidate(choice, decoding) for choice in kept if choice.end != "filtered"]
            if not candidates:
                raise filtered
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
        return _MAX_CHARGES_PER_REQUEST * decoding.n * self._client.cost(max_prompt_tokens(prompt), decoding.max_tokens)

    def pop_cost(self, request_id: str) -> float:
        """Return and remove the cost of the finished `sample` calls with an id, in dollars; 0 if there is none."""
        return self._costs.pop(request_id).spent if request_id in self._costs else 0.0

    def prompt_tokens(self, prompt: list[prompts.Message] | str, request_id: str) -> int:
        """Return the prompt tokens that the server counted, or the number of words if the server does not report them."""
        counted = self._costs[request_id].prompt_tokens
        return len(prompt_text(prompt).split()) if counted is None else counted

    def close(self) -> None:
        """Do nothing: the engine has no processes, and its connections close with this process."""

    async def _complete(self, request: CompletionRequest, request_id: str, call_cost: CallCost) -> list[Choice]:
        """Return the choices of one request, with retries: at most `request.n`, or none if the server rejects `n`.

        A try counts if no request of the engine was answered since the last one: a busy server answers some of them. Raises
        `EngineUnavailable` after `tries` counted tries or `max_pauses` pauses. Raises `CappyError` instead if the server names a
        waiting time above `max_retry_after_s` and answers no request.
        """
        counted = pauses = 0
        answered_first = answered = self._answered
        while True:
            try:
                return await self._send_until_final(request, request_id, call_cost)
            except RetryableError as error:
                counted += not error.cooling_down or self._answered == answered
                pauses += error.cooling_down
                answered = self._answered
                if counted >= self.config.tries or pauses >= self.config.max_pauses:
                    self._stop_if_unavailable_for_long(error, answered_first)
                    raise unavailable(
                        f"endpoint gave no answer in {counted if counted >= self.config.tries else pauses} tries, last: {error}",
                        timed_out=error.timed_out,
                        retry_after_s=error.retry_after_s,
                    ) from None
                if not error.cooling_down:
                    await asyncio.sleep(random.uniform(0, min(_MAX_BACKOFF_S, 0.5 * 2 ** min(counted - 1, 16))))

    def _stop_if_unavailable_for_long(self, error: RetryableError, answered_before: int) -> None:
        """Raise the error that ends the run if the server named a long waiting time and has answered no request since."""
        long = error.retry_after_s is not None and error.retry_after_s > self.config.max_retry_after_s
        if long and math.isinf(self.max_wait_s) and self._answered == answered_before:
            raise CappyError(
                f"{self._setting} accepts no request for {error.retry_after_s:.0f} s ({error}), above "
                f"sampler.engine.max_retry_after_s={self.config.max_retry_after_s:g}; run the same command later to resume, or raise it"
            ) from None

    async def _send_until_final(self, request: CompletionRequest, request_id: str, call_cost: CallCost) -> list[Choice]:
        """Send the request, and again without each option that the server rejects.

        Raises `RetryableError` for a failure that may pass, and `RowError` if the server will never answer the request.
        """
        while True:
            body = self._options.body(self.model, request)
            sampled = request.n * request.decoding.max_tokens
            response, error = await self._client.send(request.prompt, body, sampled, request_id, call_cost)
            if error is None:
                return self._choices(response, request)
            kind = classify(error)
            # 501 is "not implemented".
            may_reject = error.status in (400, 422, 501) and kind != Kind.TOO_LONG
            rejected = self._options.leave_out_rejected(error, body) if may_reject else None
            if rejected is None:
                self._raise(kind, error, response)
            if rejected == "n":
                return []

    def _raise(self, kind: Kind, error: ErrorAnswer, response: httpx.Response) -> NoReturn:
        """Raise the exception of an error answer: a failure of the row, of the run, or one that may pass."""
        status, message = error.status, error.message
        if kind == Kind.FORBIDDEN:
            self._forbidden += 1
            if not self._answered or self._forbidden >= _MAX_FORBIDDEN:
                kind = Kind.KEY
        if kind == Kind.TOO_LONG:
            raise PromptTooLong(f"the prompt is too long for {self.model}: {message}")
        if kind in (Kind.FILTERED, Kind.FORBIDDEN, Kind.REFUSED):
            raise (ContentFiltered if kind == Kind.FILTERED else RowError)(f"endpoint refused: {status} {message or error.code}")
        if kind == Kind.RETRY:
            raise self._client.retryable(error, response)
        if kind == Kind.KEY:
            name = self.config.api_key_env
            remedy = (
                f"it rejected the key in api_key_env={name}; export a valid key"
                if name
                else "it requires an API key; set api_key_env to the environment variable that holds the key"
            )
            raise CappyError(f"{self._setting} answered {status}: {remedy}" + (f" ({message})" if message else ""))
        if kind == Kind.CREDIT:
            raise CappyError(
                f"{self._setting} answered {status}: the account has no credit left ({message}); "
                f"add credit and run the same command to resume"
            )
        if kind == Kind.MISSING:
            raise CappyError(f"{self._setting} answered {status} ({message}); check base_url and sampler.model={self.model}")
        target = response.headers.get("Location", "an unknown address")
        raise CappyError(f"{self._setting} answered {status}, a redirect to {target}; set base_url to that address")

    def _choices(self, response: httpx.Response, request: CompletionRequest) -> list[Choice]:
        """Return the choices of an answer with status 200.

        Raises `RetryableError` if the answer is malformed or the server stopped all choices before their end.
        """
        try:
            choices = read_choices(response)[: request.n]
        except ValueError as error:
            raise RetryableError(str(error)) from None
        if all(choice.end == "failed" for choice in choices):
            raise RetryableError("the server stopped the answer before its end")
        self._answered += 1
        self._forbidden = 0
        if "stop" not in self._options:
            choices = [cut_at_stop(choice, request.decoding.stop) for choice in choices]
        return choices

    def _candidate(self, choice: Choice, decoding: DecodingConfig) -> Candidate:
        if choice.without_text:
            self._without_text += 1
            if self._without_text == 1:
                log(
                    f"{self._setting} answers without text: it has {choice.without_text} only, so the response is empty; raise max_tokens "
                    f"of decoding {decoding.name!r} or turn reasoning off, e.g. with sampler.prompt.chat_template_kwargs"
                )
        text = choice.text if self._keep_reasoning else strip_reasoning(choice.text)
        return Candidate(
            response=text.strip(),
            text=text,
            decoding=decoding.name,
            tokens=choice.tokens,
            finish_reason="length" if choice.end == "length" else "stop",
            logprob=choice.logprob,
        )

    @property
    def _setting(self) -> str:
        return f"sampler.engine.base_url={self.config.base_url}"
