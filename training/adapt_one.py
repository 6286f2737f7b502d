"""Adapt a scorer to one task: collect its pairs, cross-validate, decide the gate, fine-tune, publish. No Ray.

The pairs follow the recipe of the Cappy paper. Correct responses have label 1. As many correct responses of other instructions of
the task have label 0. The LLM's samples have their Rouge-L. `cappy generate` has labelled them all. Repeats are removed, then the
pairs are repeated or cut to `adapt.pairs`. The selection of rows is a function of (seed, row).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict, cast

import numpy as np
import pyarrow as pa
import torch

from cluster import artifacts, folder_writer, models, storage
from cluster.config import Config, LabelConfig, TrainingConfig
from cluster.errors import CappyError
from generation.dataset import Pairs, RegressionSet
from training import batch_plan, cross_fit, gate, loop, lora, model_card, selection, selection_fit, validation
from training.batch_plan import Size
from training.consensus import consensus_metric
from training.records import GateDecision, Metrics, MetricsLine, Outcome, TaskPoints
from training.scorer import CHECKPOINTS, Scorer, load_tokenizer, new_model, read_format
from training.task_rows import LeftOut, candidate_rows, collect_pairs, epoch_order, only_references
from training.validation import Floats

RESULTS = "results.json"
_LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl


@dataclass(frozen=True)
class Base:
    """The model that every task starts from."""

    name: str
    """A scorer or, when `scorer` is False, a plain encoder that gets a new head."""
    scorer: bool
    sha256: str
    """SHA-256 of its weights."""
    writer: str | None
    """The `writer` of its manifest; None without a manifest."""
    max_length: int
    """Limit of instruction plus response, in tokens."""


@dataclass(frozen=True)
class Task:
    """One task of a run."""

    name: str
    dataset: str | None
    """The `dataset` of its rows; None for all rows."""
    uri: str
    """Folder of its scorer and its `results.json`."""
    identity: dict[str, Any]
    """The settings and data that decide the outcome, as a plain tree."""


class FitResult(TypedDict):
    """The measurements of a task's fine-tuning."""

    steps: int
    pairs: int
    """Pairs trained on, over all epochs, repeats counted."""
    cut_pairs: int
    """Pairs cut to the length limit in the first epoch."""
    learning_rate: float
    train_mse: float
    """Of the last epoch, during training."""
    trained_parameters: int
    pairs_per_second: float


