"""Kill or pause the processes of `cappy generate` or `cappy answer` at random times; count lost rows and rows sampled twice.

    python -m benchmarks.kills --kills 10 --workspace s3://bucket/kills --json -
    python -m benchmarks.kills --verb answer --kills 10 --kills-per-run 5 --json -
    python -m benchmarks.kills --verb answer --real --kills 1 --rows 12 --unit-rows 3 --json -

Victims are the driver, a sampling actor, a scoring actor (of `answer`) and the worker node of the sampling actor. The runs use one Ray
cluster, a head without CPUs and two worker nodes. The LLM and the scorer need no weights. A request takes half a second, and the scores of
a unit take 0.2 seconds. A killed driver is started again with the same command; Ray replaces a killed actor or node. Afterwards the
published rows must equal those of an undisturbed run, as a multiset. A row counts as sampled twice if it is sampled after its unit was
found in the store. The store is listed ten times per second. `changed` counts rows of such units that are published with other responses.
`engines_left` counts the processes below a killed sampling actor that still run at the end.

With `--real` the LLM is SmolLM2 on vLLM, with three candidates of up to 16 tokens, and the scorer is `cappy-minilm`. Rows that vLLM
computes again in another batch can differ by rounding. So only ids and numbers of candidates must be equal to those of the undisturbed
run, and nothing may be `changed`.

A paused driver has its own Ray, and gets SIGSTOP with all its processes. The same command then runs a second time; it takes the lease
after the silence limit and publishes. The paused processes then get SIGCONT. Until the first run has ended, every file of the published
folder is verified repeatedly. Rows that the paused run had sampled without saving their unit do not count as sampled twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.killed_verbs import VERBS, Call, Pools, as_multiset, changed_pools, drive, pool_sizes, read_calls, sampled_pools, scorer_log
from cluster import artifacts, storage
from cluster.progress import Bar
from cluster.progress import log as log_line
from generation import units

VICTIMS = {"generate": ("driver", "sampler", "node", "pause"), "answer": ("driver", "sampler", "scorer", "node", "pause")}
_SETTINGS = ["sampler.prompt.form=raw", "generate.shard_mib=1"]
_REAL_SETTINGS = [
    *("sampler.model=smollm2-135m-instruct", "sampler.decodings=[{name: greedy, temperature: 0, max_tokens: 16}, {n: 2, max_tokens: 16}]"),
    "generate.shard_mib=1",
]
_ENGINE_ENDS_S = 15.0
_ACTORS_END_S = 3.0
"""Time after which the cluster has ended the actors of a killed driver or node, in seconds."""


@dataclass(frozen=True)
class Trial:
    """The runs of one verb with the same rows and settings."""

    verb: str
    real: bool
    settings: tuple[str, ...]
    limit_s: float
    """Largest duration of a run, in seconds."""

    def launch(self, place: str, log: Path, address: str | None = None) -> subprocess.Popen[bytes]:
        """Start the driver in a separate process group."""
        environment = {**os.environ, **({"RAY_ADDRESS": address} if address else {})}
        given = json.dumps([self.verb, place, str(log), self.real, self.settings])
        with Path(f"{log}.stderr").open("a") as told:
            command = [sys.executable, "-m", "benchmarks.kills", "--drive", given]
            return subprocess.Popen(command, env=environment, start_new_session=True, stderr=told)


class CommitWatcher:
    """Record when each sampled unit was first found in the store, and the responses of its rows."""

    def __init__(self, place: str, folder: str) -> None:
        self.committed: dict[str, float] = {}
        self.pools: Pools = {}
        self._folder, self._seen, self._over = storage.join(place, "_staging", folder), set[str](), threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._over.wait(0.1):
            names = {name for name in storage.list_files(self._folder) if name.endswith(".parquet")}
            for name in names - self._seen:
                now = time.time()
                try:
                    pools = sampled_pools(units.read_unit(storage.join(self._folder, name)))
                except FileNotFoundError:  # merged and removed meanwhile
                    continue
                self._seen.add(name)
                self.pools |= pools
                self.committed.update(dict.fromkeys(pools, now))

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def one_run(trial: Trial, nodes: Nodes, victim: str, place: str, folder: Path, moments: Sequence[float]) -> dict[str, Any]:
    """Run the verb to its end, with a kill at each of the moments; return the outcome.

    The first moment is in seconds after the first work of the victim, and each other one after the first work that follows a kill.
    """
    log, verb = folder / "log", VERBS[trial.verb]
    watched = scorer_log(log) if victim == "scorer" else log
    watch = CommitWatcher(place, verb.sampled)
    # The actors of a paused driver are paused too, so they must be its own processes.
    address = None if victim == "pause" else nodes.address
    driver = trial.launch(place, log, address)
    engines: list[psutil.Process] = []
    midway, code, damage, first_code, before = 0, None, list[str](), None, 0.0
    for moment in moments:
        if _wait_for_work(watched, before, driver, trial.limit_s):
            time.sleep(moment)
        # The processes of a killed node can work for some seconds more.
        calls = [call for call in read_calls(watched) if victim == "pause" or nodes.is_alive(call.node)]
        if driver.poll() is not None or not calls:
            break
        newest, before = calls[-1], time.time()
        if victim in ("sampler", "node"):
            engines += _children(newest)
        if victim == "pause":
            code, damage, first_code = _pause(driver, trial, log, place)
        elif victim == "driver":
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            driver = trial.launch(place, log, address)
        elif victim == "node":
            nodes.kill(newest.node)
        else:
            with suppress(ProcessLookupError):  # the work of the actor is over
                os.kill(newest.pid, signal.SIGKILL)
        before += _ACTORS_END_S if victim in ("driver", "node") else 0.0
        midway += 1
        nodes.restore()
    if code is None:
        code = driver.wait(trial.limit_s)
    watch.end()
    _, left = psutil.wait_procs(engines, timeout=_ENGINE_ENDS_S)
    for problem in damage:
        log_line(f"{victim}: {problem}")
    if code:
        log_line(f"{victim}: exit code {code}: {Path(f'{log}.stderr').read_text()[-2000:]}")
    rows = verb.read(place) if code == 0 else None
    changed = changed_pools(watch.pools, rows) if rows is not None else []
    for row in changed:
        log_line(f"{victim}: the published responses of row {row} are not those of its unit")
    return {
        "victim": victim,
        "first_code": first_code,
        "midway": midway,
        "rows": rows,
        "committed": len(watch.committed),
        "sampled_twice": sum(call.moment > watch.committed.get(call.row, float("inf")) for call in read_calls(log)),
        "changed": len(changed),
        "damage": damage,
        "engines_left": len(left),
    }


def _wait_for_work(log: Path, after: float, driver: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Wait for a call after a time, or for the end of the driver; return whether there was a call."""
    deadline = time.monotonic() + limit_s
    while driver.poll() is None and time.monotonic() < deadline:
        if any(call.moment > after for call in read_calls(log)[-1:]):
            return True
        time.sleep(0.1)
    return False


