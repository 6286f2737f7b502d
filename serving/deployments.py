"""The deployments behind the gateway, as plain classes that Ray Serve replicates: `LLM` samples, `Scorer` scores.

A replica of the LLM holds one model. A replica of the scorer holds the main scorer and some of the additional ones (`scorer_cache`).
Errors for the client leave a replica as `ApiError`. `translate_errors` turns the errors of Serve itself into `ApiError`. Imports torch
only when a scorer is built.
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

from cluster.config import DecodingConfig, SamplerConfig, ScorerConfig, ServingConfig
from cluster.errors import CappyError
from generation import engines
from generation.engines.contract import Candidate, ConstraintRefused, ContentFiltered, EngineUnavailable, PromptTooLong, RowError
from generation.prompts import Message
from serving.backend import ApiError, OnFinished, Sampled, Scored
from serving.ledger import Ledger
from serving.score_batcher import ScoreBatcher
from serving.scorer_cache import LoadedScorer, ScorerCache, ScorerUnavailable

logger = logging.getLogger("ray.serve")
UNAVAILABLE = "unavailable"
# The Retry-After of a server that has spent `max_cost`. Only its operator can raise the limit, so the value is long.
_BUDGET_RETRY_S = 3600.0
# Finished responses are reported early, so that they are scored while the last ones are sampled, under three conditions.
_EARLY_SHARE = 0.75  # this share of the pool has finished
_EARLY_MIN_CANDIDATES = 4  # the pool has at least this many candidates
_EARLY_WAIT_S = 0.005  # the rest takes longer: it does not finish in the same step of the engine


class EngineDown(CappyError):
    """The engine has stopped working; Serve replaces its replica."""


class LLM:
    """Sample responses with an engine of any kind.

    Args:
        config: model, engine, prompt form.
        max_wait_s: time in seconds that a request may wait for an endpoint's rate limits and cool-downs.
        ledger_uri: folder or s3:// prefix that records the spending of an endpoint with `max_cost`.

    Raises `CappyError` if the model lacks the prompt form.
    """

    def __init__(self, config: SamplerConfig, max_wait_s: float, ledger_uri: str) -> None:
        self.form = config.prompt.form
        self.engine = engines.load_engine(config, max_wait_s)
        limit = engines.cost_limit(config)
        self.ledger = None if limit is None else Ledger(ledger_uri, limit)
        self.priced = config.engine.kind == "endpoint" and config.engine.priced
        # Report a missing prompt form when the replica starts, not at the first request.
        self.engine.encode([{"role": "user", "content": "?"}], self.form, room=1, drop_shots=False)

    async def stream_sample(
        self, prompt: Sequence[Message] | str, decodings: Sequence[DecodingConfig], seeds: Sequence[int | None], logprobs: bool
    ) -> AsyncIterator[Sequence[str] | Sampled]:
        """Yield the responses that `sample` reports early, then the result of `sample`."""
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
        on_finished: OnFinished | None = None,
    ) -> Sampled:
        """Return the candidates of one prompt, in the order of the decodings.

        Cancelling the call stops the engine's work on the request.

        Args:
            prompt: a text, which the LLM continues unmodified, or the turns of a conversation, which get the config's prompt form.
            decodings: the decodings, each with its number of candidates.
            seeds: one seed per decoding; None draws without a seed.
            logprobs: whether the candidates need log-probabilities.
            on_finished: called at most once, with the finished responses, while the last responses are sampled.

        Raises `ApiError` for a prompt that the engine cannot accept, for an engine that has stopped, and for an endpoint's error.
        """
        param = "prompt" if isinstance(prompt, str) else "messages"
        try:
            encoded = self._encode(prompt, room=max(decoding.max_tokens for decoding in decodings))
        except RowError as error:
            raise self._client_error(error, param) from None
        identity = uuid.uuid4().hex
        if self.ledger and not await self.ledger.reserve(identity, sum(self.engine.max_cost(encoded, each) for each in decodings)):
            message = (
                "the request could cost more than remains of this server's budget (sampler.engine.max_cost); "
                "use fewer candidates or a smaller max_tokens"
            )
            raise ApiError(message, 429, code="insufficient_quota", retry_s=_BUDGET_RETRY_S)
        names = [f"{identity}-{position}" for position in range(len(decodings))]
        responses: list[str] = []
        enough, count = asyncio.Event(), sum(decoding.n for decoding in decodings)
        report_early = on_finished if count >= _EARLY_MIN_CANDIDATES else None

        def on_candidate(candidate: Candidate) -> None:
            responses.append(candidate["response"])
            if len(responses) >= _EARLY_SHARE * count:
                enough.set()

        filtered: list[ContentFiltered] = []

        async def draw_pool(decoding: DecodingConfig, seed: int | None, name: str) -> list[Candidate]:
            report = on_candidate if report_early else None
            try:
                return await self.engine.sample(encoded, decoding, seed, name, logprobs=logprobs, on_candidate=report)
            except ContentFiltered as error:
                filtered.append(error)
                return []

        draws = [asyncio.ensure_future(draw_pool(*each)) for each in zip(decodings, seeds, names, strict=True)]
        all_drawn = asyncio.gather(*draws)
        try:
            if report_early and await _finished_early(enough, all_drawn):
                report_early(list(responses))
            pools = await all_drawn
            # A content filter that stopped one decoding does not take the candidates of the others.
            if filtered and not any(pools):
                raise filtered[0]
            prompt_tokens = self.engine.prompt_tokens(encoded, names[0])
        except Exception as error:
            raise self._client_error(error, param) from None
        finally:
            # If one draw failed or the client disconnected, the other results are not needed. Their cost is known when they have ended.
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
            message = f"messages: the model's chat template refuses them: {error}"
            raise ApiError(message, param="messages", code="invalid_value") from None

    def _client_error(self, error: Exception, param: str) -> Exception:
        """Return the client's error for an engine's error; `param` is the field with the prompt. Return a bug's exception unchanged."""
        if self.engine.dead:
            return ApiError("the LLM stopped during the request and is being replaced; retry", 503, code=UNAVAILABLE)
        if isinstance(error, PromptTooLong):
            return ApiError(str(error), param=param, code="context_length_exceeded")
        if isinstance(error, ConstraintRefused):
            return ApiError(str(error), param=str(error).split()[0].rstrip(":"), code="invalid_value")
        if isinstance(error, EngineUnavailable):
            logger.warning("the LLM's endpoint: %s", error)
            if error.timed_out:
                message = "the LLM's endpoint did not answer in time; use fewer candidates or a smaller max_tokens"
                return ApiError(message, 504, code="timeout")
            return ApiError(
                "the LLM's endpoint accepts no requests at the moment; retry later", 503, code="overloaded", retry_s=error.retry_after_s
            )
        if isinstance(error, RowError):
            return ApiError(str(error), code="refused_by_endpoint")
        if isinstance(error, CappyError):
            # The text may hold addresses and variable names of this server, so only the operator's log gets it.
            logger.error("the LLM's endpoint: %s", error)
            return ApiError("the LLM's endpoint refuses this server; the server's log has the reason", 502, code="bad_gateway")
        return error

    async def ready(self) -> bool:
        """Return whether the engine can answer."""
        return not self.engine.dead

    def check_health(self) -> None:
        """Raise `EngineDown` if the engine has stopped. Ray Serve calls this regularly and replaces a replica that raises."""
        if self.engine.dead:
            raise EngineDown("the LLM's engine has stopped; Serve replaces the replica")

    def __del__(self) -> None:
        # Serve calls this when it stops a replica; the engine's process must stop too.
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.close()