def adapt_task(
    config: Config, task: Task, base: Base, *, threads: int = 1, gpu: bool = False, check: Callable[[], None] = lambda: None
) -> Outcome:
    """Adapt the base to one task, publish the scorer if it passes the gate, write `results.json` and return the outcome.

    The outcome's `state` is `published` or `rejected`. `check` is called before each write; it raises when the run has lost its
    lease. `threads` is the number of torch threads.

    Raises `CappyError` when the task has no train rows, when the gate has no rows, or when the loss is not finite.
    """
    start = time.monotonic()
    torch.set_num_threads(threads)
    earlier = read_outcome(task)
    if earlier and earlier["identity"] == task.identity:  # Ray repeats a task whose node was lost at its end
        return earlier
    dataset = RegressionSet(config.dataset_uri, verified=True)  # by the driver
    whole = config.training.objective.grouped
    pairs, train_rows = collect_pairs(dataset, task.dataset, config.adapt.pairs, config.seed, whole=whole)
    if not len(pairs):
        raise CappyError(f"no train rows of {task.name} in dataset={dataset.uri}; generate some, or remove the task from adapt.tasks")
    rows = candidate_rows(dataset, "validation", task.dataset, config.adapt.validation_rows, config.seed)
    held_out = _rows_to_hold_out(config, dataset, task)
    if config.adapt.gate and held_out is None and not len(rows):
        raise CappyError(_no_gate_rows(config, task))
    # Without cross-validation the gate takes a part of the validation rows.
    deciding, reporting = gate.split_validation_rows(rows, config.adapt.gate_fraction) if held_out is None else (rows[:0], rows)
    tables = [table for table in (deciding, reporting) if len(table)]
    metric = consensus_metric(dataset.manifest.get("metric"))
    training = config.adapt.training(config.training)
    device = torch.device("cuda" if gpu else "cpu")
    scorer, wrapped = load_trainable(config, training, base, device)
    before = _measure(scorer.score, tables, dataset.greedy())
    decision: GateDecision | None = None
    fitted: selection.Selection | None = None
    if held_out is not None:
        base_scores = cross_fit.score_candidates(held_out, scorer.score)
        fold_scores = _cross_fit(config, task, base, dataset, held_out, train_rows, device)
        decision, fitted = _decide(config, base, held_out, base_scores, fold_scores, metric)
    fit_result, lines = _fit(scorer, pairs, training, config, config.adapt.pairs)
    if decision and decision.get("weights") == "base":
        scorer, wrapped = load_trainable(config, training, base, device)
    scorer.model.eval()
    score = cross_fit.remember(scorer.score)
    after = _measure(score, tables, dataset.greedy())
    points: TaskPoints | None = None
    if tables:
        if decision is None:
            decision = {**gate.decide_gate(before[0], after[0], config.adapt), "rows": len(deciding), "split": "validation"}
        picked = gate.row_values(reporting, cross_fit.score_candidates(reporting, score), "selection", fitted) if fitted else None
        points = {
            **gate.summarise_points(before[-1], after[-1], picked),
            "rows": len(reporting),
            "apart": reporting is not rows or not len(deciding),
        }
    passed = decision is not None and decision["passed"]
    state: Literal["published", "rejected"] = "published" if passed or not config.adapt.gate else "rejected"
    result: Outcome = {
        "task": task.name,
        "dataset": task.dataset,
        "state": state,
        "uri": task.uri if state == "published" else None,
        "use": task.uri if state == "published" else base.name if base.scorer else None,
        "base": asdict(base),
        "method": config.adapt.method,
        "train_rows": train_rows,
        "distinct_pairs": len(pairs),
        "steps": fit_result["steps"],
        "pairs": fit_result["pairs"],
        "cut_pairs": fit_result["cut_pairs"],
        "learning_rate": fit_result["learning_rate"],
        "train_mse": fit_result["train_mse"],
        "trained_parameters": fit_result["trained_parameters"],
        "pairs_per_second": fit_result["pairs_per_second"],
        "gate": decision,
        "selection": selection.summarise(fitted),
        "figures": points,
        "label": dataset.manifest.get("metric", {}).get("name", "rouge_l"),
        "seconds": round(time.monotonic() - start, 1),
        "identity": task.identity,
    }
    if state == "published":
        return _publish(config, task, base, scorer, wrapped, result, lines, dataset, fitted, check)
    folder_writer.FolderWriter(task.uri, check).write_json(RESULTS, result)
    return result


def _decide(
    config: Config, base: Base, held_out: pa.Table, base_scores: list[Floats], fold_scores: list[Floats], metric: LabelConfig
) -> tuple[GateDecision, selection.Selection | None]:
    """Return the decision of the gate, and the selection that is fitted on the held-out scores of the published weights."""
    of_base = selection.read(str(models.resolve(base.name, "adapt.base", adapters=True))) if base.scorer else None
    before = gate.row_values(held_out, base_scores, config.adapt.metric, of_base)

    def fit(scores: list[Floats], trainings: int) -> tuple[selection.Selection | None, Floats]:
        """Return the selection fitted on held-out scores, and the values of its held-out picks or of the scores alone."""
        by_score = gate.row_values(held_out, scores, config.adapt.metric)
        fitted = selection_fit.fit_on_rows(held_out, scores, metric, of_base, {"scores": "held out", "trainings": trainings})
        if fitted is None or config.adapt.metric != "selection":
            return fitted.selection if fitted else None, by_score
        return fitted.selection, np.where(np.isnan(fitted.picked), by_score, fitted.picked)

    adapted, values = fit(fold_scores, config.adapt.folds)
    # A plain encoder has an untrained head: its scores mean nothing.
    kept, kept_values = fit(base_scores, 0) if base.scorer and config.adapt.gate and config.adapt.metric == "selection" else (None, None)
    decision = gate.decide_on_rows(before, values, config.adapt, kept_values if kept else None)
    return decision, kept if decision.get("weights") == "base" else adapted


def read_outcome(task: Task) -> Outcome | None:
    """Return the outcome of an earlier run for a task, with any settings; None when no run finished the task."""
    if storage.exists(storage.join(task.uri, artifacts.MANIFEST)):
        manifest = artifacts.read_manifest(task.uri, "scorer", "adapt")
        if "identity" not in manifest:
            raise CappyError(f"{task.uri} holds a scorer that `cappy adapt` did not write; choose another adapted_path")
        return cast("Outcome", {**manifest["summary"], "identity": manifest["identity"]})
    try:
        found = storage.read_json(storage.join(task.uri, RESULTS))
    except (FileNotFoundError, ValueError):
        return None
    rejected = isinstance(found, dict) and found.get("state") == "rejected" and "identity" in found
    # Any other file belongs to a run that was lost before it wrote the manifest, or was not written by `cappy adapt`.
    return cast("Outcome", dict(found)) if rejected else None


