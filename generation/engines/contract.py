"""The interface between the sampler and an engine: candidate, errors and protocols. Imports no engine and no Ray."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

from cluster.config import DecodingConfig
from cluster.errors import CappyError, UsageError
from generation.prompts import Message


class RequestDecoding(DecodingConfig):
    """A decoding with constraints that a request of a server sets and a config cannot. Only the vLLM engine supports them."""

    stop_token_ids: tuple[int, ...] = ()
    """Ids of tokens that end a candidate."""
    structured_outputs: dict[str, Any] | None = None
    """The arguments of vLLM's `StructuredOutputsParams`."""


class Candidate(TypedDict):
    """One sampled response."""

    response: str
    """The text without reasoning (`sampler.reasoning`), and without leading and trailing white space."""
    text: NotRequired[str]
    """The exact continuation of the prompt, white space included, if the engine keeps it."""
    decoding: str
    """Name of the decoding that drew it."""
    tokens: int
    """Sampled tokens, including the end-of-text token."""
    finish_reason: str
    """`stop` (end of text or a stop string) or `length` (max_tokens reached)."""
    logprob: float | None
    """Sum of the natural log-probabilities of the sampled tokens under the model at temperature 1. None if an endpoint does not
    return them, the caller did not request them, or one of them is not finite. With reasoning stripped it includes the reasoning."""


class RowError(CappyError):
    """This row cannot be sampled, and a retry would fail too."""


class ContentFiltered(RowError):
    """A content filter stopped all candidates of one decoding, or refused the prompt. Other decodings may have candidates."""


class PromptTooLong(RowError):
    """The prompt does not fit in the context of the engine with enough tokens left for a candidate."""


class ConstraintRefused(RowError):
    """The engine refuses the `stop_token_ids` or `structured_outputs` of a request."""


class EngineUnavailable(RowError):
    """All tries of the request failed, or the engine would accept it only after `max_wait_s`. Other rows may succeed."""

    retry_after_s: float | None = None
    """Seconds until the engine accepts requests again, or None if unknown."""
    timed_out = False
    """Whether the engine accepted a request and did not answer in time."""


OnCandidate = Callable[[Candidate], None]
"""A callback for each candidate of a `sample` call, called as soon as the candidate is complete and before the call returns."""
Prompt = list[int] | list[Message] | str
"""An encoded prompt, returned by `encode` and taken by `sample`: token ids, or messages or raw text for an endpoint."""


class LLM(Protocol):
    """The methods of an engine that the sampler uses."""

    @property
    def dead(self) -> bool:
        """Whether the engine has failed for good; its process must be replaced."""

    def encode(self, turns: Sequence[Message], form: str, room: int) -> Any:
        """Return the `Prompt` of a conversation with at least `room` tokens left for a candidate. Raises `PromptTooLong`.

        Args:
            turns: the messages of the conversation.
            form: `chat` (the chat template of the model) or `raw` (plain text).
            room: tokens to leave for a candidate.
        """

    async def sample(self, prompt: Any, decoding: DecodingConfig, seed: int | None, request_id: str) -> list[Candidate]:
        """Return the `decoding.n` candidates of one prompt.

        Args:
            prompt: the result of `encode`.
            decoding: the sampling settings.
            seed: seed of the draws; None draws at random, which is faster in engines that sample in batches.
            request_id: id of the request, also the key for `pop_cost`.

        Raises `RowError` for a prompt that the engine will never answer, and another `CappyError` if it cannot answer any prompt.
        """

    def max_cost(self, prompt: Any, decoding: DecodingConfig) -> float:
        """Return an upper bound of the cost of one `sample` call in dollars; failures and retries are included."""

    def pop_cost(self, request_id: str) -> float:
        """Return the cost in dollars of a `sample` call that succeeded or failed, and remove it from the engine."""


class ServedLLM(LLM, Protocol):
    """The methods of an engine that serving uses in addition."""

    def encode(self, turns: Sequence[Message], form: str, room: int, drop_shots: bool = True) -> Any:
        """Return the `Prompt`; `drop_shots=False` keeps all turns, because the conversation of a client must not be shortened."""

    async def sample(
        self,
        prompt: Any,
        decoding: DecodingConfig,
        seed: int | None,
        request_id: str,
        *,
        logprobs: bool = True,
        on_candidate: OnCandidate | None = None,
    ) -> list[Candidate]:
        """Return the candidates and pass each one to `on_candidate` as soon as the engine has it.

        With `logprobs=False` the engine may leave `logprob` None: vLLM computes them in an extra step over the vocabulary.
        """

    def prompt_tokens(self, prompt: Any, request_id: str) -> int:
        """Return the number of tokens of a prompt.

        An endpoint reads it from the answer to the `sample` call with that id. Call it after `sample` and before `pop_cost`.
        """

    def close(self) -> None:
        """Stop the processes and threads that the engine started."""


def read_api_key(name: str | None) -> str | None:
    """Return the API key in environment variable `name`, or None if `name` is None.

    Raises `UsageError` if the variable is not set or blank, or has characters that no header can hold.
    """
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(f"sampler.engine.api_key_env={name}: the variable is not set on the machine of the sampler; export it there")
    if not re.fullmatch(r"[!-~]+", key):
        raise UsageError(
            f"sampler.engine.api_key_env={name}: the key has spaces, control or non-ASCII characters, which no HTTP header can hold; "
            f"copy the key again"
        )
    return key


def has_gpu() -> bool:
    """Return whether this process can use a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def request_seed(seed: int, identity: str, decoding: str) -> int:
    """Return a 31-bit seed that depends only on the seed of the run, the id of the row and the name of the decoding."""
    digest = hashlib.blake2b(f"{seed}\0{identity}\0{decoding}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def request_identity(model: str, turns: Sequence[Message], decoding: DecodingConfig, seed: int) -> str:
    """Return a hash (32 hex digits) of model, prompt, decoding and seed, equal on all machines and engines."""
    parts = [model, [[turn["role"], turn["content"]] for turn in turns], decoding.model_dump(mode="json"), seed]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
