"""Ray, started here or joined: the one place that calls `ray.init`."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tenacity

from cluster.cpu import openmp_environment
from cluster.errors import CappyError, UsageError
from cluster.progress import log, silence_stderr


@contextmanager
def ray_session() -> Iterator[None]:
    """Have Ray initialised inside the block: joined where `RAY_ADDRESS` says (a Ray job), else embedded in this process.

    An embedded Ray ends with the block; one that was already initialised is left as it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    openmp_environment()  # embedded workers inherit it
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, object] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        # Logical CPUs are bookkeeping: two more than the machine has, so that one-CPU workers on a two-core laptop cannot
        # starve the tasks that feed them. Not `local`, and another cluster that happens to run on this machine would be joined.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": (os.cpu_count() or 1) + 2}
    # Ray gives a node half a minute to start, which an overloaded machine may not manage.
    patience = tenacity.retry(
        retry=tenacity.retry_if_exception_message(match=".*timed out during startup"), stop=tenacity.stop_after_attempt(3), reraise=True
    )
    with silence_stderr():  # it announces the log level set above on standard error; what fails raises
        patience(ray.init)(**options)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def on_sigterm(news: str, act: Callable[[], Any]) -> Iterator[threading.Event]:
    """Say `news` and call `act` once on SIGTERM inside the block; the event says whether one came."""
    told, over = threading.Event(), threading.Event()

    def obey() -> None:
        # Not in the handler: that may have interrupted Ray itself.
        told.wait()
        if not over.is_set():
            log(f"SIGTERM: {news}")
            act()

    threading.Thread(target=obey, name="cappy-stop", daemon=True).start()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set()) if main else None
    try:
        yield told
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        if not told.is_set():
            over.set()
            told.set()


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version of this code for manifests: the package's, and the git commit where it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version("cappy-ray")
    asked = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"{version('cappy-ray')}+{asked.stdout.strip()}" if asked.returncode == 0 else version("cappy-ray")


def find_cappy_error(error: BaseException) -> CappyError | None:
    """Return the `CappyError` behind an exception Ray wrapped, or None where there is none.

    Ray keeps a task's exception as `cause`, in an error of its own that is a `CappyError` too but says the worker's whole
    traceback; of an actor that failed to start it keeps the text alone.
    """
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        if isinstance(seen, CappyError) and cause is None:
            return seen
        seen = cause or seen.__cause__
    found = re.findall(r"(CappyError|UsageError): (.+)", str(error))
    if not found:
        return None
    kind, message = found[-1]
    return (UsageError if kind == "UsageError" else CappyError)(message.strip())


# Where a store is, but never who we are: nodes have credentials of their own (a role, or their environment).
FORWARDED_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "CAPPY_CACHE", "HF_HUB_OFFLINE")
