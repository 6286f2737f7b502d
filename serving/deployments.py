"""The two models behind the gateway, as plain classes Ray Serve makes replicas of: `LLM` samples, `Scorer` scores.

Each replica holds one model, loaded in `__init__`. Errors that leave a replica are pickled by Ray, so they carry one message;
`answer` turns them into what the gateway tells its client.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from cluster.config import DecodingConfig, SamplerConfig
from cluster.errors import CappyError
from generation.engines import PromptTooLong
from generation.engines.vllm import Engine
from generation.prompts import Message
from serving.protocol import ApiError, Sampled, Scored

logger = logging.getLogger("ray.serve")


class PromptRefused(CappyError):
    """The model's chat template cannot render the client's messages."""


class EngineDown(CappyError):
    """The engine died under the request; its replica is being replaced."""


class LLM:
    """A vLLM engine. `sample` draws a request's whole pool; cancelling it stops the engine's work on the request."""

    def __init__(self, config: SamplerConfig, setting: str = "sampler.model") -> None:
        self.form = config.prompt.form
        self.engine = Engine(config.model, config.vllm(), setting)

    async def sample(self, turns: Sequence[Message], decodings: Sequence[DecodingConfig], seeds: Sequence[int]) -> Sampled:
        """Return the candidates of one prompt, decoding by decoding; `seeds` holds one for each.

        Raises `PromptTooLong`, `PromptRefused` or `EngineDown`.
        """
        token_ids = self._encode(turns, room=max(decoding.max_tokens for decoding in decodings))
        identity = uuid.uuid4().hex
        draws = [
            asyncio.ensure_future(self.engine.sample(token_ids, decoding, seed, f"{identity}-{position}"))
            for position, (decoding, seed) in enumerate(zip(decodings, seeds, strict=True))
        ]
        try:
            pools = await asyncio.gather(*draws)
        except Exception as error:
            if self.engine.dead:
                raise EngineDown(f"the LLM's engine died: {type(error).__name__}") from None
            raise
        finally:
            # After one draw failed, or the client went away, nobody reads the others.
            for draw in draws:
                draw.cancel()
        return Sampled(candidates=[candidate for pool in pools for candidate in pool], prompt_tokens=len(token_ids))

    def _encode(self, turns: Sequence[Message], room: int) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self.engine.encode(turns, self.form, room, drop_shots=False)
        except TemplateError as error:
            raise PromptRefused(f"the model's chat template refused the messages: {error}") from None

    async def ready(self) -> bool:
        """Whether the engine can answer."""
        return not self.engine.dead

    def check_health(self) -> None:
        """Ray Serve asks this regularly, and replaces a replica that raises."""
        if self.engine.dead:
            raise EngineDown("the engine is dead")

    def __del__(self) -> None:
        # Serve calls this when it stops a replica: the engine's own process must go with it.
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.close()


class Scorer:
    """A trained scorer. Requests that wait while a batch is scored are scored together in the next one."""

    def __init__(self, name: str, setting: str = "scorer_path") -> None:
        from training.scorer import Scorer as Model

        self.model = Model.load(name, dtype="float32", setting=setting)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)  # type: ignore[untyped-decorator]
    async def score(self, requests: list[tuple[list[str], list[str]]]) -> list[Scored]:
        """Return the raw logits of each request's pairs; a request is its instructions and their responses."""
        instructions = [instruction for each, _ in requests for instruction in each]
        texts = [response for _, each in requests for response in each]
        # In a thread, so that the replica's event loop goes on collecting the next batch and answering health checks.
        scores, tokens = await asyncio.to_thread(self.model.score_and_count, instructions, texts)
        starts = [0, *itertools.accumulate(len(responses) for _, responses in requests)]
        return [Scored(scores=scores[start:end].tolist(), tokens=tokens[start:end].tolist()) for start, end in itertools.pairwise(starts)]

    async def logprob_weight(self) -> float | None:
        """The weight of the LLM's mean log-probability that was fitted with the scorer, None where there is none."""
        return self.model.logprob_weight

    async def ready(self) -> bool:
        """Whether the scorer can answer."""
        return True


async def answer(response: Any, name: str) -> Any:
    """Await a call of a deployment; `name` is what the client is told failed.

    Cancelling this cancels the call in its replica. Raises `ApiError`: 400 for a prompt the LLM cannot take, 503 while the
    deployment cannot answer. Other errors are bugs and pass through.
    """
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PromptTooLong):
            raise ApiError(str(cause), param="messages", code="context_length_exceeded") from None
        if isinstance(cause, PromptRefused):
            raise ApiError(str(cause), param="messages", code="invalid_value") from None
        if isinstance(cause, EngineDown):
            raise ApiError(f"{name} went down while answering and is being replaced; try again", 503, code="unavailable") from None
        raise
    except BackPressureError:
        raise ApiError(f"{name} has too many requests waiting; try again", 503, code="overloaded") from None
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
        logger.warning("%s is unavailable: %s", name, error)
        raise ApiError(f"{name} went down while answering and is being replaced; try again", 503, code="unavailable") from None
