"""The Serve graph and the verb that runs it: a gateway in front of the LLM and the scorer, on an embedded or a joined Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import tenacity
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException

from cluster import models, ports, progress, storage
from cluster.config import Config, DecodingConfig, Scaling, ServingConfig
from cluster.errors import CappyError, UsageError
from cluster.runtime import clean_error, ray_session
from generation import engines
from generation.prompts import Message
from serving.catalogue import further_scorers
from serving.client import curl_command
from serving.deployments import LLM, UNAVAILABLE, Scorer, answer, answering
from serving.gateway import build_api
from serving.metrics import Metrics
from serving.protocol import ApiError, ChatMessage, ChatRequest, Early, Sampled, Scored, decodings_for

APPLICATION = "cappy"
# What `training.scorer.CHECKPOINTS` names, without loading torch here.
UNFINISHED = "_checkpoints"
_READY_TIMEOUT_S = 5.0
_READY_KEPT_S = 1.0
# A request's own timeout comes first and has OpenAI's shape; the proxy's is there for what never reaches the gateway.
_PROXY_GRACE_S = 10.0
# Times a call of the scorer is sent while its replicas are being lost.
_SCORER_TRIES = 8
# Share of a request's time that it may wait for an endpoint to take it.
_PATIENCE = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Backend:
    """The gateway's models, reached through Serve handles."""

    def __init__(self, llm: Any, scorer: Any, serving: ServingConfig, metrics: Metrics) -> None:
        self.llm, self.scorer, self.serving, self.metrics = llm, scorer, serving, metrics
        self._in_parts = llm.options(stream=True).in_parts
        self._looking: asyncio.Task[dict[str, bool]] | None = None
        self._looked = 0.0

    async def sample(
        self,
        prompt: Sequence[Message] | str,
        decodings: Sequence[DecodingConfig],
        seeds: Sequence[int | None],
        logprobs: bool,
        early: Early | None,
    ) -> Sampled:
        if early is None:
            whole: Sampled = await answer(self.llm.sample.remote(prompt, decodings, seeds, logprobs), "the LLM")
            return whole
        parts = self._in_parts.remote(prompt, decodings, seeds, logprobs)
        with answering(parts, "the LLM"):
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
            before_sleep=lambda _: self.metrics.retried(),
            reraise=True,
        ):
            with attempt:
                scored: Scored = await answer(handle.score.remote(scorer, *pairs), "the scorer")
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
                return bool(await answer(handle.ready.remote(), "it"))
            status = await asyncio.to_thread(serve.status)
            deployment = status.applications[handle.app_name].deployments[handle.deployment_name]
            return deployment.status.name not in ("UNHEALTHY", "DEPLOY_FAILED")
    except (TimeoutError, ApiError, RayError, RayServeException, KeyError):
        return False


class Gateway:
    """The ingress deployment: `gateway.build_api` over the handles of the other two; `further` names the scorers beside the main one."""

    def __init__(self, config: Config, further: Sequence[str], llm: Any, scorer: Any) -> None:
        self.config, self.further, self.metrics = config, further, Metrics()
        self.backend = Backend(llm, scorer, config.serving, self.metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.config, self.backend, self.further, self.metrics, proxied=True)


def build(config: Config) -> serve.Application:
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
    resources = engines.resources(config.sampler, ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0)
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
    further = further_scorers(config)
    main = models.absolute(config.scorer_uri)
    scorers = scorer.bind(serving, main, further)
    return gateway.bind(config, tuple(further), llm.bind(config.sampler, patience_s, ledger), scorers)


def application(args: dict[str, Any]) -> serve.Application:
    """Return the graph of a config's plain tree: what a Serve config file imports (`export.py`)."""
    return build(Config.model_validate(args))


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


