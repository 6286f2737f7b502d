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


class ApiError(CappyError):
    """An answer that is an error: an HTTP status and OpenAI's error body."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is pickled by its message alone; Ray carries this one out of a replica.
        return ApiError, (str(self), self.status, self.param, self.code, self.retry_s)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: when to come back, how to say who one is."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (429, 503):
            return {"Retry-After": str(max(1, math.ceil(self.retry_s or 0)))}
        if self.status in (408, 413):  # the rest of the body is not waited for
            return {"Connection": "close"}
        return {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


OnFinished = Callable[[Sequence[str]], None]
"""Is told responses that have ended before the whole pool has."""


class Sampled(TypedDict):
    """What the LLM gives back for one prompt."""

    candidates: list[Candidate]
    prompt_tokens: int
    cost: NotRequired[float | None]
    """Dollars, where an endpoint has prices."""


def merge_scored(parts: Sequence[Scored]) -> Scored:
    """Return what the scorer gave back for some pairs from what it gave back for parts of them, in order; the rest is the last one's."""
    scores = [score for part in parts for score in part["scores"]]
    return {**parts[-1], "scores": scores, "tokens": [count for part in parts for count in part["tokens"]]}


class Scored(TypedDict):
    """What the scorer gives back for some pairs, in their order."""

    scores: list[float]
    """Raw logits."""
    tokens: list[int]
    """Tokens the scorer read of each pair."""
    version: NotRequired[str]
    """Of the scorer's weights: changes when it is published anew. Absent for a scorer that no verb of ours published."""
    logprob_weight: NotRequired[float]
    """The blend's weight of the LLM's mean log-probability, absent where none was fitted with the scorer."""


class Backend(Protocol):
    """The models as the gateway sees them; each call raises `ApiError` for what the client should be told."""

    def sample(
        self,
        prompt: Sequence[Message] | str,
        decodings: Sequence[DecodingConfig],
        seeds: Sequence[int | None],
        logprobs: bool,
        on_finished: OnFinished | None,
    ) -> Awaitable[Sampled]:
        """Return the candidates of a conversation, or of a text that is continued as it stands; without `logprobs` maybe without them.

        `on_finished`, if given, may be called with the responses that finished while others are still sampled.
        """

    def score(self, scorer: str, instructions: Sequence[str], responses: Sequence[str]) -> Awaitable[Scored]:
        """Return the raw logit of each pair by the scorer of that name; the lists are of equal length."""

    def ready(self) -> Awaitable[dict[str, bool]]:
        """Return whether each model can answer, by its name."""
