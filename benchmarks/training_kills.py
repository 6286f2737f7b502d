"""Kill `cappy train` ten times at random steps; count repeated steps and compare the weights with an undisturbed run.

    python -m benchmarks.training_kills --kills 10 --json -

One run trains a tiny random encoder on CPU with one worker. The kills alternate between two victims. SIGKILL to the worker's process:
Ray Train starts another worker. SIGKILL to the driver and all its processes: the benchmark runs the same command again. With
`--victims node` it kills the worker's node, in a cluster of a head and two worker nodes. A step counts as repeated if the workers' log
has it twice. Weights and the loss of every step must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import synthetic
from cluster.config import Config, load
from cluster.progress import Bar
from cluster.progress import log as log_line
from training import train
from training.records import Job

_ALL_S = 300.0
_STEP_S = 0.02  # slow steps, so that a kill hits the drawn step and not a later one


def logged_work(job: Job, log: str) -> None:
    """Run a worker that logs each finished step with its time and process id."""
    from training import loop, run_channel

    fit = loop.fit

    def logged(*arguments: Any, **options: Any) -> Any:
        for done in fit(*arguments, **options):
            time.sleep(_STEP_S)
            with Path(log).open("a") as lines:
                lines.write(f"{done.index} {time.time()} {os.getpid()}\n")
            yield done

    loop.fit = logged
    run_channel.run_worker(job)


def drive(config: str, log: str) -> None:
    """Run `cappy train`; the benchmark starts this in a separate process."""
    train.run_train(load(config), work=functools.partial(logged_work, log=log))


def launch(config: Config, folder: Path, nodes: Nodes | None = None) -> subprocess.Popen[bytes]:
    (folder / "run.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "benchmarks.training_kills", "--drive", str(folder / "run.yaml"), str(folder / "steps.log")]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **({"RAY_ADDRESS": nodes.address} if nodes else {})}
    with (folder / "stderr").open("a") as told:
        return subprocess.Popen(command, env=environment, start_new_session=True, stderr=told)


def logged_steps(folder: Path) -> list[tuple[int, float, int]]:
    """Return the workers' log: step, time and process id of each finished step."""
    log = folder / "steps.log"
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(step), float(when), int(process)) for step, when, process in lines]


def kill(driver: subprocess.Popen[bytes]) -> None:
    """Kill a driver and all its processes, including Ray."""
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    driver.wait()
    psutil.wait_procs(family, timeout=30)


