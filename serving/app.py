"""The Serve graph: a gateway in front of the LLM and the scorer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray
import tenacity
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster import models, storage
from cluster.config import Config, DecodingConfig, Scaling, ServingConfig
from generation import engines
from generation.prompts import Message
from serving.backend import ApiError, OnFinished, Sampled, Scored
from serving.deployments import LLM, UNAVAILABLE, Scorer, get_result, translate_errors
from serving.gateway import build_api
from serving.model_registry import additional_scorers
from serving.prometheus import Metrics

APPLICATION = "cappy"
_READY_TIMEOUT_S = 5.0
_READY_KEPT_S = 1.0
# A request's own timeout comes first and has OpenAI's shape; the proxy's is there for what never reaches the gateway.
_PROXY_GRACE_S = 10.0
# Times a call of the scorer is sent while its replicas are being lost.
_SCORER_TRIES = 8
# Share of a request's time that it may wait for an endpoint to take it.
_PATIENCE = 0.5


class ServeBackend:
    """The gateway's models, reached through Serve handles."""

    def __init__(self, llm: Any, scorer: Any, serving: ServingConfig, metrics: Metrics) -> None:
        self.llm, self.scorer, self.serving, self.metrics = llm, scorer, serving, metrics
        self._stream_sample = llm.options(stream=True).stream_sample
        self._looking: asyncio.Task[dict[str, bool]] | None = None
        self._looked = 0.0

    async def sample(
        self,
        prompt: Sequence[Message] | str,
        decodings: Sequence[DecodingConfig],
        seeds: Sequence[int | None],
        logprobs: bool,
        early: OnFinished | None,
    ) -> Sampled:
        if early is None:
            whole: Sampled = await get_result(self.llm.sample.remote(prompt, decodings, seeds, logprobs), "the LLM")
            return whole
        parts = self._stream_sample.remote(prompt, decodings, seeds, logprobs)
        with translate_errors(parts, "the LLM"):
            async for part in parts:
                if not isinstance(part, dict):
                    early(part)
        # The last part is the pool.
        whole = part
        return whole

    async def score(self, scorer: str, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
        # Every replica has the main one; others are asked for where they are loaded already.
        handle = self.scorer if scorer == self.serving.scorer_name else self.scorer.options(multiplexed_model_id=scorer)
        pairs = (list(instructions), list(responses))
        # Sent again where the replica that had the call was lost: a score depends on nothing but the pair.
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, ApiError) and error.code == UNAVAILABLE),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
            stop=tenacity.stop_after_attempt(_SCORER_TRIES) | tenacity.stop_after_delay(self.serving.scorer_timeout_s),
            before_sleep=lambda _: self.metrics.count_scorer_retry(),
            reraise=True,
        ):
            with attempt:
                scored: Scored = await get_result(handle.score.remote(scorer, *pairs), "the scorer")
        return scored

    async def ready(self) -> dict[str, bool]:
        # Kept for a moment: anyone may ask, as often as they like.
        if self._looking is None or time.monotonic() > self._looked + _READY_KEPT_S:
            self._looking, self._looked = asyncio.ensure_future(self._look()), time.monotonic()
        return await asyncio.shield(self._looking)

    async def _look(self) -> dict[str, bool]:
        both = ((self.llm, self.serving.llm_replicas), (self.scorer, self.serving.scorer_replicas))
        llm, scorer = await asyncio.gather(*(_ready(handle, replicas) for handle, replicas in both))
        return {"llm": llm, "scorer": scorer}


async def _ready(handle: Any, replicas: Scaling) -> bool:
    """Whether a deployment can answer. One that may sleep is not asked, which would keep it awake; asleep it is well."""
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            if replicas.min:
                return bool(await get_result(handle.ready.remote(), "it"))
            status = await asyncio.to_thread(serve.status)
            deployment = status.applications[handle.app_name].deployments[handle.deployment_name]
            return deployment.status.name not in ("UNHEALTHY", "DEPLOY_FAILED")
    except (TimeoutError, ApiError, RayError, RayServeException, KeyError):
        return False


