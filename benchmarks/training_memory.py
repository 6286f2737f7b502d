"""Measure memory and speed of `cappy train` with growing numbers of pairs: both should stay constant.

    python -m benchmarks.training_memory --json -

It trains on 10,000, 100,000 and 1,000,000 made-up pairs. The encoder is tiny and random, so reading, shuffling, tokenising and
bookkeeping dominate. Small sets are repeated up to 100,000 pairs, because a shorter run ends before the allocator reaches its steady
size. Memory is the peak private memory (RSS minus shared pages) of the driver and of the training worker, measured four times per
second. Speed is the trainer's figure: pairs divided by the seconds between its steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from benchmarks.memory import MIB, PeakMemory, report
from cluster import artifacts
from cluster.config import Config, load
from cluster.progress import log
from training import train

PAIRS = (10_000, 100_000, 1_000_000)
_LEAST = 100_000


def measure_run(pairs: int, folder: Path) -> dict[str, Any]:
    """Train on `pairs` pairs; return the speed (pairs/s) and the peak memory (MiB)."""
    workspace = folder / str(pairs)
    synthetic.publish_set(f"{workspace}/dataset", pairs // 3)
    config = Config.model_validate(
        {
            "workspace": str(workspace),
            "scorer": {"encoder": str(folder / "encoder"), "max_length": 64, "dtype": "float32"},
            "training": {"epochs": max(1, _LEAST // pairs), "batch_size": 256, "checkpoint_every": 200, "blend_rows": 0},
        }
    )
    (workspace / "run.yaml").write_text(config.to_yaml())
    driver = subprocess.Popen([sys.executable, "-m", "benchmarks.training_memory", "--drive", str(workspace / "run.yaml")])
    peaks = PeakMemory(driver.pid, {"RayTrainWorker": "worker"})
    code = driver.wait()
    peaks.end()
    if code:
        raise SystemExit(f"{pairs} pairs: exit code {code}")
    summary = artifacts.read_manifest(config.scorer_uri, "scorer", "train")["summary"]
    if summary["pairs"] != pairs // 3 * 3:
        raise SystemExit(f"{pairs} pairs: the summary counts {summary['pairs']} trained pairs")
    speed = round(summary["pairs_per_second"], 1)
    return {"pairs": pairs, "pairs_per_second": speed, **{f"{role}_mib": round(peak / MIB) for role, peak in sorted(peaks.peaks.items())}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS)
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    if options.drive:
        train.run_train(load(options.drive))
        return 0
    with tempfile.TemporaryDirectory(prefix="cappy-training-memory-") as name:
        synthetic.write_encoder(Path(name, "encoder"))
        results = []
        for pairs in options.pairs:
            results.append(measure_run(pairs, Path(name)))
            log(json.dumps(results[-1]))
    report(results, ("pairs_per_second", "driver_mib", "worker_mib"), bool(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
