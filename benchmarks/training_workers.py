"""Train MiniLM with one worker and with two, one thread each: compare the losses of all steps and the speed.

    python -m benchmarks.training_workers --json -

Run it on an otherwise idle machine. Each worker is a process that runs `training.loop` with gloo, in float32, on the same batches of
made-up pairs. Dropout is off, because its draws differ between workers. Exit code 1 if a loss differs by 1e-5 or more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import synthetic
from cluster import models, ports
from cluster.config import ScorerConfig, TrainingConfig
from cluster.progress import log

_WARM_UP = 5  # steps that are not timed


def worker(rank: int, world: int, port: int, place: str, config: TrainingConfig, steps: int) -> None:
    """Run one of `world` workers; the first writes the losses of all steps and the seconds of the timed steps."""
    import torch
    import torch.distributed

    from generation.dataset import RegressionSet
    from training import batch_plan, loop, stream
    from training.encoding import encode_pairs
    from training.scorer import load_tokenizer, new_model

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    folder = models.resolve("minilm-l6", "scorer.encoder")
    model, tokenizer = new_model(folder, ScorerConfig(), config, 1), load_tokenizer(folder, "minilm-l6", "scorer.encoder")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.parallel == "fsdp" and world > 1:
        loop.shard_model(model)
    dataset = RegressionSet(f"{place}/dataset")
    size = stream.count_pairs(dataset, "train")

    def windows() -> Any:
        for number, part in enumerate(stream.read_windows(dataset, "train", config.window, 1, 0)):
            yield batch_plan.Window(0, number, encode_pairs(tokenizer, part.instructions, part.responses, 512), part.labels, part.groups)

    plan = batch_plan.plan_steps(windows(), config, 1, rank, world, 0, size)
    optimizer = loop.new_optimizer(model, config)
    fitting = loop.fit(model, plan, optimizer, config, total=steps, seed=1, pad_id=0, dtype="float32", rank=rank, world=world)
    losses, ends = [], []
    for done in itertools.islice(fitting, steps):
        losses.append(done.loss.item())
        ends.append(time.monotonic())
    summed = loop.sum_over_workers(losses, world, torch.device("cpu"))
    if rank == 0:
        Path(place, f"{world}.json").write_text(json.dumps({"losses": summed.tolist(), "seconds": ends[-1] - ends[_WARM_UP - 1]}))
    torch.distributed.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    import torch.multiprocessing

    config = TrainingConfig(batch_size=options.batch_size, window=512, learning_rate=1e-4, epochs=1, parallel=options.parallel)
    rates: dict[int, list[float]] = {1: [], 2: []}
    differences = []
    with tempfile.TemporaryDirectory(prefix="cappy-workers-") as place:
        # With three pairs per instruction the set has 1.5 times the pairs of the steps.
        synthetic.publish_set(f"{place}/dataset", options.steps * options.batch_size // 2)
        for _ in range(options.repeats):
            losses = {}
            for world in rates:
                torch.multiprocessing.spawn(worker, (world, ports.free_port(), place, config, options.steps), nprocs=world)
                written = json.loads(Path(place, f"{world}.json").read_text())
                losses[world] = np.array(written["losses"])
                rates[world].append((options.steps - _WARM_UP) * options.batch_size / written["seconds"])
                log(f"{world} worker(s): {rates[world][-1]:.1f} pairs/s")
            differences.append(float(np.abs(losses[1] - losses[2]).max()))
    one, two = (statistics.median(rates[world]) for world in rates)
    result = {
        "parallel": options.parallel,
        "steps": options.steps,
        "loss_max_diff": max(differences),
        "pairs_per_second_1": round(one, 1),
        "pairs_per_second_2": round(two, 1),
        "efficiency": round(two / one / 2, 3),
    }
    print(
        f"{options.steps} steps, losses differ by at most {result['loss_max_diff']:.1e}; {one:.1f} pairs/s with one worker, {two:.1f} with "
        f"two: efficiency {result['efficiency']:.2f}"
    )
    if options.json:
        print(json.dumps(result))
    return 0 if max(differences) < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