class Scorer:
    """Score pairs with the trained scorers, in batches of pairs from several requests (`score_batcher`).

    The main scorer, at `main_uri`, stays loaded. Of `additional` (URIs by name) a replica holds at most `serving.scorers_loaded`.
    Every `serving.reload_s` seconds a scorer in use is checked for a newly published version, which replaces it.

    Raises `CappyError` if the main scorer cannot be loaded.
    """

    def __init__(self, serving: ServingConfig, main_uri: str, additional: Mapping[str, str], scorer: ScorerConfig | None = None) -> None:
        import torch

        capacity, dtype = serving.scorers_loaded, serving.scorer_dtype
        threads = 1 if torch.cuda.is_available() else min(serving.scorer_threads, len(os.sched_getaffinity(0)))
        self._batcher = ScoreBatcher(score_pairs, threads)
        self.cache = ScorerCache(
            serving.scorer_name, main_uri, additional, capacity=capacity, reload_s=serving.reload_s, dtype=dtype, scorer=scorer
        )

        async def return_name(name: str) -> str:
            return name

        # Registers the loaded scorers with Serve, which routes requests for a scorer to the replicas that hold it. Serve's own model
        # cache is not used: it evicts before it loads, so a scorer that cannot be loaded would evict working ones. It also loads only
        # one model at a time and never reloads.
        self._register_loaded = serve.multiplexed(max_num_models_per_replica=capacity)(return_name)

    async def score(self, name: str, instructions: list[str], responses: list[str]) -> Scored:
        """Return the raw logits of pairs by the scorer `name`. Raises `ApiError` (503) while it cannot be loaded."""
        # Loading comes before batching, so that loaded scorers do not wait for a scorer that is being loaded.
        try:
            scorer = await self.cache.get(name)
        except ScorerUnavailable as error:
            raise ApiError(f"{error} at the moment; retry later or use another scorer", 503, code="scorer_unavailable") from None
        if name != self.cache.main:
            await self._register_loaded(name)
        return await self._batcher.score(scorer, instructions, responses)

    async def ready(self) -> bool:
        """Return True: a replica exists only with its main scorer loaded."""
        return True


