"""Adapting a scorer to one task: its pairs, its fine-tuning, what it gains on the task's validation rows, the gate. No Ray.

The task's set follows the paper's recipe: correct responses at 1, as many of other instructions of the task at 0, the LLM's
samples at their Rouge-L, all of which `cappy generate` has labelled already; repeats are left out, then the pairs repeated or
cut to `adapt.pairs`. Which rows are taken is a function of (seed, row) alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from cluster import artifacts, folder_writer, models, storage
from cluster.config import AdaptConfig, Config, TrainingConfig
from cluster.errors import CappyError
from cluster.runtime import code_version
from generation.dataset import Pairs, RegressionSet, explode
from generation.schema import DATASET
from training import batch_plan, loop, lora, model_card, validation
from training.batch_plan import Size
from training.encoding import encode_pairs
from training.scorer import CHECKPOINTS, Scorer, load_tokenizer, new_model

RESULTS = "results.json"
_COLUMNS = ("id", "dataset", "instruction", "candidates")
_LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl
T = TypeVar("T")
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Base:
    """What every task starts from."""

    name: str
    """A scorer, or where `scorer` is False a plain encoder, on which a new head is drawn."""
    scorer: bool
    sha256: str
    """Of its weights."""
    writer: str | None
    """Who published it, from its manifest; null for what is not ours."""
    max_length: int
    """Tokens of instruction plus response."""


@dataclass(frozen=True)
class Task:
    """One task of a run."""

    name: str
    dataset: str | None
    """The rows it has, by their `dataset`; null is all rows."""
    uri: str
    """Where its scorer and `results.json` go."""
    identity: dict[str, Any]
    """What decides the outcome, as a plain tree."""


def adapt_task(
    config: Config, task: Task, base: Base, *, threads: int = 1, gpu: bool = False, check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Adapt to one task, publish the scorer if the gate lets it pass, and return the outcome, which `results.json` keeps.

    The outcome's `state` is `published` or `rejected`. `check` is called before each write and raises where the run has lost its
    lease. Raises `CappyError` where the task has no train rows, nothing for the
    gate to compare, or a loss that is no number.
    """
    start = time.monotonic()
    torch.set_num_threads(threads)
    done = read_outcome(task)
    if done and done["identity"] == task.identity:  # Ray runs a task again when its node is lost as it ends
        return done
    dataset = RegressionSet(config.dataset_uri)
    pairs, train_rows = collect_pairs(dataset, task.dataset, config.adapt.pairs, config.seed)
    if not len(pairs):
        raise CappyError(f"no train rows of {task.name} in dataset={dataset.uri}; generate some, or leave it out of adapt.tasks")
    rows = validation_rows(dataset, task.dataset, config.adapt.validation_rows, config.seed)
    if config.adapt.gate and not len(rows):
        raise CappyError(
            f"no validation rows of {task.name} with candidates to pick from in dataset={dataset.uri}, so the gate cannot compare; "
            f"generate some, or publish without by adapt.gate=false"
        )
    tables: tuple[pa.Table, ...] = split_validation_rows(rows, config.adapt.gate_fraction) if len(rows) else ()
    training = config.adapt.training(config.training)
    scorer, wrapped = load_trainable(config, training, base, torch.device("cuda" if gpu else "cpu"))
    before = _measure(scorer, tables, dataset.greedy())
    trained, lines = _fit(scorer, pairs, training, config)
    after = _measure(scorer, tables, dataset.greedy())
    judged = decide_gate(before[0], after[0], config.adapt) if tables else None
    passed = judged is not None and judged["passed"]
    state = "published" if passed or not config.adapt.gate else "rejected"
    result = {
        "task": task.name,
        "dataset": task.dataset,
        "state": state,
        "uri": task.uri if state == "published" else None,
        "use": task.uri if state == "published" else base.name if base.scorer else None,
        "base": asdict(base),
        "method": config.adapt.method,
        "train_rows": train_rows,
        "distinct_pairs": len(pairs),
        **trained,
        "gate": judged and {**judged, "rows": len(tables[0])},
        "figures": summarise_points(before[1], after[1]) | {"rows": len(tables[1]), "apart": tables[1] is not rows} if tables else None,
        "label": dataset.manifest.get("metric", {}).get("name", "rouge_l"),
        "seconds": round(time.monotonic() - start, 1),
        "identity": task.identity,
    }
    if state == "published":
        return _publish(config, task, base, scorer, wrapped, result, lines, dataset, check)
    folder_writer.FolderWriter(task.uri, check).write_json(RESULTS, result)
    return result


