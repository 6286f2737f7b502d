"""`cappy serve`: check the config, start the graph on an embedded or a joined Ray, serve until a signal."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation

from cluster import artifacts, models, ports, progress, storage
from cluster.config import Config, ServingConfig
from cluster.errors import CappyError, UsageError
from cluster.runtime import find_cappy_error, ray_session
from generation import engines
from serving.app import APPLICATION, build_application, http_options
from serving.backend import ApiError
from serving.client import curl_command
from serving.completions_api import ChatMessage, ChatRequest
from serving.model_registry import additional_scorers
from serving.sampling_policy import select_decodings

# What `training.scorer.CHECKPOINTS` names, without loading torch here.
CHECKPOINTS_FOLDER = "_checkpoints"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_serve(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM, then shut down in order; return where it was and what it served.

    `overwrite` is part of every verb and means nothing here: serving writes nothing. Before any model loads, raises `UsageError` where
    other machines could ask without a key or the limits refuse every request, and `CappyError` where the port, the scorer or the LLM
    is not to be had; after it, `CappyError` where a model does not start.
    """
    serving = config.serving
    check_access_and_limits(config)
    ports.check_port(serving.host, serving.port, "serving.")
    check_scorer(config)
    further = additional_scorers(config)
    engines.check_sampler_config(config.sampler)
    if config.sampler.engine.kind != "endpoint":
        models.resolve(config.sampler.model, "sampler.model")
    url = base_url(serving)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # By default Serve's controller looks at its deployments ten times a second, which takes 2 % of a core, of an LLM's on CPU.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    joined = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))
    progress.log(f"serve: loading {config.sampler.model} and the scorer {config.scorer_uri}")
    # Signals after Ray, whose start installs handlers of its own.
    with ray_session(), _stopped_by_signals():
        try:
            _start(config)
            progress.log(ready_message(config, url, tuple(further)))
            threading.Event().wait()
        except _Stopped:
            progress.log("serve: stopping; requests under way are finished first")
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
    storage.check_uri(uri, "scorer_path")
    ours = any(storage.exists(storage.join(uri, name)) for name in (artifacts.MANIFEST, CHECKPOINTS_FOLDER))
    if ours or not storage.exists(storage.join(uri, "config.json")):
        artifacts.read_manifest(uri, "scorer", "train")
    else:
        models.resolve(uri, "scorer_path")


def ready_message(config: Config, url: str, further: Sequence[str] = ()) -> str:
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


def check_access_and_limits(config: Config) -> None:
    """Raise `UsageError` where other machines could ask without a key, or where the limits refuse every request."""
    _check_access(config.serving)
    _check_limits(config)


def _check_access(serving: ServingConfig) -> None:
    """Refuse to let other machines ask without a key, unless told so."""
    if not ports.is_loopback(serving.host) and not serving.api_keys and not serving.allow_no_keys:
        raise UsageError(
            f"serving.host={serving.host} is reachable from other machines and serving.api_keys is empty; `cappy serve --new-key NAME` "
            f"makes one, or set serving.allow_no_keys=true behind a gateway of your own"
        )


def _check_limits(config: Config) -> None:
    """Refuse limits that a request which asks for nothing special would break."""
    plain = ChatRequest(model=config.serving.model_name, messages=[ChatMessage(role="user", content="hi")])
    try:
        select_decodings(plain, config)
    except ApiError as error:
        raise UsageError(f"every request would be refused: {error}") from None


def _start(config: Config) -> None:
    """Start the proxy and the graph; return once every replica answers."""
    serving = config.serving
    # Serve's logs stay in Ray's session folder; they have routes and statuses, never bodies.
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http_options(serving))
    try:
        serve.run(build_application(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise _start_error(error) from None


def _start_error(error: RuntimeError) -> CappyError:
    """Return what kept a deployment from starting; Serve's own error names the deployment alone."""
    deployments = serve.status().applications[APPLICATION].deployments.values()
    report = "\n".join(deployment.message for deployment in deployments if deployment.status.name == "DEPLOY_FAILED") or str(error)
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return find_cappy_error(RuntimeError(report)) or CappyError(
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
