"""The interface between the gateway and the models: `Backend`, its results, and `ApiError`.

Imports neither Ray nor a web framework.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

from cluster.config import DecodingConfig
from cluster.errors import CappyError
from generation.engines.contract import Candidate
from generation.prompts import Message
from training.selection import Selection


class ApiError(CappyError):
    """An error that a client receives: an HTTP status and OpenAI's error body.

    `param` names the request field, `code` is for programs, and `retry_s` is the time until a retry can succeed, in seconds.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s

    def __reduce__(self) -> tuple[Any, ...]:
        # By default pickle keeps the message only. Ray pickles this error when a replica raises it.
        return ApiError, (str(self), self.status, self.param, self.code, self.retry_s)

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the response: the time to wait before a retry, how to authenticate, or that the connection closes."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (429, 503):
            return {"Retry-After": str(max(1, math.ceil(self.retry_s or 0)))}
        if self.status in (408, 413):  # the server does not read the rest of the body
            return {"Connection": "close"}
        return {}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


OnFinished = Callable[[Sequence[str]], None]
"""Callback that receives finished responses while the rest of the pool is sampled."""


class Sampled(TypedDict):
    """The result of sampling from one prompt."""

    candidates: list[Candidate]
    prompt_tokens: int
    cost: NotRequired[float | None]
    """US dollars, if the LLM is an endpoint with prices."""


class Scored(TypedDict):
    """The result of scoring some pairs, in their order."""

    scores: list[float]
    """Raw logits."""
    tokens: list[int]
    """Tokens of each pair that the scorer read."""
    version: NotRequired[str]
    """Version of the scorer's weights; it changes with each publication. Absent if no `cappy` command published the scorer."""
    logprob_weight: NotRequired[float]
    """Weight of the LLM's mean log-probability in the blend. Absent if none was fitted with the scorer."""
    selection: NotRequired[Selection]
    """The fitted selection of the scorer. Absent if it has none."""


def merge_scored(parts: Sequence[Scored]) -> Scored:
    """Return one result from the results for consecutive parts of the pairs; all other fields are those of the last part."""
    scores = [score for part in parts for score in part["scores"]]
    return {**parts[-1], "scores": scores, "tokens": [count for part in parts for count in part["tokens"]]}


class Backend(Protocol):
    """The models that the gateway calls. Each method raises `ApiError` for an error that the client should receive."""

    def sample(
        self,
        prompt: Sequence[Message] | str,
        decodings: Sequence[DecodingConfig],
        seeds: Sequence[int | None],
        logprobs: bool,
        on_finished: OnFinished | None,
        /,
    ) -> Awaitable[Sampled]:
        """Return the candidates for a conversation, or for a text that the LLM continues.

        Without `logprobs` the candidates may lack their log-probabilities. `on_finished`, if given, may be called with responses
        that are finished while others are not.
        """

    def score(self, scorer: str, instructions: Sequence[str], responses: Sequence[str], /) -> Awaitable[Scored]:
        """Return the raw logit of each pair from the scorer of that name; both lists have the same length."""

    def ready(self) -> Awaitable[dict[str, bool]]:
        """Return, by model name, whether the model can answer."""
