"""The models behind the gateway, as plain classes Ray Serve makes replicas of: `LLM` samples, `Scorer` scores.

A replica of the LLM holds one model, a replica of the scorer the main one and some of the others (`shelf`). What a client should be
told leaves a replica as an `ApiError`, and what Serve raises in a replica's place becomes one in `answer`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from cluster.config import DecodingConfig, SamplerConfig, ServingConfig
from cluster.errors import CappyError
from generation import engines
from generation.engines.contract import Candidate, EngineUnavailable, PromptTooLong, RowError
from generation.prompts import Message
from serving.backend import ApiError, OnFinished, Sampled, Scored
from serving.ledger import Ledger
from serving.score_batcher import ScoreBatcher
from serving.scorer_cache import LoadedScorer, ScorerCache, ScorerUnavailable

logger = logging.getLogger("ray.serve")
UNAVAILABLE = "unavailable"
# When a server without money asks to be tried again: nothing but its operator helps.
_BROKE_RETRY_S = 3600.0
# When the responses that have ended are told, so that they are scored while the last ones are sampled: once they are so great a share
# of a pool, which has so many at least; and not where the rest ends with them, in the same step of the engine.
_EARLY_SHARE = 0.75
_EARLY_OF = 4
_TOGETHER_S = 0.005


class EngineDown(CappyError):
    """The engine died; its replica is being replaced."""


class LLM:
    """An engine of any kind. `sample` draws a request's whole pool; cancelling it stops the engine's work on the request.

    `patience_s` is how long a request may wait for an endpoint's rates and cool-downs, `ledger` where the dollars of an endpoint's
    `max_cost` are kept.
    """

    def __init__(self, config: SamplerConfig, patience_s: float, ledger: str) -> None:
        self.form = config.prompt.form
        self.engine = engines.load_engine(config, patience_s)
        ceiling = engines.cost_limit(config)
        self.ledger = None if ceiling is None else Ledger(ledger, ceiling)
        self.priced = config.engine.kind == "endpoint" and config.engine.priced
        # A form the model does not have is told now and not to the first client.
        self.engine.encode([{"role": "user", "content": "?"}], self.form, room=1, drop_shots=False)

    async def stream_sample(
        self, prompt: Sequence[Message] | str, decodings: Sequence[DecodingConfig], seeds: Sequence[int | None], logprobs: bool
    ) -> AsyncIterator[Sequence[str] | Sampled]:
        """Yield what `sample` tells early, and then what it returns."""
        parts: asyncio.Queue[Sequence[str] | None] = asyncio.Queue()
        sampling = asyncio.ensure_future(self.sample(prompt, decodings, seeds, logprobs, parts.put_nowait))
        sampling.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            while (part := await parts.get()) is not None:
                yield part
            yield sampling.result()
        finally:
            sampling.cancel()

    async def sample(
        self,
        prompt: Sequence[Message] | str,
        decodings: Sequence[DecodingConfig],
        seeds: Sequence[int | None],
        logprobs: bool = True,
        early: OnFinished | None = None,
    ) -> Sampled:
        """Return the candidates of one prompt, decoding by decoding; `seeds` holds one for each, None for chance.

        `early` is told the responses that have ended while the last ones are sampled, once where at all.
        A prompt that is a text is continued as it stands; the turns of a conversation get the form the config says.
        Raises `ApiError` for a prompt the engine cannot take, an engine that died, and whatever an endpoint answers but candidates.
        """
        param = "prompt" if isinstance(prompt, str) else "messages"
        try:
            encoded = self._encode(prompt, room=max(decoding.max_tokens for decoding in decodings))
        except RowError as error:
            raise self._told(error, param) from None
        identity = uuid.uuid4().hex
        if self.ledger and not await self.ledger.reserve(identity, sum(self.engine.max_cost(encoded, each) for each in decodings)):
            message = "the request could cost more than is left of what this server may spend (sampler.engine.max_cost); ask for less"
            raise ApiError(message, 429, code="insufficient_quota", retry_s=_BROKE_RETRY_S)
        names = [f"{identity}-{position}" for position in range(len(decodings))]
        responses: list[str] = []
        enough, count = asyncio.Event(), sum(decoding.n for decoding in decodings)
        tell = early if count >= _EARLY_OF else None

        def ended(candidate: Candidate) -> None:
            responses.append(candidate["response"])
            if len(responses) >= _EARLY_SHARE * count:
                enough.set()

        draws = [
            asyncio.ensure_future(
                self.engine.sample(encoded, decoding, seed, name, logprobs=logprobs, on_candidate=ended if tell else None)
            )
            for decoding, seed, name in zip(decodings, seeds, names, strict=True)
        ]
        all_drawn = asyncio.gather(*draws)
        try:
            if tell and await _before(enough, all_drawn):
                tell(list(responses))
            pools = await all_drawn
            prompt_tokens = self.engine.prompt_tokens(encoded, names[0])
        except Exception as error:
            raise self._told(error, param) from None
        finally:
            # After one draw failed, or the client went away, nobody reads the others. What they cost is known when they have ended.
            for draw in draws:
                draw.cancel()
            await asyncio.wait(draws)
            cost = sum(self.engine.pop_cost(name) for name in names)
            if self.ledger:
                self.ledger.settle(identity, cost)
        candidates = [candidate for pool in pools for candidate in pool]
        return Sampled(candidates=candidates, prompt_tokens=prompt_tokens, cost=cost if self.priced else None)

    def _encode(self, prompt: Sequence[Message] | str, room: int) -> Any:
        from jinja2 import TemplateError

        turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        form = "verbatim" if isinstance(prompt, str) else self.form
        try:
            return self.engine.encode(turns, form, room, drop_shots=False)
        except TemplateError as error:
            message = f"the model's chat template refused the messages: {error}"
            raise ApiError(message, param="messages", code="invalid_value") from None

    def _told(self, error: Exception, param: str) -> Exception:
        """Return what the client is told of an engine's error, `param` the field with the prompt; one that is a bug stays as it is."""
        if self.engine.dead:
            return ApiError("the LLM went down while answering and is being replaced; try again", 503, code=UNAVAILABLE)
        if isinstance(error, PromptTooLong):
            return ApiError(str(error), param=param, code="context_length_exceeded")
        if isinstance(error, EngineUnavailable):
            logger.warning("the LLM's endpoint: %s", error)
            if error.timed_out:
                return ApiError("the LLM's endpoint gave no answer in time; ask for less in one request", 504, code="timeout")
            return ApiError("the LLM's endpoint takes no requests now; try again", 503, code="overloaded", retry_s=error.retry_after_s)
        if isinstance(error, RowError):
            return ApiError(str(error), code="refused_by_endpoint")
        if isinstance(error, CappyError):
            # It may name addresses and variables of ours: for the operator alone.
            logger.error("the LLM's endpoint: %s", error)
            return ApiError("the LLM's endpoint refuses this server; its log has the reason", 502, code="bad_gateway")
        return error

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
    """The trained scorers. Pairs of requests that wait while others are scored are scored together (`score_batcher.py`).

    The main one, at `main_uri`, stays; of `further` (URIs by name) a replica holds `serving.scorers_loaded` at most. Each is replaced
    when it is published anew, which is looked for every `serving.reload_s` seconds.
    """

    def __init__(self, serving: ServingConfig, main_uri: str, further: Mapping[str, str]) -> None:
        import torch

        room, dtype = serving.scorers_loaded, serving.scorer_dtype
        threads = 1 if torch.cuda.is_available() else min(serving.scorer_threads, len(os.sched_getaffinity(0)))
        self._batcher = ScoreBatcher(score_pairs, threads)
        self.shelf = ScorerCache(serving.scorer_name, main_uri, further, room=room, reload_s=serving.reload_s, dtype=dtype)

        async def here(name: str) -> str:
            return name

        # Tells Serve what this replica holds, so that requests for a scorer go where it is. Serve could hold the scorers too, but it
        # makes room before it loads: one that cannot be loaded would drive out those that can. It also loads one at a time, once.
        self._announce = serve.multiplexed(max_num_models_per_replica=room)(here)

    async def score(self, name: str, instructions: list[str], responses: list[str]) -> Scored:
        """Return the raw logits of pairs by the scorer `name`. Raises `ApiError` (503) while it cannot be loaded."""
        # Before the batch: scorers at hand do not wait for one that is being loaded.
        try:
            held = await self.shelf.get(name)
        except ScorerUnavailable as error:
            raise ApiError(f"{error} now; try again later, or name another", 503, code="scorer_unavailable") from None
        if name != self.shelf.main:
            await self._announce(name)
        return await self._batcher.score(held, instructions, responses)

    async def ready(self) -> bool:
        """Whether the main scorer can answer."""
        return True