def read_outcome(task: Task) -> dict[str, Any] | None:
    """Return what an earlier run found for a task, whatever its settings; None where none came to an end."""
    if storage.exists(storage.join(task.uri, artifacts.MANIFEST)):
        manifest = artifacts.read_manifest(task.uri, "scorer", "adapt")
        if "identity" not in manifest:
            raise CappyError(f"{task.uri} holds a scorer that `cappy adapt` did not write; choose another adapted_path")
        return {**manifest["summary"], "identity": manifest["identity"]}
    try:
        found = storage.read_json(storage.join(task.uri, RESULTS))
    except (FileNotFoundError, ValueError):
        return None
    rejected = isinstance(found, dict) and found.get("state") == "rejected" and "identity" in found
    return dict(found) if rejected else None  # else it was lost before its manifest was written, or is not ours


def collect_pairs(dataset: RegressionSet, only: str | None, size: int, seed: int) -> tuple[Pairs, int]:
    """Return a task's distinct train pairs, at most `size` of them, chosen and ordered by hash; and the task's train rows.

    Pairs of the same texts in several rows are one, with the best of its labels. Holds twice `size` pairs in memory.
    """
    found: dict[bytes, tuple[str, str, float]] = {}
    seen = 0
    for table in dataset.batches("train", columns=_COLUMNS, only=only):
        seen += table.num_rows
        exploded = explode(table)
        for instruction, response, label in zip(exploded.instructions, exploded.responses, exploded.labels.tolist(), strict=True):
            key = _key(seed, instruction, response)
            found[key] = (instruction, response, max(label, found[key][2] if key in found else 0.0))
        if len(found) > 2 * size:
            found = _first(found, size)
    chosen = list(_first(found, size).values())
    instructions = [instruction for instruction, _, _ in chosen]
    numbers = {instruction: number for number, instruction in enumerate(dict.fromkeys(instructions))}
    groups = np.fromiter((numbers[instruction] for instruction in instructions), np.int64, len(instructions))
    labels = np.array([label for _, _, label in chosen], np.float32)
    return Pairs(instructions, [response for _, response, _ in chosen], labels, groups), seen


def validation_rows(dataset: RegressionSet, only: str | None, size: int, seed: int) -> pa.Table:
    """Return a task's validation rows that have candidates to pick from, at most `size` of them, chosen and ordered by hash.

    These are the LLM's samples, or the answer choices where a row has them.
    """
    found: dict[bytes, dict[str, Any]] = {}
    for table in dataset.batches("validation", columns=_COLUMNS, only=only):
        for row in table.to_pylist():
            if any(each["source"] in ("sampled", "choice") for each in row["candidates"]):
                found[_key(seed, row["id"])] = row
        if len(found) > 2 * size:
            found = _first(found, size)
    return pa.Table.from_pylist(list(_first(found, size).values()), pa.schema([DATASET.field(name) for name in _COLUMNS]))


def _key(seed: int, *texts: str) -> bytes:
    return hashlib.blake2b("\0".join([str(seed), *texts]).encode(), digest_size=12).digest()


def _first(found: dict[bytes, T], size: int) -> dict[bytes, T]:
    return dict(sorted(found.items())[:size])


