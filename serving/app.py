"""The Ray Serve application: a gateway deployment in front of an LLM deployment and a scorer deployment.

`serving.app:application` is the import path in exported Serve config files. Does not import torch or the engines' libraries.
"""

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
from serving.readiness import build_probe

APPLICATION = "cappy"
_READY_TIMEOUT_S = 5.0
_READY_KEPT_S = 1.0
# The gateway's timeout answers first, in OpenAI's format. The proxy's timeout is for requests that never reach a gateway.
_PROXY_GRACE_S = 10.0
# Attempts of a scorer call while replicas of the scorer are being lost.
_SCORER_ATTEMPTS = 8
# Share of `serving.timeout_s` that a request may wait before an endpoint accepts it.
_ENDPOINT_WAIT_SHARE = 0.5


class ServeBackend:
    """Call the LLM and the scorers of a gateway through Serve handles."""

    def __init__(self, llm: Any, scorer: Any, serving: ServingConfig, metrics: Metrics) -> None:
        self.llm, self.scorer, self.serving, self.metrics = llm, scorer, serving, metrics
        self._stream_sample = llm.options(stream=True).stream_sample
        self._ready_check: asyncio.Task[dict[str, bool]] | None = None
        self._ready_checked_at = 0.0

    async def sample(
        self,
        prompt: Sequence[Message] | str,
        decodings: Sequence[DecodingConfig],
        seeds: Sequence[int | None],
        logprobs: bool,
        on_finished: OnFinished | None,
    ) -> Sampled:
        """Sample the candidates of one prompt; see `LLM.sample`."""
        if on_finished is None:
            sampled: Sampled = await get_result(self.llm.sample.remote(prompt, decodings, seeds, logprobs), "the LLM")
            return sampled
        parts = self._stream_sample.remote(prompt, decodings, seeds, logprobs)
        with translate_errors(parts, "the LLM"):
            async for part in parts:
                if not isinstance(part, dict):
                    on_finished(part)
        # The last part holds all candidates.
        sampled = part
        return sampled

    async def score(self, scorer: str, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
        """Score pairs with the scorer of that name; send the call again when the replica that runs it is lost."""
        # Every replica holds the main scorer. Serve routes a call for another scorer to a replica that has loaded it.
        handle = self.scorer if scorer == self.serving.scorer_name else self.scorer.options(multiplexed_model_id=scorer)
        pairs = (list(instructions), list(responses))
        # A score depends on the pair alone, so a second call gives the same result.
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, ApiError) and error.code == UNAVAILABLE),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
            stop=tenacity.stop_after_attempt(_SCORER_ATTEMPTS) | tenacity.stop_after_delay(self.serving.scorer_timeout_s),
            before_sleep=lambda _: self.metrics.count_scorer_retry(),
            reraise=True,
        ):
            with attempt:
                scored: Scored = await get_result(handle.score.remote(scorer, *pairs), "the scorer")
        return scored

    async def ready(self) -> dict[str, bool]:
        """Return whether the LLM and the scorer can answer, by name."""
        # The route needs no key, so the result is cached for a short time.
        if self._ready_check is None or time.monotonic() > self._ready_checked_at + _READY_KEPT_S:
            self._ready_check, self._ready_checked_at = asyncio.ensure_future(self._check_ready()), time.monotonic()
        return await asyncio.shield(self._ready_check)

    async def _check_ready(self) -> dict[str, bool]:
        both = ((self.llm, self.serving.llm_replicas), (self.scorer, self.serving.scorer_replicas))
        llm, scorer = await asyncio.gather(*(_is_ready(handle, replicas) for handle, replicas in both))
        return {"llm": llm, "scorer": scorer}


async def _is_ready(handle: Any, replicas: Scaling) -> bool:
    """Return whether a deployment can answer.

    A deployment that may scale to zero gets no call: a call would keep a replica running. It counts as ready unless Serve reports
    it as unhealthy or failed, so at zero replicas it is ready.
    """
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S):
            if replicas.min:
                return bool(await get_result(handle.ready.remote(), "the deployment"))
            status = await asyncio.to_thread(serve.status)
            deployment = status.applications[handle.app_name].deployments[handle.deployment_name]
            return deployment.status.name not in ("UNHEALTHY", "DEPLOY_FAILED")
    except (TimeoutError, ApiError, RayError, RayServeException, KeyError):
        return False


