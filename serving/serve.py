"""`cappy serve`: check the config, start the Serve application on an embedded or an existing Ray, serve until a signal.

Does not import torch: models load in the replicas.
"""

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
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client

from cluster import models, ports, progress, storage
from cluster.config import Config, ServingConfig
from cluster.errors import CappyError, UsageError
from cluster.runtime import find_cappy_error, ray_session
from generation import engines
from serving.app import APPLICATION, build_application, http_options
from serving.backend import ApiError
from serving.client import curl_command
from serving.completions_api import ChatRequest
from serving.messages import ChatMessage
from serving.model_registry import additional_scorers
from serving.sampling_policy import select_decodings
from training.main_scorer import check_scorer, with_default_scorer

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_serve(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM, then finish running requests and shut down; return the URL and the names of the models.

    `overwrite` is in the signature of every verb and has no effect here: serving writes no output folder.

    Raises `UsageError` if other machines could send requests without a key, or if the limits refuse every request. Raises `CappyError`
    if the port is in use or if the scorer or the LLM cannot be found. These checks run before a model loads. Raises `CappyError` also
    if a model does not start.
    """
    serving = config.serving
    check_access_and_limits(config)
    config = with_default_scorer(config)
    joined = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))
    port_error = None
    try:
        ports.check_port(serving.host, serving.port, "serving.")
    except CappyError as error:
        # On an existing cluster the port may be in use by the proxy of the Serve that this server joins.
        if not joined:
            raise
        port_error = error
    check_scorer(config)
    if serving.log_candidates:
        storage.check_uri(serving.log_candidates, "serving.log_candidates")
    additional = additional_scorers(config)
    engines.check_sampler_config(config.sampler)
    if config.sampler.engine.kind != "endpoint":
        models.resolve(config.sampler.model, "sampler.model")
    url = base_url(serving)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # By default Serve's controller checks its deployments every 0.1 s, which uses 2 % of a core that an LLM on CPU needs.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    progress.log(f"serve: loading {config.sampler.model} and the scorer {config.scorer_uri}")
    # Ray installs signal handlers when it starts, so the handlers of this process come after it.
    with ray_session(), _stop_on_signals():
        if joined:
            check_proxy_address(serving, running_http_options(), port_error)
        try:
            _start(config)
            progress.log(ready_message(config, url, tuple(additional)))
            threading.Event().wait()
        except _StopSignal:
            progress.log("serve: stopping after the running requests are finished")
        finally:
            _stop(joined)
    return {"uri": url, "model": serving.model_name, "llm": config.sampler.model, "scorer": config.scorer_uri}


def base_url(serving: ServingConfig) -> str:
    """Return the server's URL for clients on this machine."""
    host = "127.0.0.1" if serving.host == "0.0.0.0" else serving.host
    return f"http://{f'[{host}]' if ':' in host else host}:{serving.port}"


def ready_message(config: Config, url: str, additional: Sequence[str] = ()) -> str:
    """Return the log message for the moment when the server answers; `additional` holds the scorers beside the main scorer."""
    serving = config.serving
    body = {"model": serving.model_name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    lines = [
        f"serve: ready at {url}/v1 (OpenAI's API), model {serving.model_name!r}: {config.sampler.model} + {config.scorer_uri}",
        f"  {serving.candidates} candidates per request; web page: {url}/; stop with Ctrl-C",
        f"  {curl_command(url, body, key=bool(serving.api_keys))}",
    ]
    if additional:
        lines.insert(
            1, f"  {len(additional)} more scorers, loaded at the first request for each, e.g. model {serving.pair(additional[0])!r}"
        )
    if not ports.is_loopback(serving.host) and not serving.api_keys:
        lines.insert(
            2, f"  note: serving.host={serving.host} is reachable from other machines, and requests need no key: serving.api_keys is empty"
        )
    return "\n".join(lines)


def check_access_and_limits(config: Config) -> None:
    """Raise `UsageError` if other machines could send requests without a key, or if the limits refuse every request."""
    _check_access(config.serving)
    _check_limits(config)


def _check_access(serving: ServingConfig) -> None:
    """Raise `UsageError` if other machines could send requests without a key and `serving.allow_no_keys` is false."""
    if not ports.is_loopback(serving.host) and not serving.api_keys and not serving.allow_no_keys:
        raise UsageError(
            f"serving.host={serving.host} is reachable from other machines and serving.api_keys is empty; make a key with "
            f"`cappy serve --new-key NAME`, or set serving.allow_no_keys=true if another gateway checks the clients"
        )


def _check_limits(config: Config) -> None:
    """Raise `UsageError` if the limits refuse a request that sets only `model` and `messages`."""
    plain = ChatRequest(model=config.serving.model_name, messages=[ChatMessage(role="user", content="hi")])
    try:
        select_decodings(plain, config)
    except ApiError as error:
        raise UsageError(f"the server would refuse every request: {error}") from None


def running_http_options() -> HTTPOptions | None:
    """Return the options of the proxy of the Serve that runs on this Ray cluster, None if none runs."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return client and client.http_config


def check_proxy_address(serving: ServingConfig, running: HTTPOptions | None, port_error: CappyError | None = None) -> None:
    """Raise `CappyError` if Serve runs already and its proxy has another address than the config.

    Serve would ignore the config's address, so the checks of host and keys would not hold. Without a running Serve, `port_error`, the
    error of the port's check, is raised if there is one.
    """
    if running is None:
        if port_error is not None:
            raise port_error
    elif (running.host, running.port) != (serving.host, serving.port):
        raise CappyError(
            f"serving.host={serving.host} and serving.port={serving.port}, but the cluster's Serve runs already and its proxy listens on "
            f"{running.host}:{running.port}; set serving.host and serving.port to that address, or run `serve shutdown` first"
        )


def _start(config: Config) -> None:
    """Start the proxy and the application; return when every replica answers and a test request has succeeded.

    Raises `CappyError` if a replica does not start or the test request fails.
    """
    # Serve's logs stay in Ray's session folder. They hold routes and statuses, never bodies.
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http_options(config.serving))
    try:
        handle = serve.run(build_application(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise _start_error(error) from None
    if not handle.answers_test_request.remote().result():
        raise CappyError(
            f"the server started, but a test request failed (serving.probe_timeout_s={config.serving.probe_timeout_s:g}); "
            "see the logs/serve folder of Ray's session for the reason, or set serving.probe_s=null to start without one"
        )


def _start_error(error: RuntimeError) -> CappyError:
    """Return the reason why a deployment did not start; Serve's error holds only the name of the deployment."""
    deployments = serve.status().applications[APPLICATION].deployments.values()
    report = "\n".join(deployment.message for deployment in deployments if deployment.status.name == "DEPLOY_FAILED") or str(error)
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return find_cappy_error(RuntimeError(report)) or CappyError(
        f"the server did not start: {lines[-1]}; see the logs/serve folder of Ray's session for details"
    )


def _stop(joined: bool) -> None:
    """Shut Serve down; on an existing cluster delete only this application."""
    # Serve's controller exits during its own shutdown call, and Ray reports that as a failure on standard output.
    with Path(os.devnull).open("w") as devnull, redirect_stdout(devnull):
        if joined:
            serve.delete(APPLICATION)
        else:
            serve.shutdown()


class _StopSignal(BaseException):
    """The server received SIGINT or SIGTERM."""


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Raise `_StopSignal` in the block at the first SIGINT or SIGTERM; ignore later ones, so that the shutdown completes."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _StopSignal

    earlier = {each: signal.signal(each, stop) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
