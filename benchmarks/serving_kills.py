"""Kill replicas of a server under load, and update it with requests in flight; count the requests that fail.

    python -m benchmarks.serving_kills --json -

`cappy serve` runs as in `benchmarks.serving`, under an open loop at a share (`--rate`) of its capacity. With `--set
serving.fallback=self_score --set serving.scorer_timeout_s=8`, the LLM's likelihood chooses if no scorer answers in time. Such requests
count as answered, and `fallbacks` counts them.

- `scorer_1`, `scorer_2`, `scorer_3`: 1, 2 or 3 scorer replicas. Every five seconds the oldest running replica gets SIGKILL, if Serve has
  one running. With one replica, and often with two, none is running at that time, and requests wait for the next replica. All requests
  must be answered. `slowest_s` is the largest latency; `down` is the share of the checks that found no running replica.
- `llm`: eight concurrent requests, and half a second later the LLM replica gets SIGKILL. Only requests in flight at that time may fail,
  with 503. `recovery_s` is the time from the kill to the first answer to a later request. `engines_left` counts the processes of the
  killed replica's engine that still run 15 s after the load.
- `update`: 50 concurrent requests, and a second later every deployment gets a changed setting, under load. Another process calls
  `serve.run`, as `serve deploy` does. All requests must be answered. `longest_gap_s` is the longest time without any answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve

from benchmarks import servers, serving
from benchmarks.load import Answer, arrivals, closed_loop_rate, open_loop
from cluster.config import Config
from cluster.embedded_ray import private_ray
from cluster.progress import log
from serving import app

_KILL_EVERY_S = 5.0
_LLM_KILL_S = 15.0
_LLM_HAS = 8
_AT_ONCE = 50
_ENGINE_ENDS_S = 15.0


def failures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the counts of answers, failures (also by status and code) and fallbacks, with one error message as an example (`told`)."""
    bad = serving.failed(answers)
    errors = [each.tree.get("error", {}) for each in bad]
    kinds = Counter(f"{each.status} {error.get('code')}" for each, error in zip(bad, errors, strict=True))
    fallbacks = sum(bool(each.tree.get("cappy", {}).get("fallback")) for each in answers)
    counts = {"answers": len(answers), "failed": len(bad), "fallbacks": fallbacks}
    return {**counts, **({"kinds": dict(kinds), "told": errors[0].get("message")} if bad else {})}


async def scorers_killed(server: servers.Server, bodies: list[Any], moments: list[float]) -> dict[str, Any]:
    loading = asyncio.create_task(open_loop(server.chat, bodies, moments))
    kills, checks = 0, int(moments[-1] / _KILL_EVERY_S)
    for _ in range(checks):
        await asyncio.sleep(_KILL_EVERY_S)
        # The oldest replica is a running one, because starting replicas are younger. So every killed replica has served.
        if await asyncio.to_thread(running, "Scorer"):
            server.of("scorer")[0].kill()
            kills += 1
    answers = await loading
    slowest = round(max(serving.latencies(answers)), 2)
    return {"kills": kills, "down": round(1 - kills / checks, 2), **failures(answers), "slowest_s": slowest}


async def llm_killed(server: servers.Server, bodies: list[Any], moments: list[float]) -> dict[str, Any]:
    start = time.perf_counter()
    loading = asyncio.create_task(open_loop(server.chat, bodies, sorted([*moments, *[_LLM_KILL_S - 0.5] * _LLM_HAS])))
    await asyncio.sleep(_LLM_KILL_S)
    (replica,) = server.of("llm")
    engines = replica.children(recursive=True)
    replica.kill()
    killed = time.perf_counter() - start
    log(f"killed the LLM's replica after {killed:.1f} s")
    answers = await loading
    later = [each.due + each.latency for each in answers if each.due > killed and each.status == 200]
    bad = serving.failed(answers)
    left = psutil.wait_procs(engines, timeout=_ENGINE_ENDS_S)[1]
    return {
        **failures(answers),
        "under_way": sum(each.due < killed < each.due + each.latency for each in answers),
        "failed_sent_later": sum(each.due > killed for each in bad),
        "recovery_s": round(min(later) - killed, 1) if later else None,
        "engines_left": len(left),
    }


