"""Measure memory and speed of `cappy generate` with growing numbers of instructions: both should stay constant.

    python -m benchmarks.scale --json -

It makes sets from 10,000, 100,000 and 1,000,000 instructions. The LLM computes its answers from the seed without delay, so only this
project's code is measured. Memory is the peak private memory (RSS minus shared pages), measured four times per second. It is reported
for the driver, the largest sampling actor and the largest other Ray worker. Speed is instructions divided by the seconds of
reading, sampling and merging, without start-up. Of sampling only the last nine tenths count, by the counter at
`generate.metrics_port`. The rows of each set are counted and its checksums verified.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.memory import MIB, PeakMemory, report
from benchmarks.synthetic import WORDS, SyntheticLLM, text
from cluster import artifacts, ports
from cluster.config import load
from cluster.progress import log
from generation import generate
from generation.dataset import RegressionSet

ROWS = (10_000, 100_000, 1_000_000)


def write_source(path: Path, rows: int) -> None:
    draw = random.Random(rows)
    with path.open("w") as file:
        for number in range(rows):
            words = " ".join(draw.choices(WORDS, k=40))
            row = {"instruction": f"{number}: {words}", "references": [text(draw.randrange(1 << 30))], "dataset": f"d{number % 30}"}
            file.write(json.dumps(row) + "\n")


class RunMonitor(PeakMemory):
    """The peak memory of a run, and its progress by the Prometheus metrics at `port`."""

    def __init__(self, pid: int, port: int) -> None:
        self.done: list[tuple[float, float]] = []
        """Monotonic time in seconds and instructions done, at each increase."""
        self._metrics = f"http://127.0.0.1:{port}/metrics"
        super().__init__(pid, {"UnitWorker": "actor", "": "worker"})

    def measure(self) -> None:
        super().measure()
        with suppress(httpx.HTTPError):  # the run is not sampling yet, or no longer
            families = text_string_to_metric_families(httpx.get(self._metrics).text)
            done = next(each.samples[0].value for each in families if each.name == "cappy_generate_instructions_done")
            if not self.done or done > self.done[-1][1]:
                self.done.append((time.monotonic(), done))

    def sampled_per_second(self, rows: int) -> float:
        """Return the instructions per second after the first tenth of the rows."""
        late = [each for each in self.done if each[1] >= rows / 10]
        (start, first), (end, last) = late[0], late[-1]
        return (last - first) / (end - start)


def drive(source: str, place: str, settings: list[str]) -> None:
    """Run `cappy generate`; the benchmark starts this in a separate process."""
    generate.run_generate(load(None, [source, f"dataset={place}", "sampler.prompt.form=raw", *settings]), load=SyntheticLLM)


def measure_run(rows: int, folder: Path, workspace: str, settings: list[str]) -> dict[str, Any]:
    """Make a set of `rows` instructions; return its speed (instructions/s) and peak memory (MiB)."""
    source, place = folder / f"{rows}.jsonl", f"{workspace}/{rows}"
    write_source(source, rows)
    port = ports.free_port()
    settings = [*settings, f"generate.metrics_port={port}"]
    command = [sys.executable, "-m", "benchmarks.scale", "--drive", f"source={{kind: files, path: '{source}'}}", place, *settings]
    driver = subprocess.Popen(command)
    watch = RunMonitor(driver.pid, port)
    code = driver.wait()
    watch.end()
    if code:
        raise SystemExit(f"{rows} instructions: exit code {code}")
    opened = RegressionSet(place)
    if (made := opened.manifest["summary"]["instructions"]) != rows or (problems := artifacts.verify(place, opened.manifest)):
        raise SystemExit(f"{rows} instructions: the set has {made}; damaged files: {problems}")
    seconds = dict(opened.manifest["seconds"])
    seconds["sampling"] = rows / watch.sampled_per_second(rows)
    source.unlink()
    if not workspace.startswith("s3://"):
        shutil.rmtree(place)
    return {
        "rows": rows,
        "rows_per_second": round(rows / sum(seconds.values()), 1),
        "pairs_per_second": round(opened.manifest["summary"]["pairs"] / sum(seconds.values()), 1),
        **{f"{stage}_rows_per_second": round(rows / max(each, 1e-6), 1) for stage, each in seconds.items()},
        **{f"{role}_mib": round(peak / MIB) for role, peak in sorted(watch.peaks.items())},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--workspace", help="a folder or s3:// prefix; a temporary folder by default")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="a setting of `cappy generate`")
    parser.add_argument("--drive", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    if options.drive:
        drive(options.drive[0], options.drive[1], options.drive[2:])
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="cappy-scale-") as name:
        for rows in options.rows:
            results.append(measure_run(rows, Path(name), (options.workspace or f"{name}/sets").rstrip("/"), options.settings))
            log(json.dumps(results[-1]))
    report(results, ("rows_per_second", "sampling_rows_per_second", "driver_mib", "actor_mib", "worker_mib"), bool(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
