"""The contract between the sampler and an engine: the candidate, the errors, the protocols. Knows no engine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

from cluster.config import DecodingConfig
from cluster.errors import CappyError, UsageError
from generation.prompts import Message


class Candidate(TypedDict):
    """One sampled response."""

    response: str
    """The text, outer white space stripped."""
    text: NotRequired[str]
    """The text with its outer white space, where the engine keeps it: what follows a prompt letter by letter."""
    decoding: str
    """Name of the decoding that drew it."""
    tokens: int
    """Tokens sampled, the end of text included."""
    finish_reason: str
    """`stop` (end of text or a stop string) or `length` (max_tokens reached)."""
    logprob: float | None
    """Sum of the natural log-probabilities of the sampled tokens under the model at temperature 1; None where an endpoint
    does not tell, or nobody asked."""


class RowError(CappyError):
    """This row cannot be sampled, and trying again would not help."""


class PromptTooLong(RowError):
    """The prompt leaves no room for a candidate in the engine's context."""


class EngineUnavailable(RowError):
    """The engine was asked as often as it may be, or would have to be waited for too long. Other rows may be answered."""

    retry_after_s: float | None = None
    """Seconds after which it would take requests again, where it said so."""
    timed_out = False
    """Whether it took a request and gave no answer in time."""


OnCandidate = Callable[[Candidate], None]
"""Is told each candidate of a call as soon as it is there, and so before the call returns them all."""
Prompt = list[int] | list[Message] | str
"""What an engine's `encode` returns and its `sample` takes: token ids, or for an endpoint the messages or the raw text."""


class LLM(Protocol):
    """What a sampler needs of an engine."""

    @property
    def dead(self) -> bool:
        """Whether the engine can never answer again; its process must be replaced."""

    def encode(self, turns: Sequence[Message], form: str, room: int) -> Any:
        """Return the `Prompt` of some turns with at least `room` tokens left for a candidate. Raises `PromptTooLong`."""

    async def sample(self, prompt: Any, decoding: DecodingConfig, seed: int | None, request_id: str) -> list[Candidate]:
        """Return the `decoding.n` candidates of one prompt; without `seed` by chance, which engines that sample in batches do faster.

        Raises `RowError` for a prompt it will never answer, any other `CappyError` where no prompt will be answered.
        """

    def max_cost(self, prompt: Any, decoding: DecodingConfig) -> float:
        """Return the most dollars one `sample` can cost, whatever happens to it."""

    def pop_cost(self, request_id: str) -> float:
        """Return the dollars a `sample` that ended, well or badly, did cost, and forget them."""


class ServedLLM(LLM, Protocol):
    """What serving needs of an engine beside."""

    def encode(self, turns: Sequence[Message], form: str, room: int, drop_shots: bool = True) -> Any:
        """Return the `Prompt`; with `drop_shots=False` (a client's own conversation, which is not ours to shorten) of all turns."""

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
        """Return the candidates, and tell `ended` each of them as it comes: one by one, or as the engine has them.

        Without `logprobs` maybe without their log-probabilities, which take vLLM a pass over its vocabulary.
        """

    def prompt_tokens(self, prompt: Any, request_id: str) -> int:
        """Return the tokens of a prompt; an endpoint counts them in the `sample` of that id, which must have ended and not been billed."""

    def close(self) -> None:
        """End what runs beside this process' own threads."""


def read_api_key(name: str | None) -> str | None:
    """Return the key in environment variable `name`, or None for no name. Raises `UsageError` where it is not set."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(f"sampler.engine.api_key_env={name}: no such variable is set where the sampler runs; export it there")
    return key


def has_gpu() -> bool:
    """Whether this process sees a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def request_seed(seed: int, identity: str, decoding: str) -> int:
    """Return a 31-bit seed that is a function of the run's seed, the row and the decoding alone."""
    digest = hashlib.blake2b(f"{seed}\0{identity}\0{decoding}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def request_identity(model: str, turns: Sequence[Message], decoding: DecodingConfig, seed: int) -> str:
    """Return 32 hex digits that are equal where model, prompt, decoding and seed are, on any machine and engine."""
    parts = [model, [[turn["role"], turn["content"]] for turn in turns], decoding.model_dump(mode="json"), seed]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
