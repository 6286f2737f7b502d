"""A worker of `cappy train`, as Ray Train starts it: streams its pairs, runs the loop, keeps the books, reports checkpoints.

A checkpoint is the loop's state (weights, optimizer moments, books; see `checkpoint.save_state`) and `metrics.jsonl` so far. The
position in the data is the number of the step, since all order is a function of it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import models
from cluster.config import Config
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from training import checkpoint, loop, stream, validation
from training.scorer import Scorer, encode_pairs, load_tokenizer, new_model, pick_dtype
from training.stream import Size

_LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl and moves of the progress bar
_VALIDATION_ROWS = 64  # instructions a worker validates at once


def train(job: dict[str, Any]) -> None:
    """Train on this worker; `job` as `board.work` has it. Raises `CappyError` for what the operator must mend."""
    _Worker(Config.model_validate(job["config"]), Size(*job["size"]), job["board"], job["threads"]).train()


class _Worker:
    """One worker's model, place in the run and books."""

    def __init__(self, config: Config, size: Size, board: Any, threads: int | None) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
        self.config, self.size, self.board = config, size, board
        self.device: torch.device = ray.train.torch.get_device()
        self.dtype = pick_dtype(config.scorer.dtype, self.device)
        self.dataset = RegressionSet(config.dataset_uri)
        folder = models.resolve(config.scorer.encoder, "scorer.encoder")
        self.model = new_model(folder, config.scorer, config.training, config.seed).to(self.device)
        self.tokenizer = load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
        self.scorer = Scorer(self.model, self.tokenizer, config.scorer.max_length, self.dtype, self.device)
        self.optimizer = loop.new_optimizer(self.model, config.training)
        self.per_epoch = loop.steps_in_epoch(size, config.training)
        self.total = self.per_epoch * config.training.epochs
        self.metrics: list[str] = []
        self.progress: dict[str, Any] = {
            "step": 0,
            "pairs": size.pairs,
            "trained": 0,
            "seconds": 0.0,
            "cut_pairs": 0,
            "epoch_errors": 0.0,
            "epoch_pairs": 0,
            "train_mse": None,
            "validation": {},
        }

    def train(self) -> None:
        """Go on from the last checkpoint to the end of the last epoch."""
        import ray.train

        reported = ray.train.get_checkpoint()
        if reported:
            with reported.as_directory() as folder:
                self.progress = checkpoint.load_state(Path(folder), self.model, self.optimizer)
                self.metrics = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            if self.progress["step"]:
                self._post(say=f"going on from step {self.progress['step']} of {self.total}")
        else:
            # Both now rather than after an epoch: what cannot work should fail before anything is spent.
            self._validate(only_first=True)
            self._save()
        self._post(step=self.progress["step"], note="", pairs=0)
        training = self.config.training
        waiting: list[loop.Done] = []
        since = time.monotonic()
        steps = loop.plan(self._windows(), training, self.config.seed, self.rank, self.world, self.progress["step"], self.size)
        fitting = loop.fit(
            self.model,
            steps,
            self.optimizer,
            training,
            total=self.total,
            seed=self.config.seed,
            pad_id=self.tokenizer.pad_token_id,
            dtype=self.dtype,
            rank=self.rank,
            world=self.world,
        )
        for done in fitting:
            waiting.append(done)
            ended = (done.index + 1) % self.per_epoch == 0
            due = (done.index + 1) % training.checkpoint_every == 0
            if ended or due or (done.index + 1) % _LOG_EVERY == 0:
                self.progress["seconds"] += time.monotonic() - since
                self._log(waiting)
                if ended:
                    self._end_epoch(done.epoch)
                if ended or due:
                    self._save()
                waiting, since = [], time.monotonic()
        if self.progress["step"] != self.total:
            raise CappyError(
                f"{self.dataset.uri} gave {self.progress['step']} steps of {self.total}: it changed while it was read; train again"
            )

    def _windows(self) -> Iterator[loop.Window]:
        """Tokenised windows from that of the next step on, epoch after epoch."""
        training, scorer = self.config.training, self.config.scorer
        window_size = loop.window_size(self.size, training)
        first, skip, _ = loop.position(self.progress["step"], self.size, training)
        for epoch in range(first, training.epochs):
            windows = stream.windows(self.dataset, "train", window_size, self.config.seed, epoch, skip, whole=training.objective.grouped)
            for number, pairs in enumerate(windows, skip):
                encoded = encode_pairs(self.tokenizer, pairs.instructions, pairs.responses, scorer.max_length)
                yield loop.Window(epoch, number, encoded, pairs.labels, pairs.groups)
            skip = 0

    def _log(self, waiting: list[loop.Done]) -> None:
        """Enter the steps since the last line into the books; every worker calls it at the same steps."""
        mine = torch.stack([torch.stack([done.loss, done.squared_error]) for done in waiting]).cpu().numpy()
        losses, errors = loop.sum_over_workers(mine, self.world, self.device).T
        sizes = np.array([done.size for done in waiting])
        last, progress = waiting[-1], self.progress
        if not np.isfinite(losses).all():
            raise CappyError(
                f"the loss is {losses[~np.isfinite(losses)][0]} near step {last.index}; lower training.learning_rate "
                f"(now {self.config.training.learning_rate:g})"
            )
        progress["step"] = last.index + 1
        progress["trained"] += int(sizes.sum())
        progress["epoch_errors"] += float((errors * sizes).sum())
        progress["epoch_pairs"] += int(sizes.sum())
        if last.epoch == 0:
            progress["cut_pairs"] += sum(done.cut for done in waiting)
        loss = float((losses * sizes).sum() / sizes.sum())
        rate = progress["trained"] / max(progress["seconds"], 1e-9)
        self._write(step=last.index + 1, epoch=last.epoch, loss=loss, learning_rate=last.learning_rate, pairs_per_second=round(rate, 1))
        self._post(step=last.index + 1, note=f"loss {loss:.4f}", pairs=int(sizes.sum()))

    def _end_epoch(self, epoch: int) -> None:
        progress = self.progress
        progress["train_mse"] = progress["epoch_errors"] / progress["epoch_pairs"]
        progress["epoch_errors"], progress["epoch_pairs"] = 0.0, 0
        measured = progress["validation"] = self._validate()
        self._write(step=progress["step"], epoch=epoch, validation=measured)
        shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items() if name != "pairs" and value is not None]
        news = f"epoch {epoch + 1} of {self.config.training.epochs}: train mse {progress['train_mse']:.4f}"
        self._post(say=f"{news}; validation {', '.join(shown)}" if shown else news)

    def _validate(self, only_first: bool = False) -> dict[str, float | None]:
        """Measure the model on the validation split, the workers sharing its instructions; `{}` where there are none."""
        if not self.dataset.rows("validation"):
            return {}
        self.model.eval()
        fit = validation.NOTHING
        greedy = self.dataset.greedy()
        rows = 2 if only_first else _VALIDATION_ROWS
        for number, table in enumerate(self.dataset.batches("validation", rows, ["instruction", "candidates"])):
            if number % self.world == self.rank or only_first:
                fit += validation.measure(table, self.scorer.score, greedy)
            if only_first:
                break
        return validation.Fit(loop.sum_over_workers(fit.sums, self.world, self.device)).metrics()

    def _save(self) -> None:
        """Report a checkpoint; the first worker writes it, all of them wait for each other."""
        import ray.train

        if self.rank:
            ray.train.report({"step": self.progress["step"]})
            return
        with tempfile.TemporaryDirectory(prefix="cappy-checkpoint-") as folder:
            checkpoint.save_state(Path(folder), self.model, self.optimizer, self.progress)
            Path(folder, "metrics.jsonl").write_text("".join(f"{line}\n" for line in self.metrics), encoding="utf-8")
            ray.train.report({"step": self.progress["step"]}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _write(self, **line: Any) -> None:
        self.metrics.append(json.dumps(line))

    def _post(self, **event: Any) -> None:
        if self.rank == 0:
            self.board.post.remote(event)