def score_pairs(scorer: LoadedScorer, instructions: Sequence[str], responses: Sequence[str], threads: int) -> Scored:
    """Return the raw logits and token counts of pairs; on a CPU compute with `threads` threads."""
    import torch

    torch.set_num_threads(threads)  # applies to the calling thread only, so concurrent batches keep their own number
    scores, tokens = scorer.model.score_and_count(instructions, responses)
    scored = Scored(scores=scores.tolist(), tokens=tokens.tolist())
    if scorer.version is not None:
        scored["version"] = scorer.version
    if scorer.logprob_weight is not None:
        scored["logprob_weight"] = scorer.logprob_weight
    if scorer.selection is not None:
        scored["selection"] = scorer.selection
    return scored


async def _finished_early(enough: asyncio.Event, all_drawn: asyncio.Future[Any]) -> bool:
    """Wait until `enough` is set or all is drawn; return whether the rest takes longer than `_EARLY_WAIT_S`."""
    waiting = asyncio.ensure_future(enough.wait())
    try:
        await asyncio.wait([waiting, all_drawn], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([all_drawn], timeout=_EARLY_WAIT_S)
        return not all_drawn.done()
    finally:
        waiting.cancel()


async def get_result(response: Any, name: str) -> Any:
    """Return the result of a call of a deployment; see `translate_errors`."""
    with translate_errors(response, name):
        return await response


@contextmanager
def translate_errors(response: Any, name: str) -> Iterator[None]:
    """Translate the errors of awaiting a deployment's response, or of iterating over it, in the block.

    Cancelling the block cancels the call in its replica. `name` names the deployment in messages to the client.

    Raises `ApiError`: the replica's own, or 503 while the deployment cannot answer (code `UNAVAILABLE` if a replica was lost). Other
    errors are bugs and pass unchanged.
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
        raise ApiError(f"{name} has too many queued requests; retry later", 503, code="overloaded") from None
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
        logger.warning("%s is unavailable: %s", name, error)
        raise ApiError(f"{name} stopped during the request and is being replaced; retry", 503, code=UNAVAILABLE) from None