def _rows_to_hold_out(config: Config, dataset: RegressionSet, task: Task) -> pa.Table | None:
    """Return the train rows that cross-validation scores; None if it is turned off, or if a task has fewer than two instructions."""
    if not config.adapt.folds:
        return None
    rows = candidate_rows(dataset, "train", task.dataset, config.adapt.validation_rows, config.seed)
    return rows if len(set(rows["instruction"].to_pylist())) > 1 else None


def _no_gate_rows(config: Config, task: Task) -> str:
    wanted = "validation rows" if not config.adapt.folds else "train rows for cross-validation and no validation rows"
    return (
        f"no {wanted} of {task.name} with candidates in dataset={config.dataset_uri}, so adapt.gate=true cannot compare; "
        f"generate some, or set adapt.gate=false to publish without a gate"
    )


def _cross_fit(
    config: Config, task: Task, base: Base, dataset: RegressionSet, held_out: pa.Table, train_rows: int, device: torch.device
) -> list[Floats]:
    """Return the scores of the candidates of each row by a scorer that was trained without its instruction; `cross_fit` has the shapes.

    The training of a fold has fewer pairs, in proportion to its rows, so that a pair is repeated as often as in the published training.
    """
    training = config.adapt.training(config.training)

    def train(instructions: frozenset[str]) -> cross_fit.Score:
        left_out = LeftOut(instructions, only_references(dataset, task.dataset, instructions))
        whole = training.objective.grouped
        pairs, left = collect_pairs(dataset, task.dataset, config.adapt.pairs, config.seed, left_out, whole=whole)
        scorer, _ = load_trainable(config, training, base, device)
        _fit(scorer, pairs, training, config, max(round(config.adapt.pairs * left / train_rows), 1))
        return scorer.score

    return cross_fit.cross_fit(held_out, config.adapt.folds, config.seed, train)


def _measure(score: cross_fit.Score, tables: Sequence[pa.Table], greedy: str | None) -> list[Metrics]:
    return [validation.measure_scores(table, score, greedy).metrics() for table in tables]


def load_trainable(config: Config, training: TrainingConfig, base: Base, device: torch.device) -> tuple[Scorer, Any]:
    """Return the base as a trainable scorer and, for `adapt.method: lora`, peft's model around it (else None)."""
    setting = "adapt.base" if base.scorer else "scorer.encoder"
    folder = models.resolve(base.name, setting)
    settings = config.scorer.model_copy(update={"encoder": base.name, "max_length": base.max_length})
    model = new_model(folder, settings, training, config.seed)
    wrapped = lora.add_adapters(model, config.adapt.lora, config.seed) if config.adapt.method == "lora" else None
    known = read_format(model.config) or config.scorer.format
    return Scorer(model, load_tokenizer(folder, base.name, setting), base.max_length, config.scorer.dtype, device, known), wrapped