def epoch_order(distinct: int, count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch, int64 (count,): positions of the distinct pairs, all of them shuffled, again and again."""
    draw = np.random.default_rng([seed, epoch, 4])
    return np.concatenate([draw.permutation(distinct) for _ in range(-(-count // distinct))])[:count]


def split_validation_rows(rows: pa.Table, fraction: float) -> tuple[pa.Table, pa.Table]:
    """Return the rows the gate decides on, the first `fraction` (they stand in the order of a hash), and those the figures are of.

    The figures are of the same rows where the gate has taken all.
    """
    deciding = math.ceil(fraction * len(rows))
    return rows[:deciding], rows[deciding:] if deciding < len(rows) else rows


def decide_gate(before: Metrics, after: Metrics, settings: AdaptConfig) -> dict[str, Any]:
    """Return what the gate decides on these metrics of its rows: `before`, `after` and `gain` in points (0 to 100), and `passed`.

    Null, and not passed, where the rows have nothing that tells candidates apart.
    """
    old, new = _points(before, settings.metric), _points(after, settings.metric)
    gain = None if old is None or new is None else new - old
    passed = gain is not None and gain > 0 and gain >= settings.min_gain
    return {"metric": settings.metric, "before": old, "after": new, "gain": gain, "passed": passed}


def summarise_points(before: Metrics, after: Metrics) -> dict[str, Any]:
    """Return the figures of a table's line, in points: the picks of the base, of the adapted scorer and of those without one."""
    others = {"random": "random", "self": "self_mean", "oracle": "oracle"}
    return {
        "before": _points(before, "selection"),
        "after": _points(after, "selection"),
        **{name: _points(after, metric) for name, metric in others.items()},
        "pairwise_accuracy": {"before": _points(before, "pairwise_accuracy"), "after": _points(after, "pairwise_accuracy")},
    }


def _points(metrics: Metrics, name: str) -> float | None:
    """A metric in points; of a task with answer choices alone the accuracy stands for the selection."""
    value = metrics["accuracy"] if name == "selection" and metrics["selection"] is None else metrics[name]
    return None if value is None else 100 * value


def _measure(scorer: Scorer, tables: Sequence[pa.Table], greedy: str | None) -> list[Metrics]:
    return [validation.measure_scores(table, scorer.score, greedy).metrics() for table in tables]


def load_trainable(config: Config, training: TrainingConfig, base: Base, device: torch.device) -> tuple[Scorer, Any]:
    """Return the base ready to be trained, as a scorer, and with adapters peft's model around it (else None)."""
    setting = "adapt.base" if base.scorer else "scorer.encoder"
    folder = models.resolve(base.name, setting)
    shape = config.scorer.model_copy(update={"encoder": base.name, "max_length": base.max_length})
    model = new_model(folder, shape, training, config.seed)
    wrapped = lora.add_adapters(model, config.adapt.lora, config.seed) if config.adapt.method == "lora" else None
    return Scorer(model, load_tokenizer(folder, base.name, setting), base.max_length, config.scorer.dtype, device), wrapped


def _fit(scorer: Scorer, pairs: Pairs, training: TrainingConfig, config: Config) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train the scorer's model; return what was done, and a line for metrics.jsonl every `_LOG_EVERY` steps."""
    size = Size(config.adapt.pairs, len(set(pairs.instructions)))
    windows = _windows(scorer, pairs, size.pairs, training, config.seed)
    steps = batch_plan.plan_steps(windows, training, config.seed, rank=0, world=1, first=0, size=size)
    total = batch_plan.steps_in_epoch(size, training) * training.epochs
    pad_id = scorer.tokenizer.pad_token_id
    lines: list[dict[str, Any]] = []
    losses: list[tuple[float, int]] = []
    cut = 0
    start = time.monotonic()
    optimizer = loop.new_optimizer(scorer.model, training)
    for done in loop.fit(scorer.model, steps, optimizer, training, total=total, seed=config.seed, pad_id=pad_id, dtype=scorer.dtype):
        losses.append((float(done.squared_error), done.size))
        cut += done.cut if done.epoch == 0 else 0
        if not math.isfinite(losses[-1][0]):
            raise CappyError(
                f"the loss is {losses[-1][0]} at step {done.index}; lower adapt.learning_rate (now {training.learning_rate:g})"
            )
        if (done.index + 1) % _LOG_EVERY == 0 or done.index + 1 == total:
            lines.append({"step": done.index + 1, "epoch": done.epoch, "loss": _mean(losses[len(lines) * _LOG_EVERY :])})
    scorer.model.eval()
    seconds = time.monotonic() - start
    return {
        "steps": total,
        "pairs": size.pairs * training.epochs,
        "cut_pairs": cut,
        "learning_rate": training.learning_rate,
        "train_mse": _mean(losses[-(total // training.epochs) :]),
        "trained_parameters": sum(each.numel() for each in scorer.model.parameters() if each.requires_grad),
        "pairs_per_second": round(size.pairs * training.epochs / max(seconds, 1e-9), 1),
    }, lines


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def _windows(scorer: Scorer, pairs: Pairs, count: int, training: TrainingConfig, seed: int) -> Iterator[batch_plan.Window]:
    """Tokenised windows of `count` pairs, epoch after epoch."""
    for epoch in range(training.epochs):
        order = epoch_order(len(pairs), count, seed, epoch)
        for number, start in enumerate(range(0, count, training.window)):
            rows = order[start : start + training.window]
            encoded = encode_pairs(
                scorer.tokenizer, [pairs.instructions[row] for row in rows], [pairs.responses[row] for row in rows], scorer.max_length
            )
            yield batch_plan.Window(epoch, number, encoded, pairs.labels[rows], pairs.groups[rows])


def _publish(
    config: Config,
    task: Task,
    base: Base,
    scorer: Scorer,
    wrapped: Any,
    result: dict[str, Any],
    lines: list[dict[str, Any]],
    dataset: RegressionSet,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Write the scorer or its adapters, card, metrics, config and outcome, then the manifest; return the outcome."""
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
        (target / RESULTS).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        # Until the manifest is there nobody takes the files for a scorer.
        check()
        storage.write_bytes(unfinished, b"")
        files = folder_writer.FolderWriter(task.uri, check).upload_folder(target)
        check()
        artifacts.publish(
            task.uri,
            {
                "kind": "scorer",
                "version": 1,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "code_version": code_version(),
                "dataset": {"uri": dataset.uri, "writer": dataset.manifest.get("writer")},
                "encoder": config.scorer.encoder,
                "base": asdict(base),
                "summary": {key: value for key, value in result.items() if key != "identity"},
                "identity": task.identity,
                "config": config.model_dump(mode="json"),
                "files": files,
            },
        )
    finally:
        shutil.rmtree(target)
    artifacts.cleanup(storage.join(task.uri, CHECKPOINTS), check)
    return result