class Nodes:
    """A Ray cluster of a head without CPUs and two worker nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self._workers = [self._cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address = str(self._cluster.address)

    def kill(self, process: int) -> None:
        """Kill the node of `process` with all its processes, and add another node."""
        family = {each.pid for each in psutil.Process(process).parents()}
        (node,) = [each for each in self._workers if each.all_processes["raylet"][0].process.pid in family]
        self._workers.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        self._workers.append(self._cluster.add_node(num_cpus=1))

    def end(self) -> None:
        self._cluster.shutdown()


def run_with_kills(config: Config, folder: Path, moments: list[int], victims: list[str]) -> list[dict[str, Any]]:
    """Run to the end with one kill at each step of `moments`, alternating between `victims`; return the cost of each kill."""
    costs: list[dict[str, Any]] = []
    nodes = Nodes() if "node" in victims else None
    driver = launch(config, folder, nodes)
    with Bar("killing", len(moments), "kills") as bar:
        for number, moment in enumerate(moments):
            victim = victims[number % len(victims)]
            deadline = time.monotonic() + _ALL_S
            before: list[tuple[int, float, int]] = []
            # A resumed run repeats some steps before it reaches the next kill.
            while not before or before[-1][0] < moment:
                assert driver.poll() is None and time.monotonic() < deadline, (folder / "stderr").read_text()[-2000:]
                time.sleep(_STEP_S / 2)
                before = logged_steps(folder)
            if victim == "worker":
                psutil.Process(before[-1][2]).kill()
            elif victim == "driver":
                kill(driver)
            elif nodes:
                nodes.kill(before[-1][2])
            killed, before = time.time(), logged_steps(folder)
            if victim == "driver":
                driver = launch(config, folder, nodes)
            while len(logged_steps(folder)) == len(before):
                assert driver.poll() is None and time.monotonic() < deadline, (folder / "stderr").read_text()[-2000:]
                time.sleep(0.05)
            first = logged_steps(folder)[len(before)]
            redone = before[-1][0] + 1 - first[0]
            costs.append({"victim": victim, "at_step": before[-1][0], "redone": redone, "seconds": first[1] - killed})
            bar.advance(note=f"{victim} at step {before[-1][0]}: {redone} steps repeated")
    assert driver.wait(_ALL_S) == 0, (folder / "stderr").read_text()[-2000:]
    if nodes:
        nodes.end()
    return costs


def outcome(config: Config) -> tuple[bytes, list[Any]]:
    """Return the published weights, and the loss of each step."""
    lines = map(json.loads, Path(config.scorer_uri, "metrics.jsonl").read_text().splitlines())
    curve = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return Path(config.scorer_uri, "model.safetensors").read_bytes(), curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--instructions", type=int, default=1200)
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--victims", nargs="+", choices=("worker", "driver", "node"), default=["worker", "driver"])
    parser.add_argument("--drive", nargs=2, metavar=("CONFIG", "LOG"), help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    if options.drive:
        drive(*options.drive)
        return 0
    every = options.checkpoint_every
    with tempfile.TemporaryDirectory(prefix="cappy-training-kills-") as name:
        folder = Path(name)
        synthetic.write_encoder(folder / "encoder")
        synthetic.publish_set(str(folder / "dataset"), options.instructions)
        training = {"epochs": 2, "batch_size": 16, "window": 512, "checkpoint_every": every, "max_failures": options.kills}
        scorer = {"encoder": str(folder / "encoder"), "max_length": 64, "dtype": "float32"}
        tree = {"dataset": str(folder / "dataset"), "scorer": scorer, "training": training}
        configs = {}
        for run in ("whole", "killed"):
            (folder / run).mkdir()
            configs[run] = Config.model_validate({**tree, "workspace": str(folder / run)})
        assert launch(configs["whole"], folder / "whole").wait(_ALL_S) == 0, (folder / "whole/stderr").read_text()[-2000:]
        steps = len(logged_steps(folder / "whole"))
        log_line(f"unbroken: {steps} steps")
        moments = sorted(random.Random(options.seed).sample(range(1, steps - 1), options.kills))
        costs = run_with_kills(configs["killed"], folder / "killed", moments, options.victims)
        whole, killed = outcome(configs["whole"]), outcome(configs["killed"])
        log = [step for step, _, _ in logged_steps(folder / "killed")]
    redone = len(log) - len(set(log))
    result = {
        "kills": len(costs),
        "equal_weights": whole[0] == killed[0],
        "equal_losses": whole[1] == killed[1],
        "steps": steps,
        "checkpoint_every": every,
        "steps_redone": redone,
        "steps_redone_per_kill": round(redone / max(len(costs), 1), 1),
        "restart_s": {
            victim: round(statistics.median(cost["seconds"] for cost in costs if cost["victim"] == victim), 1)
            for victim in sorted({cost["victim"] for cost in costs})
        },
    }
    print(
        f"{result['kills']} kills in {steps} steps: weights {'equal' if result['equal_weights'] else 'DIFFERENT'}, losses "
        f"{'equal' if result['equal_losses'] else 'DIFFERENT'}, {redone} steps repeated ({result['steps_redone_per_kill']} per kill)"
    )
    if options.json:
        print(json.dumps(result))
    return 0 if result["equal_weights"] and result["equal_losses"] else 1


if __name__ == "__main__":
    sys.exit(main())