def _fit(scorer: Scorer, pairs: Pairs, training: TrainingConfig, config: Config, count: int) -> tuple[FitResult, list[MetricsLine]]:
    """Train the scorer's model on about `count` pairs per epoch: `pairs`, repeated or cut.

    An objective that compares the candidates of an instruction repeats or cuts whole instructions. Return the measurements, and a line
    of metrics.jsonl for every `_LOG_EVERY` steps.
    """
    instructions = len(np.unique(pairs.groups))
    size = Size(count, max(round(count * instructions / len(pairs)), 1))
    windows = _windows(scorer, pairs, size, training, config.seed)
    steps = batch_plan.plan_steps(windows, training, config.seed, rank=0, world=1, first=0, size=size)
    total = batch_plan.steps_in_epoch(size, training) * training.epochs
    pad_id = scorer.tokenizer.pad_token_id
    lines: list[MetricsLine] = []
    losses: list[tuple[float, int]] = []
    norms: list[float] = []
    cut = 0
    start = time.monotonic()
    optimizer = loop.new_optimizer(scorer.model, training)
    for result in loop.fit(scorer.model, steps, optimizer, training, total=total, seed=config.seed, pad_id=pad_id, dtype=scorer.dtype):
        losses.append((float(result.squared_error), result.size))
        norms.append(float(result.gradient_norm))
        cut += result.cut if result.epoch == 0 else 0
        if not math.isfinite(losses[-1][0]):
            raise CappyError(
                f"the loss is {losses[-1][0]} at step {result.index}; lower adapt.learning_rate (now {training.learning_rate:g})"
            )
        if (result.index + 1) % _LOG_EVERY == 0 or result.index + 1 == total:
            first = len(lines) * _LOG_EVERY
            norm = sum(norms[first:]) / len(norms[first:])
            lines.append(
                {
                    "step": result.index + 1,
                    "epoch": result.epoch,
                    "loss": _mean(losses[first:]),
                    "gradient_norm": norm if math.isfinite(norm) else None,  # JSON has no infinity
                }
            )
    scorer.model.eval()
    seconds = time.monotonic() - start
    seen = sum(pairs_of_step for _, pairs_of_step in losses)
    return {
        "steps": total,
        "pairs": seen,
        "cut_pairs": cut,
        "learning_rate": training.learning_rate,
        "train_mse": _mean(losses[-(total // training.epochs) :]),
        "trained_parameters": sum(each.numel() for each in scorer.model.parameters() if each.requires_grad),
        "pairs_per_second": round(seen / max(seconds, 1e-9), 1),
    }, lines


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    """Return the mean over pairs of (mean loss of a step, pairs of the step)."""
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def _windows(scorer: Scorer, pairs: Pairs, size: Size, training: TrainingConfig, seed: int) -> Iterator[batch_plan.Window]:
    """Yield tokenised windows of all epochs. An epoch has `size.pairs` pairs, or `size.instructions` whole instructions."""
    if training.objective.grouped:
        members, count = batch_plan.rows_by_group(pairs.groups), size.instructions
    else:
        members, count = list(np.arange(len(pairs))[:, None]), size.pairs
    held = batch_plan.window_size(size, training)
    for epoch in range(training.epochs):
        order = epoch_order(len(members), count, seed, epoch)
        for number, start in enumerate(range(0, count, held)):
            chosen = [members[item] for item in order[start : start + held]]
            rows = np.concatenate(chosen)
            encoded = scorer.encode([pairs.instructions[row] for row in rows], [pairs.responses[row] for row in rows])
            # A repeated instruction is a separate group.
            groups = np.repeat(np.arange(len(chosen)), [len(each) for each in chosen])
            yield batch_plan.Window(epoch, number, encoded, pairs.labels[rows], groups)


def _publish(
    config: Config,
    task: Task,
    base: Base,
    scorer: Scorer,
    wrapped: Any,
    result: Outcome,
    lines: list[MetricsLine],
    dataset: RegressionSet,
    fitted: selection.Selection | None,
    check: Callable[[], None],
) -> Outcome:
    """Write the scorer or its adapters, card, metrics, config and outcome, then the manifest. Return the outcome."""
    target = storage.new_temporary_folder("adapted")
    unfinished = storage.join(task.uri, CHECKPOINTS, "adapting")
    try:
        if wrapped is None:
            scorer.save(target)
        else:
            lora.save_adapters(wrapped, {"uri": base.name, "sha256": base.sha256, "writer": base.writer}, target)
        result = {**result, "bytes": sum(file.stat().st_size for file in target.glob("*.safetensors"))}
        (target / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        (target / "loss.svg").write_bytes(model_card.plot_loss(lines))
        (target / "README.md").write_text(model_card.render_adapted_card(config, result), encoding="utf-8")
        (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        if fitted is not None:
            (target / selection.FILE).write_text(selection.to_text(fitted), encoding="utf-8")
        (target / RESULTS).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        # Readers refuse a folder with this marker and without a manifest.
        check()
        storage.write_bytes(unfinished, b"")
        files = folder_writer.FolderWriter(task.uri, check).upload_folder(target)
        artifacts.publish_folder(
            task.uri,
            "scorer",
            dataset={"uri": dataset.uri, "writer": dataset.manifest.get("writer")},
            encoder=config.scorer.encoder,
            base=asdict(base),
            identity=task.identity,
            summary={key: value for key, value in result.items() if key != "identity"},
            config=config,
            files=files,
            check=check,
        )
    finally:
        shutil.rmtree(target)
    artifacts.cleanup(storage.join(task.uri, CHECKPOINTS), check)
    return result
