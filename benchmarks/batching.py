"""Measure the latency of scoring on a busy CPU: one batch for each core, against one batch at a time on all cores.

    python -m benchmarks.batching --json -

Each request is one instruction of the demo with a pool of 1 to 8 made-up responses. Requests arrive as a Poisson process of `--rate`
per second, for `--seconds`. The scorer is MiniLM with a random head, in bfloat16 if the CPU multiplies it natively. Meanwhile `--beside`
other processes compute with one thread each, at the lower priority that vLLM's engine has on CPU. Both ways use
`serving/score_batcher.py`: with as many threads as cores, or with one thread whose batches use all cores. They alternate, with the
same pools at the same times.

- `speedup_p50`, `speedup_p99`: latency with one batch at a time divided by latency with one batch for each core, median over the turns.
- `cpu_ms`: CPU time of the scoring process per pool, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks import servers, serving
from benchmarks.load import arrivals, quantiles
from cluster.config import load
from cluster.cpu import lower_priority, openmp_environment
from cluster.progress import log
from generation import few_shot
from serving.backend import Scored
from serving.deployments import score_pairs
from serving.score_batcher import ScoreBatcher
from serving.scorer_cache import LoadedScorer

Pool = tuple[list[str], list[str]]


def compute_forever() -> None:
    """Multiply by more weights than the CPU's caches hold, as a model does for each token; never return."""
    import torch

    torch.set_num_threads(1)
    weights = [torch.randn(3072, 3072).bfloat16() for _ in range(8)]
    hidden = torch.randn(64, 3072).bfloat16()
    while True:
        for weight in weights:
            hidden @ weight


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [multiprocessing.get_context("spawn").Process(target=compute_forever, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        lower_priority(psutil.Process(process.pid) for process in processes)
        yield
    finally:
        for process in processes:
            process.kill()


def make_pools(count: int, times: int, folder: Path, seed: int) -> list[Pool]:
    """Return `count` pools: an instruction repeated `times` times, with 1 to 8 responses of 1 to 8 of its words."""
    rows = [each[1] for each in few_shot.prepare_rows(load("demo", [f"workspace={folder}"])) if isinstance(each, tuple)]
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words = draw.choice(rows)["instruction"].split()
        responses = [" ".join(draw.choices(words, k=draw.randint(1, 8))) for _ in range(draw.randint(1, 8))]
        made.append(([" ".join(words * times)] * len(responses), responses))
    return made


async def latencies(batcher: ScoreBatcher, held: LoadedScorer, some: list[Pool], moments: list[float]) -> list[float]:
    """Request the scores of each pool at its time in `moments`; return the latency of each, in seconds."""
    start = time.perf_counter()

    async def one(moment: float, pool: Pool) -> float:
        await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
        await batcher.score(held, *pool)
        return time.perf_counter() - start - moment

    return list(await asyncio.gather(*(one(moment, pool) for moment, pool in zip(moments, some, strict=True))))


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--rate", type=float, default=4.0)
    made.add_argument("--seconds", type=float, default=30.0, help="length of one turn of one way")
    made.add_argument("--times", type=int, default=1, help="repetitions of each instruction, for longer pairs")
    made.add_argument("--beside", type=int, default=len(os.sched_getaffinity(0)), help="busy processes")
    made.add_argument("--seed", type=int, default=20261127)
    made.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = made.parse_args()
    openmp_environment()
    from training.scorer import Scorer

    cores = len(os.sched_getaffinity(0))

    def together(held: LoadedScorer, texts: Sequence[str], responses: Sequence[str], _: int) -> Scored:
        return score_pairs(held, texts, responses, cores)

    seen: dict[str, list[list[float]]] = {"together": [], "side_by_side": []}
    cpu: dict[str, list[float]] = {"together": [], "side_by_side": []}
    with tempfile.TemporaryDirectory(prefix="cappy-batching-") as name, busy_processes(options.beside):
        servers.write_scorer(Path(name) / "scorer", options.seed)
        held = LoadedScorer(Scorer.load(str(Path(name) / "scorer"), "auto"), None, None)
        for turn in range(options.turns):
            moments = arrivals(options.rate, options.seconds, options.seed + turn)
            some = make_pools(len(moments), options.times, Path(name), options.seed + turn)
            for side, batcher in (("together", ScoreBatcher(together, 1)), ("side_by_side", ScoreBatcher(score_pairs, cores))):
                asyncio.run(latencies(batcher, held, some[:4], [0.0] * 4))
                before = time.process_time()
                seen[side].append(quantiles(asyncio.run(latencies(batcher, held, some, moments)), 0.5, 0.99))
                cpu[side].append(1000 * (time.process_time() - before) / len(some))
                middle, late = seen[side][-1]
                log(f"turn {turn + 1} of {options.turns}, {side}: p50 {1000 * middle:.0f} ms, p99 {1000 * late:.0f} ms")
    ratios = [[one / other for one, other in zip(*turn, strict=True)] for turn in zip(seen["together"], seen["side_by_side"], strict=True)]
    result = {
        **{
            f"speedup_{share}": round(statistics.median(each), 2)
            for share, each in zip(("p50", "p99"), zip(*ratios, strict=True), strict=True)
        },
        "latency_s": {side: [[round(value, 4) for value in turn] for turn in turns] for side, turns in seen.items()},
        "cpu_ms": {side: round(statistics.median(values), 1) for side, values in cpu.items()},
        **{name: getattr(options, name) for name in ("rate", "seconds", "times", "beside", "turns")},
    }
    serving.show(result, bool(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
