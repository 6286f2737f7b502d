"""Start or join Ray, handle SIGTERM, and unwrap errors of Ray. Only this module calls `ray.init`."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tenacity

from cluster.cpu import openmp_environment
from cluster.embedded_ray import private_ray
from cluster.errors import CappyError, UsageError, describe_disk_error, find_disk_error
from cluster.progress import log, silence_stderr


@contextmanager
def ray_session() -> Iterator[None]:
    """Initialise Ray for the block: join the cluster at `RAY_ADDRESS` (in a Ray job), else start Ray in this process.

    A Ray started here ends with the block, and listens on loopback addresses only. If Ray is already initialised, nothing changes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # The first error of a task is raised. Ray would print those of the other tasks as tracebacks.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    openmp_environment()  # workers started here inherit it
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, object] = {"logging_level": logging.ERROR, "log_to_driver": False}
    embedded = not os.environ.get("RAY_ADDRESS")
    if embedded:
        # Logical CPUs are only scheduling slots. Two more than the machine has keep one-CPU workers on a two-core machine from
        # starving the tasks that provide their input. Without `local`, Ray would join another cluster on this machine.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": (os.cpu_count() or 1) + 2}
    # A node must start within half a minute, which can be too short on an overloaded machine.
    patience = tenacity.retry(
        retry=tenacity.retry_if_exception_message(match=".*timed out during startup"), stop=tenacity.stop_after_attempt(3), reraise=True
    )
    with private_ray() if embedded else nullcontext():
        with silence_stderr():  # Ray prints the log level to standard error; failures raise
            patience(ray.init)(**options)
        try:
            yield
        finally:
            ray.shutdown()


_SIGTERM = threading.Event()
"""Set if a SIGTERM came inside a block of `on_sigterm`."""


def watch_sigterm() -> threading.Event:
    """Return an event that a SIGTERM inside a block of `on_sigterm` sets from now on. A verb that was at its end returns normally."""
    _SIGTERM.clear()  # a process can continue after an earlier SIGTERM, for example a notebook
    return _SIGTERM


@contextmanager
def on_sigterm(message: str, act: Callable[[], Any]) -> Iterator[threading.Event]:
    """Log `message` and call `act` once on SIGTERM inside the block. The event is set if a SIGTERM came."""
    received, finished = threading.Event(), threading.Event()

    def act_on_signal() -> None:
        # Not in the signal handler: the handler can interrupt Ray itself.
        received.wait()
        if not finished.is_set():
            log(f"SIGTERM: {message}")
            act()

    threading.Thread(target=act_on_signal, name="cappy-stop", daemon=True).start()
    main = threading.current_thread() is threading.main_thread()

    def on_signal(*_: object) -> None:
        received.set()
        _SIGTERM.set()

    before = signal.signal(signal.SIGTERM, on_signal) if main else None
    try:
        yield received
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        if not received.is_set():
            finished.set()
            received.set()


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the version of this code: the version of the package, with the git commit in a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version("cappy-ray")
    described = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"{version('cappy-ray')}+{described.stdout.strip()}" if described.returncode == 0 else version("cappy-ray")


def find_cappy_error(error: BaseException) -> CappyError | None:
    """Return the `CappyError` inside an exception of Ray, or None if there is none. A full or broken disk gives one too.

    Ray wraps the exception of a task, as `cause`, in an error that is a `CappyError` too. Its message is the whole traceback of
    the worker. Of an actor that failed to start, Ray keeps only the text.
    """
    seen: BaseException | None = error
    full: OSError | None = None
    while seen is not None:
        cause = getattr(seen, "cause", None)
        if isinstance(seen, CappyError) and cause is None:
            return seen
        full = find_disk_error(seen) or full
        seen = cause or seen.__cause__
    found = re.findall(r"(CappyError|UsageError): (.+)", str(error))
    if not found:
        place = full and (full.filename or f"a temporary file in TMPDIR={tempfile.gettempdir()}")
        return CappyError(describe_disk_error(full, str(place))) if full else None
    kind, message = found[-1]
    return (UsageError if kind == "UsageError" else CappyError)(message.strip())


# Address and region of the store, but no credentials: nodes have separate credentials, by a role or by their environment.
FORWARDED_VARIABLES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("CAPPY_CACHE", "CAPPY_CACHE_LIMIT_GB", "HF_HUB_OFFLINE"),
)
