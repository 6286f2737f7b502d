"""A worker of `cappy train`: read pairs, run the training loop, log, validate and write checkpoints. Ray Train starts it.

The position in the data and the random draws are functions of the step number. A checkpoint stores no other state of them.
"""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
import torch

from cluster import models
from cluster.config import Config
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from training import batch_plan, blend, checkpoint, cross_fit, flops, loop, selection_fit, stream, validation
from training.batch_plan import Size
from training.best_checkpoint import BestWeights
from training.consensus import consensus_metric
from training.encoding import encode_pairs
from training.records import BlendRecord, Event, Job, MetricsLine, Position, Progress
from training.scorer import Scorer, load_tokenizer, new_model, pick_dtype

_LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl and updates of the progress bar
_SELECTION_ROWS = 2000  # held-out instructions that a selection is fitted on
_VALIDATION_ROWS = 64  # instructions per validation batch of a worker


def train(job: Job) -> None:
    """Train on this worker. Raises `CappyError` for an error that the operator must correct."""
    _Worker(Config.model_validate(job["config"]), job).train()


class _Worker:
    """The model, optimizer and progress of one worker."""

    def __init__(self, config: Config, job: Job) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(job["threads"] or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
        self.config, self.size, self.channel = config, Size(*job["size"]), job["channel"]
        self.device: torch.device = ray.train.torch.get_device()
        self.dtype = pick_dtype(config.scorer.dtype, self.device)
        self.dataset = RegressionSet(config.dataset_uri, verified=True)  # by the driver
        folder = models.resolve(config.scorer.encoder, "scorer.encoder")
        self.model = new_model(folder, config.scorer, config.training, config.seed).to(self.device)
        self.tokenizer = load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
        self.sharded = config.training.parallel == "fsdp" and self.world > 1
        # A forward pass through sharded weights needs all workers, so scoring uses a whole copy of the model.
        whole = copy.deepcopy(self.model) if self.sharded else self.model
        self.scorer = Scorer(whole, self.tokenizer, config.scorer.max_length, self.dtype, self.device, config.scorer.format)
        self.flops, self.peak_flops = flops.FlopCounter(self.model), flops.device_peak_flops(self.device)
        if self.sharded:
            loop.shard_model(self.model)
        self.optimizer = loop.new_optimizer(self.model, config.training)
        self.steps_per_epoch = batch_plan.steps_in_epoch(self.size, config.training)
        self.total = self.steps_per_epoch * config.training.epochs
        self.checkpoints = job["checkpoints"]
        self.writer = checkpoint.CheckpointWriter(
            self.checkpoints, config.training.checkpoints_kept, job["claim"].successor, job["claim"].check
        )
        self.stop = loop.StopConsensus(self.world)
        threading.Thread(target=self._forward_stop_request, name="cappy-stop", daemon=True).start()
        self.best = BestWeights(self.checkpoints, config.training, writes=self.rank == 0)
        self.metrics: list[str] = []
        self.progress: Progress = {
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
            "best": self.best.record,
            "blend": None,
            "selection": None,
            "finished": False,
        }

    def train(self) -> None:
        """Resume from the newest valid checkpoint and train to the end of the last epoch, or until a stop is requested."""
        if not self._resume():
            # Before step 1: a validation or a store that does not work should fail before training time is spent.
            self._validate(first_batch_only=True)
            self._save()
            self.writer.finish()
        if self.progress["finished"]:
            return
        self._post(step=self.progress["step"])
        training = self.config.training
        unlogged: list[loop.StepResult] = []
        since = time.monotonic()
        steps = batch_plan.plan_steps(
            stream.prefetch(self._windows()), training, self.config.seed, self.rank, self.world, self.progress["step"], self.size
        )
        results = loop.fit(
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
        stopping = stops_early = False
        for result in results:
            unlogged.append(result)
            stopping = self.stop.reached()
            taken = result.index + 1
            ends_epoch = taken % self.steps_per_epoch == 0
            saves = stopping or taken % training.checkpoint_every == 0
            last = taken == self.total
            validates = last or (ends_epoch if training.validate_every is None else taken % training.validate_every == 0)
            if ends_epoch or saves or validates or taken % _LOG_EVERY == 0:
                self._log_steps(unlogged, time.monotonic() - since)
                if ends_epoch:
                    self._end_epoch(result.epoch)
                if validates:
                    stops_early = self._validate_and_keep_best(result.epoch)
                if last or stops_early:
                    self._finish()
                if ends_epoch or saves or validates:
                    self._save()
                unlogged, since = [], time.monotonic()
            if stopping or stops_early:
                break
        self.writer.finish()
        if not self.progress["finished"] and not stopping:
            raise CappyError(
                f"dataset={self.dataset.uri} changed while it was read: it gave {self.progress['step']} steps of {self.total}; "
                f"run the same command again"
            )

    def _resume(self) -> bool:
        """Restore the newest valid checkpoint. Return False when there is none."""
        state = checkpoint.read_newest(self.checkpoints, lambda warning: self._post(log=warning))
        step = state.step if state else -1
        if loop.sum_over_workers([step], self.world, self.device)[0] != step * self.world:
            raise RuntimeError("the workers found different checkpoints")  # Ray Train starts them again
        if state is None:
            return False
        if state.trainer_state["position"] != self._position(step):
            raise CappyError(
                f"{self.checkpoints} was written by a version that orders the data differently; finish the run with that version, "
                f"or use --overwrite"
            )
        checkpoint.restore(state, self.model, self.optimizer)
        self.progress, self.metrics = state.trainer_state["progress"], state.lines
        self.best.record = self.progress["best"]
        if step:
            self._post(log=f"resuming from step {step} of {self.total}")
        return True

    def _position(self, step: int) -> Position:
        """Return the place of step `step` in the data and in the schedule."""
        epoch, window, within = batch_plan.position(step, self.size, self.config.training)
        return {"epoch": epoch, "window": window, "step_in_window": within, "total": self.total}

    def _forward_stop_request(self) -> None:
        import ray

        ray.get(self.channel.wait_for_stop.remote())
        self.stop.request()

    def _windows(self) -> Iterator[batch_plan.Window]:
        """Yield tokenised windows of all epochs, from the window of the next step."""
        training, scorer = self.config.training, self.config.scorer
        chat = self.scorer.format == "chat"
        tokenizer = copy.deepcopy(self.tokenizer)  # this runs in another thread, and a tokenizer is not thread-safe
        size = batch_plan.window_size(self.size, training)
        first, skip, _ = batch_plan.position(self.progress["step"], self.size, training)
        for epoch in range(first, training.epochs):
            windows = stream.read_windows(
                self.dataset, "train", size, self.config.seed, epoch, skip, training.objective.grouped, training.selection_share
            )
            for number, pairs in enumerate(windows, skip):
                encoded = encode_pairs(tokenizer, pairs.instructions, pairs.responses, scorer.max_length, chat=chat)
                yield batch_plan.Window(epoch, number, encoded, pairs.labels, pairs.groups)
            skip = 0

    def _log_steps(self, results: list[loop.StepResult], seconds: float) -> None:
        """Add the steps since the last line, which took `seconds`, to the progress and the log. A collective operation."""
        mine = [torch.stack([torch.stack([result.loss, result.squared_error]) for result in results]).cpu().numpy().ravel()]
        mine.append(np.sum([[result.tokens, result.padded_tokens, result.squared_lengths] for result in results], axis=0))
        summed = loop.sum_over_workers(np.concatenate(mine), self.world, self.device)
        losses, errors = summed[:-3].reshape(-1, 2).T.tolist()
        tokens, padded_tokens, squared_lengths = summed[-3:].tolist()
        last, progress = results[-1], self.progress
        if not np.isfinite(losses).all():
            raise CappyError(
                f"the loss is {next(loss for loss in losses if not np.isfinite(loss))} near step {last.index}; lower "
                f"training.learning_rate (now {self.config.training.learning_rate:g})"
            )
        pairs = sum(result.size for result in results)
        progress["step"] = last.index + 1
        progress["trained"] += pairs
        progress["seconds"] += seconds
        for error, result in zip(errors, results, strict=True):  # one by one: the rounding must not depend on where a run stopped
            progress["epoch_errors"] += error * result.size
        progress["epoch_pairs"] += pairs
        if last.epoch == 0:
            progress["cut_pairs"] += sum(result.cut for result in results)
        norm = float(torch.stack([result.gradient_norm for result in results]).double().mean())
        line: MetricsLine = {
            "step": last.index + 1,
            "epoch": last.epoch,
            "loss": sum(loss * result.size for loss, result in zip(losses, results, strict=True)) / pairs,
            "gradient_norm": norm if np.isfinite(norm) else None,  # JSON has no infinity
            "learning_rate": last.learning_rate,
            "pairs_per_second": round(pairs / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding_share": round(1 - tokens / padded_tokens, 4),
        }
        note = f"loss {line['loss']:.4f}  gradient norm {norm:.3g}  padding {line['padding_share']:.1%}"
        if self.peak_flops:
            line["mfu"] = round(self.flops(tokens, squared_lengths) / seconds / self.peak_flops / self.world, 4)
            note += f"  MFU {line['mfu']:.1%}"
        self._write_line(line)
        self._post(step=last.index + 1, note=note, pairs=pairs, tokens=int(tokens))

    def _end_epoch(self, epoch: int) -> None:
        progress = self.progress
        progress["train_mse"] = progress["epoch_errors"] / progress["epoch_pairs"]
        progress["epoch_errors"], progress["epoch_pairs"] = 0.0, 0
        self._post(log=f"epoch {epoch + 1} of {self.config.training.epochs}: train mse {progress['train_mse']:.4f}")

    def _validate_and_keep_best(self, epoch: int) -> bool:
        """Validate, and keep the weights when they are the best so far. Return True when `training.patience` is exhausted."""
        sums = self._validate()
        if sums is None:
            return False
        progress, step, metrics = self.progress, self.progress["step"], sums.metrics()
        is_best = self.best.add(metrics, step, lambda: checkpoint.copy_weights(self.model))
        if is_best or self.best.record["step"] is None:
            progress["validation"], progress["calibration"] = metrics, sums.calibration()
        progress["best"] = self.best.record
        self._write_line({"step": step, "epoch": epoch, "validation": metrics})
        shown = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items() if name != "pairs" and value is not None]
        self._post(log=f"step {step} of {self.total}: validation {', '.join(shown)}")
        if step == self.total or not self.best.patience_is_exhausted():
            return False
        self._post(log=f"early stopping: {self.best.record['metric']} was best after step {self.best.record['step']}")
        return True

    def _finish(self) -> None:
        """Load the weights to publish, and fit the blend's weight and the selection with them. The last checkpoint contains all."""
        loop.sum_over_workers([0.0], self.world, self.device)  # a barrier: the first worker has written the file of weights
        weights = self.best.weights()
        if weights is not None:
            checkpoint.restore_weights(weights, self.model, f"the best weights, of step {self.best.record['step']},")
        self.progress["blend"] = self._fit_blend()
        self.progress["selection"] = self._fit_selection()
        self.progress["finished"] = True

    def _fit_blend(self) -> BlendRecord | None:
        """Fit the blend's weight on train rows spread over the split. Return None when they have no log-probabilities."""
        wanted = self.config.training.blend_rows
        if not wanted:
            return None
        self._prepare_scoring()
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

    def _fit_selection(self) -> dict[str, Any] | None:
        """Fit a selection on the held-out instructions; return the content of its file. None if it is turned off or cannot be fitted."""
        share = self.config.training.selection_share
        if not share:
            return None
        self._prepare_scoring()
        rows = stream.read_held_out(self.dataset, "train", self.config.seed, share, _SELECTION_ROWS)
        sizes = [len(candidates) for candidates in rows["candidates"].to_pylist()]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        scores = np.zeros(offsets[-1])
        mine = np.arange(self.rank, len(rows), self.world)
        for row, values in zip(mine, cross_fit.score_candidates(rows.take(pa.array(mine)), self.scorer.score), strict=True):
            scores[offsets[row] : offsets[row + 1]] = values
        scores = loop.sum_over_workers(scores, self.world, self.device)
        metric = consensus_metric(self.dataset.manifest.get("metric"))
        fitted = selection_fit.fit_on_rows(rows, np.split(scores, offsets[1:-1]), metric, made={"scores": "held out", "share": share})
        return None if fitted is None else fitted.selection.to_json()

    def _prepare_scoring(self) -> None:
        if self.sharded:
            self.scorer.model.load_state_dict(checkpoint.copy_weights(self.model), strict=False)
        self.scorer.model.eval()

    def _validate(self, first_batch_only: bool = False) -> validation.ValidationSums | None:
        """Score the validation split, divided over the workers. Return None when it is empty."""
        if not self.dataset.rows("validation"):
            return None
        self._prepare_scoring()
        sums = validation.EMPTY_SUMS
        greedy = self.dataset.greedy()
        rows = 2 if first_batch_only else _VALIDATION_ROWS
        for number, table in enumerate(self.dataset.batches("validation", rows, ["instruction", "candidates"])):
            if number % self.world == self.rank or first_batch_only:
                sums += validation.measure_scores(table, self.scorer.score, greedy)
            if first_batch_only:
                break
        return validation.ValidationSums(loop.sum_over_workers(sums.values, self.world, self.device))

    def _save(self) -> None:
        """Copy the state and start to write it on the first worker. The other workers contribute their shards."""
        # A run that stopped early is complete, so its checkpoint is that of the last step.
        step = self.total if self.progress["finished"] else self.progress["step"]
        state = checkpoint.capture(
            self.model,
            self.optimizer,
            step,
            {"progress": self.progress, "position": self._position(step)},
            self.metrics,
            keep=self.rank == 0,
        )
        if state:
            self.writer.save(state)

    def _write_line(self, line: MetricsLine) -> None:
        self.metrics.append(json.dumps(line))
        self._post(line=line)

    def _post(self, **event: Unpack[Event]) -> None:
        if self.rank == 0:
            self.channel.post.remote(event)
