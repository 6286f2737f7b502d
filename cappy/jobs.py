"""Run a verb in this process, or as a Ray job on a running cluster.

The function of a verb takes the config (and `overwrite`) and returns its summary as JSON values. It is imported in the process that
runs it, so the command line needs neither torch nor vLLM. A Ray job runs `python -m cappy.jobs VERB`, with its request in the
environment variable `CAPPY_REQUEST`.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tenacity

from cluster import runtime, storage
from cluster.config import Config
from cluster.config.paths import absolute
from cluster.errors import CappyError, UsageError, first_line
from cluster.progress import log
from cluster.runtime import FORWARDED_VARIABLES

VERBS = {
    "generate": "generation.generate:run_generate",
    "extend": "generation.extend:run_extend",
    "annotate": "generation.annotate:run_annotate",
    "train": "training.train:run_train",
    "adapt": "training.adapt:run_adapt",
    "evaluate": "evaluation.evaluate:run_evaluate",
    "suite": "evaluation.suites.run:run_suite",
    "answer": "serving.answer:run_answer",
    "score": "serving.score:run_score",
    "serve": "serving.serve:run_serve",
}

_ROOT = Path(__file__).resolve().parent.parent
_REQUEST = "CAPPY_REQUEST"
_RESULT = "CAPPY_RESULT "
_ERROR = "CAPPY_ERROR "
_EXCLUDED = (".venv", ".git", "runs", "tests", "docs", "benchmarks", "**/__pycache__")


def load_verb(verb: str) -> Callable[..., dict[str, Any]]:
    """Import and return the function of a verb."""
    module, _, name = VERBS[verb].partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def run_verb(verb: str, config: Config, *, overwrite: bool = False, address: str | None = None, **places: str) -> dict[str, Any]:
    """Run a verb in this process, or as a Ray job on the cluster with dashboard `address`; return its summary.

    `address` is e.g. `http://127.0.0.1:8265`. `places` are the URIs that a verb takes beside its config: `src` and `dst`.

    Raises `CappyError` if the verb refuses or fails. Any other exception is a bug.
    """
    if address:
        places = {name: storage.absolute(uri) for name, uri in places.items()}
        request = {"config": absolute(config).model_dump(mode="json"), "overwrite": overwrite, "places": places}
        return submit_job(f"python -m cappy.jobs {verb}", request, address)
    name = "suite" if verb == "evaluate" and config.suite is not None else verb
    try:
        return load_verb(name)(config, overwrite=overwrite, **places)
    except Exception as error:
        clean = runtime.find_cappy_error(error)
        if clean is None or clean is error:
            raise
        raise clean from error


def submit_job(command: str, request: Mapping[str, Any], address: str) -> dict[str, Any]:
    """Run a command with its request as a Ray job on the cluster with dashboard `address`; return the result that it prints.

    The command takes the request by `read_request` and prints its result by `run_in_job`. Raises `CappyError` if the job fails.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--address={address}: give the cluster's dashboard, e.g. http://127.0.0.1:8265")
    variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
    environment: dict[str, Any] = {"env_vars": {**variables, _REQUEST: _encode(request)}}
    if (_ROOT / "pyproject.toml").exists():
        # From a checkout this code is sent to the cluster. An installed package must be installed on the cluster as well.
        environment |= {"working_dir": str(_ROOT), "excludes": list(_EXCLUDED)}
    try:
        client = JobSubmissionClient(address)
        # A new head node answers before it accepts jobs.
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_message(match=".*No available agent"),
            wait=tenacity.wait_fixed(1),
            stop=tenacity.stop_after_delay(60),
            reraise=True,
        ):
            with attempt:
                job = client.submit_job(entrypoint=command, runtime_env=environment)
    except (ConnectionError, RuntimeError) as error:
        raise CappyError(f"--address={address}: no Ray cluster answers there ({first_line(error)}); check `ray status`") from None
    log(f"job {job} on {address}; it continues if you leave (`ray job stop --address {address} {job}` ends it)")
    result, failure = asyncio.run(_follow(client, job))
    if client.get_job_status(job) == JobStatus.SUCCEEDED and result is not None:
        return result
    if failure:
        raise (UsageError if failure["exit_code"] == UsageError.exit_code else CappyError)(failure["message"])
    detail = (client.get_job_info(job).message or "").strip().splitlines()
    raise CappyError(
        f"job {job} on {address} failed: {detail[-1] if detail else 'no message'}; see `ray job logs --address {address} {job}`"
    )


async def _follow(client: Any, job: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Log the output of a job; return its result and its failure, each None if the job did not print it."""
    result = failure = None
    rest = ""
    async for text in client.tail_job_logs(job):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            if line.startswith(_RESULT):
                result = json.loads(line.removeprefix(_RESULT))
            elif line.startswith(_ERROR):
                failure = json.loads(line.removeprefix(_ERROR))
            elif line.strip():
                log(line)
    return result, failure


def main(verb: str) -> int:
    """Run a verb inside a Ray job; return the exit code."""
    request = read_request()
    config = Config.model_validate(request["config"])
    places = {name.upper(): uri for name, uri in request["places"].items()} or {
        "dataset": config.dataset_uri,
        "scorer_path": config.scorer_uri,
        "adapted_path": config.adapted_uri,
        "evaluation_path": config.evaluation_uri,
        "answers_path": config.answers_uri,
    }
    return run_in_job(places, lambda: run_verb(verb, config, overwrite=request["overwrite"], **request["places"]))


def _encode(request: Mapping[str, Any]) -> str:
    """Return a request as a short text: the system limits an environment variable to 128 KiB."""
    return base64.b64encode(zlib.compress(json.dumps(request).encode())).decode()


def read_request() -> dict[str, Any]:
    """Return the request of this Ray job."""
    request: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(os.environ[_REQUEST])))
    return request


def run_in_job(places: Mapping[str, str], work: Callable[[], dict[str, Any]]) -> int:
    """Run `work` inside a Ray job and print its result or its error for `submit_job`; return the exit code.

    `places` are the URIs that it writes, by setting. Local folders are refused on a cluster of several machines.
    """
    try:
        with runtime.ray_session():
            _refuse_local_folders(places)
            result = work()
    except CappyError as error:
        print(_ERROR + json.dumps({"message": str(error), "exit_code": error.exit_code}), flush=True)
        return error.exit_code
    print(_RESULT + json.dumps(result), flush=True)
    return 0


def _refuse_local_folders(places: Mapping[str, str]) -> None:
    """Raise `UsageError` for a local folder on a cluster of several machines: each machine would write a different folder.

    `places` are URIs by setting.
    """
    import ray

    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    for setting, uri in places.items():
        if len(machines) > 1 and not storage.is_s3(uri) and not os.environ.get("CAPPY_SHARED_DISK"):
            raise UsageError(
                f"{setting}={uri} is a local folder and the cluster has {len(machines)} machines; use an s3:// workspace, "
                f"or set CAPPY_SHARED_DISK=1 on them where that folder is mounted on all"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