async def updated(server: servers.Server, bodies: list[Any], moments: list[float], config: Config) -> dict[str, Any]:
    start = time.perf_counter()
    before = set(server.family())
    loading = asyncio.create_task(open_loop(server.chat, bodies, [0.0] * _AT_ONCE + moments))
    await asyncio.sleep(1)
    await asyncio.to_thread(serve.run, app.build_application(config), name=app.APPLICATION, route_prefix="/")
    took = time.perf_counter() - start - 1
    log(f"the update took {took:.1f} s")
    answers = await loading
    new = {role for pid, (role, _) in server.family().items() if pid not in before}
    ends = sorted(each.due + each.latency for each in answers if each.status == 200)
    return {
        **failures(answers),
        "updated": {"gateway", "llm", "scorer"} <= new,
        "update_s": round(took, 1),
        "in_flight": sum(each.due + each.latency > 1 for each in answers[:_AT_ONCE]),
        "longest_gap_s": round(max(two - one for one, two in pairwise(ends)), 2),
        "slowest_s": round(max(serving.latencies(answers)), 2),
    }


@contextmanager
def joined(server: servers.Server) -> Iterator[None]:
    """Join the server's Ray inside the block."""
    words = []
    for _, process in server.family().values():
        with suppress(psutil.Error):
            words += process.cmdline()
    address = next(word.removeprefix("--gcs-address=") for word in words if word.startswith("--gcs-address="))
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with private_ray():  # otherwise Ray replaces the loopback address by that of the machine, where the server's Ray does not listen
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def running(deployment: str) -> int:
    """Return the number of running replicas of a deployment."""
    return int(serve.status().applications[app.APPLICATION].deployments[deployment].replica_states.get("RUNNING", 0))


def with_settings(config: Config, **settings: Any) -> Config:
    """Return a config with changed settings; a dict changes only the given settings of a section."""
    tree = config.model_dump(mode="json")
    for name, value in settings.items():
        tree[name] = {**tree[name], **value} if isinstance(value, dict) else value
    return Config.model_validate(tree)


def run_victims(config: Config, folder: Path, prompts: serving.Prompts, options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def note(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        log(f"{name}: {result}")

    for count in (1, 2, 3):
        wanted = [name for name in options.victims if name == f"scorer_{count}" or (count == 2 and name in ("llm", "update"))]
        if not wanted:
            continue
        served = with_settings(config, serving={"scorer_replicas": count, "max_queue": 2 * _AT_ONCE})
        with servers.ours(served, folder) as server, joined(server):
            # /health needs one replica. Serve stops a deployment whose replicas fail before all have run once.
            while running("Scorer") < count:
                time.sleep(0.5)
            rate = serving.RATES[options.rate] * closed_loop_rate(serving.saturate(server, prompts.ours, options), options.clients)
            log(f"{rate:.2f} requests per second")
            for name in wanted:
                moments = arrivals(rate, options.seconds, options.seed)
                bodies = prompts.ours(len(moments) + _AT_ONCE)
                if name == "llm":
                    note(name, asyncio.run(llm_killed(server, bodies, moments)))
                elif name == "update":
                    shutil.copytree(folder / "scorer", folder / "scorer-2")
                    other = with_settings(
                        served,
                        serving={"candidates": served.serving.candidates + 1},
                        sampler={"engine": {**served.sampler.engine.model_dump(), "max_num_seqs": 48}},
                        scorer_path=str(folder / "scorer-2"),
                    )
                    note(name, asyncio.run(updated(server, bodies, moments, other)))
                else:
                    note(name, asyncio.run(scorers_killed(server, bodies, moments)))
                servers.wait_healthy(server)
    return results


def main() -> int:
    made = serving.parser()
    made.description = __doc__.splitlines()[0] if __doc__ else None
    victims = ("scorer_1", "scorer_2", "scorer_3", "llm", "update")
    made.add_argument("--victims", nargs="+", choices=victims, default=list(victims))
    made.set_defaults(rate="light", seconds=120.0)
    options = made.parse_args()
    with tempfile.TemporaryDirectory(prefix="cappy-serving-kills-") as name:
        config, prompts = serving.prepare(options, Path(name))
        results = run_victims(config, Path(name), prompts, options)
    for name, result in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result.items()))
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