def _children(call: Call | None) -> list[psutil.Process]:
    """Return the processes that the actor of a call started."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(call.pid).children(recursive=True) if call else []
    return []


def _pause(driver: subprocess.Popen[bytes], trial: Trial, log: Path, place: str) -> tuple[int, list[str], int]:
    """Pause a driver and its processes until a second run has published, then resume them.

    Return the exit code of the second run, each problem that its published files had until the first run ended, and the exit code of the
    first run.
    """
    paused = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    _send(paused, signal.SIGSTOP)
    code = trial.launch(place, log).wait(trial.limit_s)
    manifest = _manifest(place) if code == 0 else None
    _send(paused, signal.SIGCONT)
    damage: list[str] = []
    deadline = time.monotonic() + trial.limit_s
    while manifest and driver.poll() is None and time.monotonic() < deadline:
        damage += [problem for problem in artifacts.verify(place, manifest) if problem not in damage]
        time.sleep(0.2)
    first_code = driver.wait(trial.limit_s)
    if manifest:
        damage += [problem for problem in artifacts.verify(place, manifest) if problem not in damage]
        damage += [] if _manifest(place) == manifest else ["the manifest changed"]
    return code, damage, first_code


def _manifest(place: str) -> Any:
    return storage.read_json(storage.join(place, artifacts.MANIFEST))


def _send(processes: list[psutil.Process], signal_: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal_)


class Nodes:
    """A Ray cluster of this machine, for all runs of the benchmark: a head without CPUs and two worker nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self._workers = [self._add() for _ in range(2)]
        self.address: str = self._cluster.address

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=3)

    def is_alive(self, node: str) -> bool:
        """Return whether the worker node with this id was not killed."""
        return any(worker.node_id == node for worker in self._workers)

    def kill(self, node: str) -> None:
        """Kill the worker node with this id."""
        killed = next(worker for worker in self._workers if worker.node_id == node)
        self._cluster.remove_node(killed, allow_graceful=False)
        self._workers.remove(killed)

    def restore(self) -> None:
        """Start a worker node for each killed one."""
        while len(self._workers) < 2:
            self._workers.append(self._add())

    def end(self) -> None:
        self._cluster.shutdown()