def score_pairs(held: LoadedScorer, instructions: Sequence[str], responses: Sequence[str], threads: int) -> Scored:
    """Return the scores of pairs, computed on CPU with so many threads."""
    import torch

    torch.set_num_threads(threads)  # of this thread: others that score at the same time have their own
    scores, tokens = held.model.score_and_count(instructions, responses)
    scored = Scored(scores=scores.tolist(), tokens=tokens.tolist())
    if held.version is not None:
        scored["version"] = held.version
    if held.logprob_weight is not None:
        scored["logprob_weight"] = held.logprob_weight
    return scored


async def _before(enough: asyncio.Event, all_drawn: asyncio.Future[Any]) -> bool:
    """Return, once there are enough or all is drawn, whether the rest takes longer."""
    waiting = asyncio.ensure_future(enough.wait())
    try:
        await asyncio.wait([waiting, all_drawn], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([all_drawn], timeout=_TOGETHER_S)
        return not all_drawn.done()
    finally:
        waiting.cancel()


async def get_result(response: Any, name: str) -> Any:
    """Await a call of a deployment; see `answering`."""
    with translate_errors(response, name):
        return await response


@contextmanager
def translate_errors(response: Any, name: str) -> Iterator[None]:
    """Await a call of a deployment, or all it yields, in the block; `name` is what the client is told failed.

    Cancelling the block cancels the call in its replica. Raises `ApiError`: what the replica raised, or 503 while the deployment
    cannot answer (code `UNAVAILABLE` where a replica was lost). Other errors are bugs and pass through.
    """
    try:
        yield
    except asyncio.CancelledError:
        response.cancel()
        raise
    except RayTaskError as error:
        if isinstance(error.cause, ApiError):
            raise error.cause from None
        raise
    except BackPressureError:
        raise ApiError(f"{name} has too many requests waiting; try again", 503, code="overloaded") from None
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
        logger.warning("%s is unavailable: %s", name, error)
        raise ApiError(f"{name} went down while answering and is being replaced; try again", 503, code=UNAVAILABLE) from None