class Gateway:
    """The ingress deployment: the FastAPI app of `gateway.build_api` over the handles of the LLM and the scorer deployment.

    `additional` holds the names of the scorers beside the main scorer.
    """

    def __init__(self, config: Config, additional: Sequence[str], llm: Any, scorer: Any) -> None:
        self.config, self.additional, self.metrics = config, additional, Metrics()
        self.backend = ServeBackend(llm, scorer, config.serving, self.metrics)

    async def answers_test_request(self) -> bool:
        """Send a test request through the graph and return whether it succeeds; True if the config allows none."""
        probe = build_probe(self.config, self.backend)
        return probe is None or await probe.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.config, self.backend, self.additional, self.metrics, proxied=True)


def build_application(config: Config) -> serve.Application:
    """Return the Serve application of `config`.

    Uses Ray, if it is initialized, only to read how many GPUs the cluster has for the LLM.
    """
    serving = config.serving
    common: dict[str, Any] = {
        # A model that fails to load twice does not load at a later attempt.
        "max_constructor_retry_count": 2,
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        # A replaced replica finishes its requests first. (At shutdown Serve waits at most 30 s.)
        "graceful_shutdown_timeout_s": serving.timeout_s + _PROXY_GRACE_S,
    }
    resources = engines.actor_resources(config.sampler, ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0)
    if serving.llm_gpus is not None:
        resources["num_gpus"] = serving.llm_gpus
    # In an update new replicas answer before old ones stop. An LLM on GPUs is excepted: it would need its GPUs twice.
    surge = {"max_surge_percent": 100}
    # The gateway limits the requests; the margin is for health checks.
    max_calls = serving.max_concurrency + 8
    llm = serve.deployment(LLM).options(
        name="LLM",
        max_ongoing_requests=max_calls,
        # A request has one call for each candidate at most: one for each prompt, or for each decoding with `cappy.progress`.
        max_queued_requests=serving.max_concurrency * serving.max_candidates,
        ray_actor_options=resources,
        **replica_options(serving.llm_replicas),
        **({} if resources["num_gpus"] else surge),
        **common,
    )
    scorer = serve.deployment(Scorer).options(
        name="Scorer",
        max_ongoing_requests=max_calls,
        # A request has one call for each candidate or pair at most.
        max_queued_requests=serving.max_concurrency * max(serving.max_candidates, serving.max_pairs),
        ray_actor_options={"num_cpus": 1, "num_gpus": serving.scorer_gpus},
        **replica_options(serving.scorer_replicas),
        **surge,
        **common,
    )
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        name="Gateway",
        **gateway_limits(serving),
        ray_actor_options={"num_cpus": 0},
        **replica_options(serving.gateway_replicas),
        # The gateway writes a more detailed access log (`serving.access_log`).
        logging_config={"encoding": "JSON", "enable_access_log": False},
        **surge,
        **common,
    )
    ledger_uri = storage.absolute(storage.join(config.workspace, "serving", "cost"))
    max_wait_s = _ENDPOINT_WAIT_SHARE * serving.timeout_s
    additional = additional_scorers(config)
    main = models.absolute(config.scorer_uri)
    scorers = scorer.bind(serving, main, additional, config.scorer)
    return gateway.bind(config, tuple(additional), llm.bind(config.sampler, max_wait_s, ledger_uri), scorers)


def gateway_limits(serving: ServingConfig) -> dict[str, int]:
    """Return the limits of Serve for the calls of a gateway replica, as options of the deployment.

    They are above the gateway's own limits: the gateway rejects excess requests immediately, with an error in OpenAI's format. A request
    above the queue of Serve's proxy gets the proxy's own 503.
    """
    calls = 4 * (serving.max_concurrency + serving.max_queue) + 16
    return {"max_ongoing_requests": calls, "max_queued_requests": calls}


def application(args: dict[str, Any]) -> serve.Application:
    """Return the Serve application of a config given as plain dicts: the entry point of an exported Serve config file."""
    return build_application(Config.model_validate(args))


def replica_options(replicas: Scaling) -> dict[str, Any]:
    """Return the number of replicas of a deployment, or its autoscaling, as options of Serve."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.max}
    scaling = {
        "min_replicas": replicas.min,
        # At least one, even with scale to zero: a model that fails to load is then reported at the start.
        "initial_replicas": max(1, replicas.min),
        "max_replicas": replicas.max,
        "target_ongoing_requests": replicas.target,
        "upscale_delay_s": replicas.up_after_s,
        "downscale_delay_s": replicas.down_after_s,
    }
    return {"autoscaling_config": scaling}


def http_options(serving: ServingConfig) -> dict[str, Any]:
    """Return the address and the request timeout of Serve's proxy."""
    return {"host": serving.host, "port": serving.port, "request_timeout_s": serving.timeout_s + _PROXY_GRACE_S}
