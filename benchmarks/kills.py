"""Kill or pause drivers, sampling actors and worker nodes of `cappy generate` at random times; count lost rows and rows sampled twice.

    python -m benchmarks.kills --kills 10 --workspace s3://bucket/kills --json -

The LLM needs no weights and takes half a second per instruction. A killed driver is started again with the same command; Ray replaces
a killed actor or node. Afterwards the set must equal the set of an undisturbed run, as a multiset of rows. A row counts as sampled
twice if it is sampled after its unit was found in the store. The store is listed ten times per second.

A paused driver gets SIGSTOP with all its processes. The same command then runs a second time; it takes the lease after the silence limit
and publishes. The paused processes then get SIGCONT. Until the first run has ended, every file of the published set is verified
repeatedly. Rows that the paused run had sampled without saving their unit do not count as sampled twice.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.synthetic import SyntheticLLM
from cluster import artifacts, storage
from cluster.config import DecodingConfig, load
from cluster.progress import Bar
from cluster.progress import log as log_line
from generation import generate, units
from generation.dataset import RegressionSet
from generation.engines.contract import Candidate

VICTIMS = ("driver", "actor", "node", "pause")
_SETTINGS = ["generate.unit_rows=5", "sampler.prompt.form=raw", "generate.shard_mib=1"]
_ALL_S = 300.0


class SlowLLM(SyntheticLLM):
    """An LLM that takes half a second per request and logs the row, the time and its process id."""

    def __init__(self, config: Any, log: str) -> None:
        super().__init__(config)
        self.log = log

    async def sample(self, prompt: Any, decoding: DecodingConfig, seed: int | None, request_id: str) -> list[Candidate]:
        with Path(self.log).open("a") as log:
            log.write(f"{request_id.split('-')[0]} {time.time()} {os.getpid()}\n")
        await asyncio.sleep(0.5)
        return await super().sample(prompt, decoding, seed, request_id)


def drive(source: str, place: str, log: str) -> None:
    """Run `cappy generate`; the benchmark starts this in a separate process."""
    config = load(None, [source, f"dataset={place}", *_SETTINGS])
    generate.run_generate(config, load=functools.partial(SlowLLM, log=log))


def launch(source: str, place: str, log: Path, address: str | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **({"RAY_ADDRESS": address} if address else {})}
    command = [sys.executable, "-m", "benchmarks.kills", "--drive", source, place, str(log)]
    with Path(f"{log}.stderr").open("a") as told:
        return subprocess.Popen(command, env=environment, start_new_session=True, stderr=told)


def content(place: str) -> str:
    """Return a hash of the published rows as a multiset."""
    opened = RegressionSet(place)
    assert artifacts.verify(place, opened.manifest) == []
    rows = sorted(
        json.dumps(row, sort_keys=True) for split in ("train", "validation") for batch in opened.batches(split) for row in batch.to_pylist()
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


class CommitWatcher:
    """Record when each finished unit was first found in the store, and its rows."""

    def __init__(self, place: str) -> None:
        self.committed: dict[str, float] = {}
        self._staging, self._seen, self._over = storage.join(place, "_staging"), set[str](), threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._over.wait(0.1):
            units_found = {name for name in storage.list_files(storage.join(self._staging, "units")) if name.endswith(".parquet")}
            for name in units_found - self._seen:
                now = time.time()
                try:
                    ids = units.read_unit(storage.join(self._staging, "units", name))["id"].to_pylist()
                except FileNotFoundError:  # merged and removed meanwhile
                    continue
                self._seen.add(name)
                self.committed.update(dict.fromkeys(ids, now))

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def actor_of(log: Path) -> int:
    """Return the process id of the newest sampling actor."""
    return int(log.read_text().splitlines()[-1].split()[2])


def one_run(victim: str, source: str, place: str, folder: Path, moment: float) -> dict[str, Any]:
    """Run `cappy generate` to its end with one kill `moment` seconds after the first sample; return the outcome."""
    log = folder / "log"
    log.touch()
    watch = CommitWatcher(place)
    address, kill_node, tear_down = _nodes() if victim == "node" else (None, None, None)
    driver = launch(source, place, log, address)
    deadline = time.monotonic() + _ALL_S
    while not log.read_text() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(moment)
    midway = driver.poll() is None
    if victim == "driver" and midway:
        os.killpg(driver.pid, signal.SIGKILL)
    elif victim == "actor":
        with suppress(ProcessLookupError):  # the run is over
            os.kill(actor_of(log), signal.SIGKILL)
    elif kill_node:
        kill_node()
    if victim == "pause" and midway:
        code, damage, first_code = _pause(driver, lambda: launch(source, place, log), place)
    else:
        code, damage, first_code = driver.wait(_ALL_S), list[str](), None
    if victim == "driver" and midway:
        code = launch(source, place, log).wait(_ALL_S)
    watch.end()
    if tear_down:
        tear_down()
    for problem in damage:
        log_line(f"{victim}: {problem}")
    if code:
        log_line(f"{victim}: exit code {code}: {Path(f'{log}.stderr').read_text()[-2000:]}")
    lines = [line.split() for line in log.read_text().splitlines()]
    again = sum(float(when) > watch.committed.get(row, float("inf")) for row, when, _ in lines)
    return {
        "victim": victim,
        "code": code,
        "first_code": first_code,
        "midway": midway,
        "content": content(place) if code == 0 else None,
        "sampled_twice": again,
        "damage": damage,
    }


def _pause(driver: subprocess.Popen[bytes], launch_second: Callable[[], subprocess.Popen[bytes]], place: str) -> tuple[int, list[str], int]:
    """Pause a driver and its processes until a second run has published, then resume them.

    Return the exit code of the second run, each problem that its published files had until the first run ended, and the exit code of the
    first run.
    """
    paused = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    _send(paused, signal.SIGSTOP)
    code = launch_second().wait(_ALL_S)
    manifest = RegressionSet(place).manifest if code == 0 else None
    _send(paused, signal.SIGCONT)
    damage: list[str] = []
    deadline = time.monotonic() + _ALL_S
    while manifest and driver.poll() is None and time.monotonic() < deadline:
        damage += [problem for problem in artifacts.verify(place, manifest) if problem not in damage]
        time.sleep(0.2)
    first_code = driver.wait(_ALL_S)
    if manifest:
        damage += [problem for problem in artifacts.verify(place, manifest) if problem not in damage]
        damage += [] if RegressionSet(place).manifest == manifest else ["the manifest changed"]
    return code, damage, first_code


def _send(processes: list[psutil.Process], signal_: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal_)


def _nodes() -> tuple[str, Callable[[], None], Callable[[], None]]:
    """Start a cluster with a head and two worker nodes; return its address, a function that kills a worker, and one that ends all."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    workers = [cluster.add_node(num_cpus=2) for _ in range(2)]
    return cluster.address, lambda: cluster.remove_node(workers[0], allow_graceful=False), cluster.shutdown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=10, help="kills of each kind of victim")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--workspace", help="a folder or s3:// prefix; a temporary folder by default")
    parser.add_argument("--drive", nargs=3, metavar=("SOURCE", "DATASET", "LOG"), help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    if options.drive:
        drive(*options.drive)
        return 0
    draw = random.Random(options.seed)
    results = []
    with tempfile.TemporaryDirectory(prefix="cappy-kills-") as name:
        folder = Path(name)
        workspace = (options.workspace or f"{name}/sets").rstrip("/")
        rows = [{"instruction": f"say {n}", "references": [f"number {n % 97}"], "dataset": "ab"[n % 2]} for n in range(options.rows)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"source={{kind: files, path: '{folder}/rows.jsonl'}}"
        start = time.monotonic()
        assert launch(source, f"{workspace}/unbroken", folder / "unbroken.log").wait(_ALL_S) == 0
        expected = content(f"{workspace}/unbroken")
        lines = [float(line.split()[1]) for line in (folder / "unbroken.log").read_text().splitlines()]
        sampling = max(lines) - min(lines) + 0.5
        log_line(f"unbroken: {time.monotonic() - start:.0f} s, of which sampling {sampling:.1f} s")
        with Bar("killing", options.kills * len(options.victims), "runs") as bar:
            for victim in options.victims:
                for number in range(options.kills):
                    own = folder / f"{victim}-{number}"
                    own.mkdir()
                    results.append(one_run(victim, source, f"{workspace}/{victim}-{number}", own, draw.uniform(0, sampling)))
                    bar.advance(note=f"{victim} {number}: {'same set' if results[-1]['content'] == expected else 'DIFFERENT'}")
    counts = {
        victim: {
            "kills": sum(each["victim"] == victim for each in results),
            "midway": sum(each["victim"] == victim and each["midway"] for each in results),
            "same_set": sum(each["victim"] == victim and each["content"] == expected for each in results),
            "sampled_twice": sum(each["sampled_twice"] for each in results if each["victim"] == victim),
            "damaged": sum(bool(each["damage"]) for each in results if each["victim"] == victim),
            "refused": sum(bool(each["first_code"]) for each in results if each["victim"] == victim),
        }
        for victim in options.victims
    }
    for victim, count in counts.items():
        print(
            f"{victim}: {count['kills']} kills, same set {count['same_set']}, committed rows sampled again {count['sampled_twice']}, "
            f"committed sets damaged {count['damaged']}, paused runs refused {count['refused']}"
        )
    if options.json:
        print(json.dumps(counts))
    kept = (each["same_set"] == each["kills"] and not each["sampled_twice"] and not each["damaged"] for each in counts.values())
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