def summarize(results: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of the runs of one victim; `expected` are the rows of the undisturbed run."""
    known = [each["rows"] for each in results if each["rows"] is not None]
    return {
        "kills": sum(each["midway"] for each in results),
        "runs": len(results),
        "same_rows": sum(as_multiset(rows) == as_multiset(expected) for rows in known),
        "same_ids": sum(pool_sizes(rows) == pool_sizes(expected) for rows in known),
        "committed": sum(each["committed"] for each in results),
        "sampled_twice": sum(each["sampled_twice"] for each in results),
        "changed": sum(each["changed"] for each in results),
        "damaged": sum(bool(each["damage"]) for each in results),
        "refused": sum(bool(each["first_code"]) for each in results),
        "engines_left": sum(each["engines_left"] for each in results),
    }


def _describe(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items())


def kept(counts: dict[str, Any], real: bool) -> bool:
    """Return whether no kill lost, changed or damaged anything."""
    equal = counts["same_ids" if real else "same_rows"] == counts["runs"]
    return equal and not any(counts[name] for name in ("sampled_twice", "changed", "damaged", "engines_left"))


def measure_unbroken(trial: Trial, nodes: Nodes, place: str, log: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run the verb undisturbed; return its rows, and the seconds in which each log was written (`sampler`, `scorer`).

    The time of the LLM ends with that of the scorer, so that a kill can come while the last units are scored.
    """
    assert trial.launch(place, log, nodes.address).wait(trial.limit_s) == 0, Path(f"{log}.stderr").read_text()[-2000:]
    sampled, scored = ([call.moment for call in read_calls(each)] for each in (log, scorer_log(log)))
    end = max([max(sampled) + 0.5, *scored])
    spans = {"sampler": end - min(sampled), "scorer": end - min(scored, default=end)}
    log_line(f"unbroken: {spans['sampler']:.1f} s from the first sample to the last unit")
    return VERBS[trial.verb].read(place), spans


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--verb", choices=tuple(VERBS), default="generate")
    parser.add_argument("--kills", type=int, default=10, help="kills of each kind of victim")
    parser.add_argument("--kills-per-run", type=int, default=1, help="kills of one kind of victim in one run")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--unit-rows", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS["answer"], help="default: all")
    parser.add_argument("--real", action="store_true", help="sample with SmolLM2 on vLLM")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a setting of the runs")
    parser.add_argument("--workspace", help="a folder or s3:// prefix; a temporary folder by default")
    parser.add_argument("--drive", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    if options.drive:
        drive(*json.loads(options.drive))
        return 0
    victims = options.victims or VICTIMS[options.verb]
    if unknown := set(victims) - set(VICTIMS[options.verb]):
        parser.error(f"--victims {' '.join(unknown)}: `cappy {options.verb}` has no such process; choose among {VICTIMS[options.verb]}")
    draw = random.Random(options.seed)
    results = []
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="cappy-kills-"))
        folder = Path(name)
        workspace = (options.workspace or f"{name}/published").rstrip("/")
        rows = [{"instruction": f"say {n}", "references": [f"number {n % 97}"], "dataset": "ab"[n % 2]} for n in range(options.rows)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = (f"source={{kind: files, path: '{folder}/rows.jsonl'}}", f"generate.unit_rows={options.unit_rows}")
        common = _REAL_SETTINGS if options.real else _SETTINGS
        trial = Trial(options.verb, options.real, (*settings, *common, *options.settings), 1800.0 if options.real else 600.0)
        nodes = Nodes()
        stack.callback(nodes.end)
        expected, spans = measure_unbroken(trial, nodes, f"{workspace}/unbroken", folder / "unbroken.log")
        with Bar("killing", options.kills * len(victims), "kills") as bar:
            for victim in victims:
                at_once = 1 if victim == "pause" else options.kills_per_run
                for start in range(0, options.kills, at_once):
                    own = folder / f"{victim}-{start}"
                    own.mkdir()
                    count = min(at_once, options.kills - start)
                    span = spans["scorer" if victim == "scorer" else "sampler"] / count
                    moments = [draw.uniform(0, span) for _ in range(count)]
                    results.append(one_run(trial, nodes, victim, f"{workspace}/{victim}-{start}", own, moments))
                    bar.advance(count, note=victim)
                    log_line(f"{victim}: {_describe(summarize(results[-1:], expected))}")
    counts = {victim: summarize([each for each in results if each["victim"] == victim], expected) for victim in victims}
    for victim, count in counts.items():
        print(f"{victim}: {_describe(count)}")
    if options.json:
        print(json.dumps(counts))
    return 0 if all(kept(count, options.real) for count in counts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