class Gateway:
    """The ingress deployment: `gateway.build_api` over the handles of the other two; `further` names the scorers beside the main one."""

    def __init__(self, config: Config, further: Sequence[str], llm: Any, scorer: Any) -> None:
        self.config, self.further, self.metrics = config, further, Metrics()
        self.backend = ServeBackend(llm, scorer, config.serving, self.metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.config, self.backend, self.further, self.metrics, proxied=True)


def build_application(config: Config) -> serve.Application:
    """Return the graph of `config`. Needs Ray only to see whether the cluster has GPUs for the LLM."""
    serving = config.serving
    common: dict[str, Any] = {
        # A model that cannot load will not load the tenth time either.
        "max_constructor_retry_count": 2,
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        # A replica that is replaced finishes what it took on. (Serve's own shutdown waits half a minute at most.)
        "graceful_shutdown_timeout_s": serving.timeout_s + _PROXY_GRACE_S,
    }
    resources = engines.actor_resources(config.sampler, ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0)
    if serving.llm_gpus is not None:
        resources["num_gpus"] = serving.llm_gpus
    # In an update new replicas answer before old ones stop, except where an LLM would need its GPUs twice.
    surge = {"max_surge_percent": 100}
    # The gateway limits the requests; the margin keeps room for health checks beside them.
    room = serving.max_concurrency + 8
    llm = serve.deployment(LLM).options(
        name="LLM",
        max_ongoing_requests=room,
        ray_actor_options=resources,
        **replica_options(serving.llm_replicas),
        **({} if resources["num_gpus"] else surge),
        **common,
    )
    scorer = serve.deployment(Scorer).options(
        name="Scorer",
        max_ongoing_requests=room,
        ray_actor_options={"num_cpus": 1, "num_gpus": serving.scorer_gpus},
        **replica_options(serving.scorer_replicas),
        **surge,
        **common,
    )
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        name="Gateway",
        # Above the gateway's own limit, so that those it turns away hear it from itself, at once and in OpenAI's shape.
        max_ongoing_requests=4 * (serving.max_concurrency + serving.max_queue) + 16,
        ray_actor_options={"num_cpus": 0},
        **replica_options(serving.gateway_replicas),
        # Its own access log (`serving.access_log`) says more than Serve's.
        logging_config={"encoding": "JSON", "enable_access_log": False},
        **surge,
        **common,
    )
    ledger = storage.absolute(storage.join(config.workspace, "serving", "cost"))
    patience_s = _PATIENCE * serving.timeout_s
    further = additional_scorers(config)
    main = models.absolute(config.scorer_uri)
    scorers = scorer.bind(serving, main, further)
    return gateway.bind(config, tuple(further), llm.bind(config.sampler, patience_s, ledger), scorers)


def application(args: dict[str, Any]) -> serve.Application:
    """Return the graph of a config's plain tree: what a Serve config file imports (`export.py`)."""
    return build_application(Config.model_validate(args))


def replica_options(replicas: Scaling) -> dict[str, Any]:
    """Return how many replicas a deployment has, as Serve's options."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.max}
    scaling = {
        "min_replicas": replicas.min,
        # One even where it may sleep: a model that cannot load is told at the start.
        "initial_replicas": max(1, replicas.min),
        "max_replicas": replicas.max,
        "target_ongoing_requests": replicas.target,
        "upscale_delay_s": replicas.up_after_s,
        "downscale_delay_s": replicas.down_after_s,
    }
    return {"autoscaling_config": scaling}


def http_options(serving: ServingConfig) -> dict[str, Any]:
    """Return where Serve's proxy listens, and when it gives a request up."""
    return {"host": serving.host, "port": serving.port, "request_timeout_s": serving.timeout_s + _PROXY_GRACE_S}
