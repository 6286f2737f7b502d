"""A worker of `cappy train`, as Ray Train starts it: streams its pairs, runs the loop, keeps the books, writes checkpoints.

The position in the data and the random draws are functions of the number of the step, so a checkpoint holds no more of them.
"""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster import models
from cluster.config import Config
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from training import batch_plan, blend, checkpoint, flops, loop, stream, validation
from training.batch_plan import Size
from training.best_checkpoint import BestWeights
from training.encoding import encode_pairs
from training.scorer import Scorer, load_tokenizer, new_model, pick_dtype

_LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl and moves of the progress bar
_VALIDATION_ROWS = 64  # instructions a worker validates at once


def train(job: dict[str, Any]) -> None:
    """Train on this worker; `job` as `run_channel.run_worker` has it. Raises `CappyError` for what the operator must mend."""
    _Worker(Config.model_validate(job["config"]), job).train()


class _Worker:
    """One worker's model, place in the run and books."""

    def __init__(self, config: Config, job: dict[str, Any]) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(job["threads"] or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
        self.config, self.size, self.board = config, Size(*job["size"]), job["board"]
        self.device: torch.device = ray.train.torch.get_device()
        self.dtype = pick_dtype(config.scorer.dtype, self.device)
        self.dataset = RegressionSet(config.dataset_uri)
        folder = models.resolve(config.scorer.encoder, "scorer.encoder")
        self.model = new_model(folder, config.scorer, config.training, config.seed).to(self.device)
        self.tokenizer = load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
        self.sharded = config.training.parallel == "fsdp" and self.world > 1
        # A pass through shared weights takes all workers at once, so what scores is then a whole copy.
        whole = copy.deepcopy(self.model) if self.sharded else self.model
        self.scorer = Scorer(whole, self.tokenizer, config.scorer.max_length, self.dtype, self.device)
        self.flops, self.peak = flops.FlopCounter(self.model), flops.device_peak_flops(self.device)
        if self.sharded:
            loop.shard_model(self.model)
        self.optimizer = loop.new_optimizer(self.model, config.training)
        self.per_epoch = batch_plan.steps_in_epoch(self.size, config.training)
        self.total = self.per_epoch * config.training.epochs
        self.checkpoints: str = job["checkpoints"]
        self.writer = checkpoint.CheckpointWriter(
            self.checkpoints, config.training.checkpoints_kept, job["claim"].successor, job["claim"].check
        )
        self.stop = loop.StopConsensus(self.world)
        threading.Thread(target=self._listen, name="cappy-stop", daemon=True).start()
        self.best = BestWeights(self.checkpoints, config.training, writes=self.rank == 0)
        self.metrics: list[str] = []
        self.progress: dict[str, Any] = {
            "step": 0,
            "pairs": self.size.pairs,
            "trained": 0,
            "seconds": 0.0,
            "cut_pairs": 0,
            "epoch_errors": 0.0,
            "epoch_pairs": 0,
            "train_mse": None,
            "validation": {},
            "calibration": [],
            "best": self.best.books,
            "blend": None,
            "finished": False,
        }

    def train(self) -> None:
        """Go on from the newest sound checkpoint to the end of the last epoch, or until told to stop."""
        if not self._resume():
            # Both now rather than after an epoch: what cannot work should fail before anything is spent.
            self._validate(only_first=True)
            self._save()
            self.writer.finish()
        if self.progress["finished"]:
            return
        self._post(step=self.progress["step"])
        training = self.config.training
        waiting: list[loop.StepResult] = []
        since = time.monotonic()
        steps = batch_plan.plan_steps(
            stream.prefetch(self._windows()), training, self.config.seed, self.rank, self.world, self.progress["step"], self.size
        )
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
        stopping = enough = False
        for done in fitting:
            waiting.append(done)
            stopping = self.stop.reached()
            ended = (done.index + 1) % self.per_epoch == 0
            due = stopping or (done.index + 1) % training.checkpoint_every == 0
            last = done.index + 1 == self.total
            validates = last or (ended if training.validate_every is None else (done.index + 1) % training.validate_every == 0)
            if ended or due or validates or (done.index + 1) % _LOG_EVERY == 0:
                self._log(waiting, time.monotonic() - since)
                if ended:
                    self._end_epoch(done.epoch)
                if validates:
                    enough = self._enter_validation(done.epoch)
                if last or enough:
                    self._finish()
                if ended or due or validates:
                    self._save()
                waiting, since = [], time.monotonic()
            if stopping or enough:
                break
        self.writer.finish()
        if not self.progress["finished"] and not stopping:
            raise CappyError(
                f"{self.dataset.uri} gave {self.progress['step']} steps of {self.total}: it changed while it was read; train again"
            )

    def _resume(self) -> bool:
        """Take over the newest sound checkpoint; whether there was one."""
        state = checkpoint.read_newest(self.checkpoints, lambda news: self._post(say=news))
        step = state.step if state else -1
        if loop.sum_over_workers([step], self.world, self.device)[0] != step * self.world:
            raise RuntimeError("the workers found different checkpoints")  # Ray Train starts them again
        if state is None:
            return False
        if state.books["position"] != self._position(step):
            raise CappyError(
                f"{self.checkpoints} was begun by a version that orders the data otherwise; finish it with that one, or start afresh "
                f"with --overwrite"
            )
        checkpoint.restore(state, self.model, self.optimizer)
        self.progress, self.metrics = state.books["progress"], state.lines
        self.best.books = self.progress["best"]
        if step:
            self._post(say=f"going on from step {step} of {self.total}")
        return True

    def _position(self, step: int) -> dict[str, int]:
        """Where in the data, and in the schedule, step `step` begins."""
        epoch, window, within = batch_plan.position(step, self.size, self.config.training)
        return {"epoch": epoch, "window": window, "step_in_window": within, "total": self.total}

    def _listen(self) -> None:
        import ray

        ray.get(self.board.stopped.remote())
        self.stop.ask()

    def _windows(self) -> Iterator[batch_plan.Window]:
        """Tokenised windows from that of the next step on, epoch after epoch."""
        training, scorer = self.config.training, self.config.scorer
        tokenizer = copy.deepcopy(self.tokenizer)  # they are made in a thread, and a tokenizer serves one at a time
        window_size = batch_plan.window_size(self.size, training)
        first, skip, _ = batch_plan.position(self.progress["step"], self.size, training)
        for epoch in range(first, training.epochs):
            windows = stream.read_windows(
                self.dataset, "train", window_size, self.config.seed, epoch, skip, whole=training.objective.grouped
            )
            for number, pairs in enumerate(windows, skip):
                encoded = encode_pairs(tokenizer, pairs.instructions, pairs.responses, scorer.max_length)
                yield batch_plan.Window(epoch, number, encoded, pairs.labels, pairs.groups)
            skip = 0

    def _log(self, waiting: list[loop.StepResult], seconds: float) -> None:
        """Enter the steps since the last line, which took `seconds`, into the books; every worker calls it at the same steps."""
        mine = [torch.stack([torch.stack([done.loss, done.squared_error]) for done in waiting]).cpu().numpy().ravel()]
        mine.append(np.sum([[done.tokens, done.padded_tokens, done.squared_lengths] for done in waiting], axis=0))
        summed = loop.sum_over_workers(np.concatenate(mine), self.world, self.device)
        losses, errors = summed[:-3].reshape(-1, 2).T.tolist()
        tokens, slots, attended = summed[-3:].tolist()
        last, progress = waiting[-1], self.progress
        if not np.isfinite(losses).all():
            raise CappyError(
                f"the loss is {next(loss for loss in losses if not np.isfinite(loss))} near step {last.index}; lower "
                f"training.learning_rate (now {self.config.training.learning_rate:g})"
            )
        pairs = sum(done.size for done in waiting)
        progress["step"] = last.index + 1
        progress["trained"] += pairs
        progress["seconds"] += seconds
        for error, done in zip(errors, waiting, strict=True):  # one by one: the sum must not depend on where a run was stopped
            progress["epoch_errors"] += error * done.size
        progress["epoch_pairs"] += pairs
        if last.epoch == 0:
            progress["cut_pairs"] += sum(done.cut for done in waiting)
        line = {
            "step": last.index + 1,
            "epoch": last.epoch,
            "loss": sum(loss * done.size for loss, done in zip(losses, waiting, strict=True)) / pairs,
            "learning_rate": last.learning_rate,
            "pairs_per_second": round(pairs / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding_share": round(1 - tokens / slots, 4),
        }
        if self.peak:
            line["mfu"] = round(self.flops(tokens, attended) / seconds / self.peak / self.world, 4)
        self._write(**line)
        note = [f"loss {line['loss']:.4f}", f"padding {line['padding_share']:.1%}", *([f"MFU {line['mfu']:.1%}"] if self.peak else [])]
        self._post(step=last.index + 1, note="  ".join(note), pairs=pairs, tokens=int(tokens))

    def _end_epoch(self, epoch: int) -> None:
        progress = self.progress
        progress["train_mse"] = progress["epoch_errors"] / progress["epoch_pairs"]
        progress["epoch_errors"], progress["epoch_pairs"] = 0.0, 0
        self._post(say=f"epoch {epoch + 1} of {self.config.training.epochs}: train mse {progress['train_mse']:.4f}")

    def _enter_validation(self, epoch: int) -> bool:
        """Validate and keep what is the best so far; return whether to stop for want of better."""
        fit = self._validate()
        if fit is None:
            return False
        progress, step, measured = self.progress, self.progress["step"], fit.metrics()
        is_best = self.best.enter(measured, step, lambda: checkpoint.copy_weights(self.model))
        if is_best or self.best.books["step"] is None:
            progress["validation"], progress["calibration"] = measured, fit.calibration()
        progress["best"] = self.best.books
        self._write(step=step, epoch=epoch, validation=measured)
        shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items() if name != "pairs" and value is not None]
        self._post(say=f"step {step} of {self.total}: validation {', '.join(shown)}")
        if step == self.total or not self.best.out_of_patience():
            return False
        self._post(say=f"stopping early: {self.best.books['metric']} was best after step {self.best.books['step']}")
        return True

    def _finish(self) -> None:
        """Take the weights that are published, and fit the blend's weight with them; the last checkpoint holds both."""
        loop.sum_over_workers([0.0], self.world, self.device)  # until the first worker has written its file
        weights = self.best.weights()
        if weights is not None:
            checkpoint.restore(checkpoint.Checkpoint(self.best.books["step"], weights, {}, {}, []), self.model)
        self.progress["blend"] = self._fit_blend()
        self.progress["finished"] = True

    def _fit_blend(self) -> dict[str, Any] | None:
        """Fit the blend's weight on train rows spread over the split; null where they have no log-probabilities."""
        wanted = self.config.training.blend_rows
        if not wanted:
            return None
        self._ready_to_score()
        stride = max(self.dataset.rows("train") // wanted, 1)
        tally, seen = blend.EMPTY_TALLY, 0
        for number, table in enumerate(self.dataset.batches("train", _VALIDATION_ROWS, ["instruction", "candidates"])):
            if number % self.world == self.rank:
                tally = tally + blend.tally_picks(table.take(np.arange(-seen % stride, len(table), stride)), self.scorer.score)
            seen += len(table)
        tally = loop.sum_over_workers(tally, self.world, self.device)
        weight = blend.fit_weight(tally)
        if weight is None:
            return None
        scorer, blended = (blend.mean_label(tally, each) for each in (0.0, weight))
        return {"logprob_weight": weight, "rows": int(tally[0]), "selection_train": scorer, "selection_train_blend": blended}

    def _ready_to_score(self) -> None:
        if self.sharded:
            self.scorer.model.load_state_dict(checkpoint.copy_weights(self.model), strict=False)
        self.scorer.model.eval()

    def _validate(self, only_first: bool = False) -> validation.ValidationSums | None:
        """Measure the model on the validation split, the workers sharing its instructions; None where there are none."""
        if not self.dataset.rows("validation"):
            return None
        self._ready_to_score()
        fit = validation.EMPTY_SUMS
        greedy = self.dataset.greedy()
        rows = 2 if only_first else _VALIDATION_ROWS
        for number, table in enumerate(self.dataset.batches("validation", rows, ["instruction", "candidates"])):
            if number % self.world == self.rank or only_first:
                fit += validation.measure_scores(table, self.scorer.score, greedy)
            if only_first:
                break
        return validation.ValidationSums(loop.sum_over_workers(fit.sums, self.world, self.device))

    def _save(self) -> None:
        """Copy the state and begin to write it, on the first worker; the others only lend their shards."""
        # A run that stopped early is at its end: nothing is left to do for who goes on from here.
        step = self.total if self.progress["finished"] else self.progress["step"]
        books = {"progress": self.progress, "position": self._position(step)}
        state = checkpoint.capture(self.model, self.optimizer, step, books, self.metrics, keep=self.rank == 0)
        if state:
            self.writer.save(state)

    def _write(self, **line: Any) -> None:
        self.metrics.append(json.dumps(line))
        self._post(line=line)

    def _post(self, **event: Any) -> None:
        if self.rank == 0:
            self.board.post.remote(event)