def run(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM, then shut down in order; return where it was and what it served.

    `overwrite` is part of every verb and means nothing here: serving writes nothing. Before any model loads, raises `UsageError` where
    other machines could ask without a key or the limits refuse every request, and `CappyError` where the port, the scorer or the LLM
    is not to be had; after it, `CappyError` where a model does not start.
    """
    serving = config.serving
    refuse(config)
    ports.check(serving.host, serving.port, "serving.")
    check_scorer(config)
    further = further_scorers(config)
    engines.check(config.sampler)
    if config.sampler.engine.kind != "endpoint":
        models.resolve(config.sampler.model, "sampler.model")
    url = base_url(serving)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # By default Serve's controller looks at its deployments ten times a second, which takes 2 % of a core, of an LLM's on CPU.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    joined = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))
    progress.say(f"serve: loading {config.sampler.model} and the scorer {config.scorer_uri}")
    # Signals after Ray, whose start installs handlers of its own.
    with ray_session(), _stopped_by_signals():
        try:
            _start(config)
            progress.say(welcome(config, url, tuple(further)))
            threading.Event().wait()
        except _Stopped:
            progress.say("serve: stopping; requests under way are finished first")
        finally:
            _stop(joined)
    return {"uri": url, "model": serving.model_name, "llm": config.sampler.model, "scorer": config.scorer_uri}


def base_url(serving: ServingConfig) -> str:
    """Return the server's URL as this machine reaches it."""
    host = "127.0.0.1" if serving.host == "0.0.0.0" else serving.host
    return f"http://{f'[{host}]' if ':' in host else host}:{serving.port}"


def check_scorer(config: Config) -> None:
    """Raise `CappyError` unless the scorer is one `cappy train` finished, or a model plain transformers saved."""
    uri = config.scorer_uri
    if config.scorer_path and not storage.is_s3(uri) and not storage.exists(uri):
        models.resolve(uri, "scorer_path")  # a hub name, or an error that says what else may stand there
        return
    storage.check(uri, "scorer_path")
    ours = any(storage.exists(storage.join(uri, name)) for name in (storage.MANIFEST, UNFINISHED))
    if ours or not storage.exists(storage.join(uri, "config.json")):
        storage.read_manifest(uri, "scorer", "train")
    else:
        models.resolve(uri, "scorer_path")


def welcome(config: Config, url: str, further: Sequence[str] = ()) -> str:
    """What the operator reads once the server answers; `further` are the scorers beside the main one."""
    serving = config.serving
    body = {"model": serving.model_name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    lines = [
        f"serve: ready at {url}/v1 (OpenAI's API), model {serving.model_name!r}: {config.sampler.model} + {config.scorer_uri}",
        f"  {serving.candidates} candidates a request; to ask from a browser: {url}/; stop with Ctrl-C",
        f"  {curl_command(url, body, key=bool(serving.api_keys))}",
    ]
    if further:
        lines.insert(1, f"  {len(further)} more scorers, loaded when asked for, e.g. model {serving.pair(further[0])!r}")
    if not ports.is_loopback(serving.host) and not serving.api_keys:
        lines.insert(2, f"  note: serving.host={serving.host} is reachable from other machines, and anyone may ask: there are no API keys")
    return "\n".join(lines)


def refuse(config: Config) -> None:
    """Raise `UsageError` where other machines could ask without a key, or where the limits refuse every request."""
    _refuse_open(config.serving)
    _refuse_useless(config)


def _refuse_open(serving: ServingConfig) -> None:
    """Refuse to let other machines ask without a key, unless told so."""
    if not ports.is_loopback(serving.host) and not serving.api_keys and not serving.allow_no_keys:
        raise UsageError(
            f"serving.host={serving.host} is reachable from other machines and serving.api_keys is empty; `cappy serve --new-key NAME` "
            f"makes one, or set serving.allow_no_keys=true behind a gateway of your own"
        )


def _refuse_useless(config: Config) -> None:
    """Refuse limits that a request which asks for nothing special would break."""
    plain = ChatRequest(model=config.serving.model_name, messages=[ChatMessage(role="user", content="hi")])
    try:
        decodings_for(plain, config)
    except ApiError as error:
        raise UsageError(f"every request would be refused: {error}") from None


def http_options(serving: ServingConfig) -> dict[str, Any]:
    """Return where Serve's proxy listens, and when it gives a request up."""
    return {"host": serving.host, "port": serving.port, "request_timeout_s": serving.timeout_s + _PROXY_GRACE_S}


def _start(config: Config) -> None:
    """Start the proxy and the graph; return once every replica answers."""
    serving = config.serving
    # Serve's logs stay in Ray's session folder; they have routes and statuses, never bodies.
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http_options(serving))
    try:
        serve.run(build(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise _why(error) from None


def _why(error: RuntimeError) -> CappyError:
    """Return what kept a deployment from starting; Serve's own error names the deployment alone."""
    deployments = serve.status().applications[APPLICATION].deployments.values()
    report = "\n".join(deployment.message for deployment in deployments if deployment.status.name == "DEPLOY_FAILED") or str(error)
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return clean_error(RuntimeError(report)) or CappyError(
        f"the server did not start: {lines[-1]}; Ray's logs/serve folder has the details"
    )


def _stop(joined: bool) -> None:
    """Take the graph down; on a cluster that others use, only ours."""
    # Serve's controller ends while its own shutdown call is under way, which Ray reports as a failure on standard output.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        if joined:
            serve.delete(APPLICATION)
        else:
            serve.shutdown()


class _Stopped(BaseException):
    """A signal asked the server to end."""


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Have the first SIGINT or SIGTERM raise `_Stopped` in the block, and no second one disturb the shutdown after it."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped

    earlier = {each: signal.signal(each, stop) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
