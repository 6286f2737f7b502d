"""The models behind the gateway, as plain classes Ray Serve makes replicas of: `LLM` samples, `Scorer` scores.

A replica of the LLM holds one model, a replica of the scorer the main one and some of the others (`shelf`). Errors that leave a
replica are pickled by Ray, so they carry one message; `answer` turns them into what the gateway tells its client.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Mapping, Sequence
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
from serving.shelf import Held, ScorerUnavailable, Shelf

logger = logging.getLogger("ray.serve")

Pairs = tuple[Held, list[str], list[str]]
"""A scorer, and the instructions and responses of a request to it."""


class PromptRefused(CappyError):
    """The model's chat template cannot render the client's messages."""


class EngineDown(CappyError):
    """The engine died under the request; its replica is being replaced."""


class LLM:
    """A vLLM engine. `sample` draws a request's whole pool; cancelling it stops the engine's work on the request."""

    def __init__(self, config: SamplerConfig, setting: str = "sampler.model") -> None:
        self.form = config.prompt.form
        self.engine = Engine(config.model, config.vllm(), setting)

    async def sample(self, prompt: Sequence[Message] | str, decodings: Sequence[DecodingConfig], seeds: Sequence[int]) -> Sampled:
        """Return the candidates of one prompt, decoding by decoding; `seeds` holds one for each.

        A prompt that is a text is continued as it stands; the turns of a conversation get the form the config says.
        Raises `PromptTooLong`, `PromptRefused` or `EngineDown`.
        """
        token_ids = self._encode(prompt, room=max(decoding.max_tokens for decoding in decodings))
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

    def _encode(self, prompt: Sequence[Message] | str, room: int) -> list[int]:
        from jinja2 import TemplateError

        turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        form = "verbatim" if isinstance(prompt, str) else self.form
        try:
            return self.engine.encode(turns, form, room, drop_shots=False)
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
    """The trained scorers. Requests that wait while a batch is scored are scored together in the next one.

    `main` stays, of `further` (URIs by name) a replica holds `room` at most; each is replaced when it is published anew, which is
    looked for every `reload_s` seconds.
    """

    def __init__(self, main: str, main_uri: str, further: Mapping[str, str], room: int, reload_s: float) -> None:
        self.shelf = Shelf(main, main_uri, further, room=room, reload_s=reload_s)

        async def here(name: str) -> str:
            return name

        # Tells Serve what this replica holds, so that requests for a scorer go where it is. Serve could hold the scorers too, but it
        # makes room before it loads: one that cannot be loaded would drive out those that can. It also loads one at a time, once.
        self._announce = serve.multiplexed(max_num_models_per_replica=room)(here)

    async def score(self, name: str, instructions: list[str], responses: list[str]) -> Scored:
        """Return the raw logits of pairs by the scorer `name`. Raises `ScorerUnavailable`."""
        # Before the batch: scorers at hand do not wait for one that is being loaded.
        held = await self.shelf.get(name)
        if name != self.shelf.main:
            await self._announce(name)
        scored: Scored = await self._together((held, instructions, responses))
        return scored

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)  # type: ignore[untyped-decorator]
    async def _together(self, requests: list[Pairs]) -> list[Scored]:
        # In a thread, so that the replica's event loop goes on collecting the next batch and answering health checks.
        return await asyncio.to_thread(score_together, requests)

    async def ready(self) -> bool:
        """Whether the main scorer can answer."""
        return True


def score_together(requests: Sequence[Pairs]) -> list[Scored]:
    """Return the scores of each request, those of one scorer in one pass."""
    scored: dict[int, Scored] = {}
    # Serve keeps requests of different names apart; those of one name may have it from before and after a reload.
    for held in {id(held): held for held, _, _ in requests}.values():
        mine = [(place, texts, responses) for place, (each, texts, responses) in enumerate(requests) if each is held]
        instructions = [instruction for _, texts, _ in mine for instruction in texts]
        scores, tokens = held.model.score_and_count(instructions, [response for _, _, responses in mine for response in responses])
        starts = [0, *itertools.accumulate(len(responses) for _, _, responses in mine)]
        for (place, _, _), (start, end) in zip(mine, itertools.pairwise(starts), strict=True):
            scored[place] = Scored(scores=scores[start:end].tolist(), tokens=tokens[start:end].tolist())
            if held.version is not None:
                scored[place]["version"] = held.version
            if held.logprob_weight is not None:
                scored[place]["logprob_weight"] = held.logprob_weight
    return [scored[place] for place in range(len(requests))]


async def answer(response: Any, name: str, param: str = "messages") -> Any:
    """Await a call of a deployment; `name` is what the client is told failed, `param` the field with the prompt.

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
            raise ApiError(str(cause), param=param, code="context_length_exceeded") from None
        if isinstance(cause, PromptRefused):
            raise ApiError(str(cause), param=param, code="invalid_value") from None
        if isinstance(cause, ScorerUnavailable):
            raise ApiError(f"{cause} now; try again later, or name another", 503, code="scorer_unavailable") from None
        if isinstance(cause, EngineDown):
            raise ApiError(f"{name} went down while answering and is being replaced; try again", 503, code="unavailable") from None
        raise
    except BackPressureError:
        raise ApiError(f"{name} has too many requests waiting; try again", 503, code="overloaded") from None
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
        logger.warning("%s is unavailable: %s", name, error)
        raise ApiError(f"{name} went down while answering and is being replaced; try again", 503, code="unavailable") from None
