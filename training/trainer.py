"""`cappy train`: the Ray Train edge. From a published set to a published scorer, going on after any interruption.

Below `{scorer}/_checkpoints/{fingerprint}` Ray Train keeps the last checkpoints; the fingerprint covers all that decides the
weights. Started again with the same settings, the run goes on from the last of them. The model files and the manifest, last,
are written at the end; the checkpoints go only then.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import models, storage
from cluster.config import Config, fingerprint
from cluster.errors import CappyError, UsageError
from cluster.progress import Bar, say
from cluster.runtime import clean_error, code_version, ray_session
from generation.dataset import RegressionSet
from training import card, checkpoint, loop, stream
from training.board import Board, work
from training.scorer import CHECKPOINTS, Scorer, load_tokenizer, new_model


def run(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Train a scorer on the published set and publish it; return its summary.

    Raises `UsageError` when the destination holds a finished scorer and `overwrite` is not given, `CappyError` when the set is not
    finished or has no train pairs, the encoder does not load, or the loss is no longer a number.
    """
    start = time.monotonic()
    config = _absolute(config)
    uri = storage.check(config.scorer_uri, "scorer_path")
    if overwrite:
        _withdraw(uri)
    storage.refuse_published(uri, "scorer_path", "train")
    dataset = RegressionSet(config.dataset_uri)
    folder = models.resolve(config.scorer.encoder, "scorer.encoder")
    load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
    new_model(folder, config.scorer, config.training, config.seed)
    size = stream.count(dataset, "train")
    if not size.pairs:
        raise CappyError(f"dataset={dataset.uri} has no train pairs; generate it with train rows")
    with ray_session():
        reported = _train(config, dataset, uri, size)
        return _publish(config, dataset, uri, reported, start)


def identity(config: Config, dataset: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights, as a plain tree; worker counts and checkpointing may change on resume. `dataset` is its manifest."""
    training = config.training.model_dump(mode="json")
    for key in ("workers", "gpus_per_worker", "checkpoint_every", "checkpoints_kept", "max_failures"):
        del training[key]
    scorer = config.scorer.model_dump(mode="json")
    return {"seed": config.seed, "scorer": scorer, "training": training, "dataset": dataset.get("writer"), "files": dataset["files"]}


def _absolute(config: Config) -> Config:
    """Make local paths absolute: Ray Train's workers run in another folder."""
    encoder = models.absolute(config.scorer.encoder)
    paths = {"dataset": storage.check(config.dataset_uri, "dataset"), "scorer_path": storage.absolute(config.scorer_uri)}
    return config.model_copy(update={**paths, "scorer": config.scorer.model_copy(update={"encoder": encoder})})


def _withdraw(uri: str) -> None:
    """Clear the destination for `--overwrite`, but only of what `cappy train` wrote."""
    files = storage.list_files(uri)
    if storage.MANIFEST in files:
        storage.read_manifest(uri, "scorer", "train")
    elif files and not any(name.startswith(f"{CHECKPOINTS}/") for name in files):
        raise UsageError(f"scorer_path={uri} holds files that no `cappy train` wrote, e.g. {next(iter(files))}; choose an empty folder")
    storage.withdraw(uri)


def _train(config: Config, dataset: RegressionSet, uri: str, size: stream.Size) -> Any:
    """Run the workers to the end and return the last checkpoint (`ray.train.Checkpoint`)."""
    # Ray Train's controller looks at its workers this often, and a finished run waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    training = config.training
    name = fingerprint(identity(config, dataset.manifest))
    checkpoints = storage.join(uri, CHECKPOINTS)
    _mend(storage.join(checkpoints, name))
    gpus = training.gpus_per_worker
    if gpus is None:
        gpus = int(ray.cluster_resources().get("GPU", 0) >= training.workers)
    board = ray.remote(num_cpus=0)(Board).remote()
    fs, path = storage.filesystem(checkpoints)
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "size": size,
            "board": board,
            # Ray sets it to 1 in its workers, so what the operator set is carried there.
            "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        },
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=gpus > 0, resources_per_worker={"CPU": 1} | ({"GPU": gpus} if gpus else {})
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=training.checkpoints_kept),
            logging_config=LoggingConfig(log_level="ERROR"),
            # Threads that spin at every barrier bring training to a halt on a machine with other work (10 times slower at load 5).
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}},
        ),
    )
    say(f"starting {training.workers} worker(s) on {'GPU' if gpus else 'CPU'}: {size.pairs:,} pairs, {training.epochs} epochs")
    try:
        with _following(board, training.epochs * loop.steps_in_epoch(size, training)), _signals_kept():
            result = trainer.fit()
    except Exception as error:
        failure = ray.get(board.failure.remote()) or clean_error(error)
        if storage.exists(storage.join(uri, storage.MANIFEST)):
            raise CappyError(f"{uri} was published by another run meanwhile; its result stands, this one ends") from None
        if failure is None:
            raise
        raise failure from None
    return result.checkpoint


def _mend(folder: str) -> None:
    """Remove Ray Train's list of checkpoints if a kill left half of it, or one that names a lost checkpoint: it would refuse to start."""
    place = storage.join(folder, "checkpoint_manager_snapshot.json")
    if not storage.exists(place):
        return
    try:
        kept = [each["checkpoint_dir_name"] for each in storage.read_json(place)["checkpoint_results"]]
        if all(storage.exists(storage.join(folder, name)) for name in kept):
            return
    except (ValueError, KeyError, TypeError):
        pass
    say(f"{place} is damaged; training starts afresh")
    storage.delete(folder)


@contextmanager
def _following(board: Any, total: int) -> Iterator[None]:
    """Show what the board says while the block runs."""
    import ray

    ended = threading.Event()

    def follow() -> None:
        bar: Bar | None = None
        while True:
            last = ended.wait(1.0)
            try:
                events = ray.get(board.take.remote(), timeout=10)
            except ray.exceptions.GetTimeoutError:  # a busy machine starts the board late; its events wait
                if last:
                    break
                continue
            except Exception:  # the session is ending; what failed is raised in the main thread
                break
            for event in events:
                if "say" in event:
                    say(event["say"])
                elif bar is None:
                    bar = Bar("training", total, "steps", done=event["step"]).__enter__()
                else:
                    # Fewer steps than before: the workers were started again from a checkpoint.
                    bar.advance(event["step"] - bar.done, note=event["note"], pairs=event["pairs"])
            if last:
                break
        if bar:
            bar.__exit__(None, None, None)

    thread = threading.Thread(target=follow, name="cappy-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=15)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the SIGINT handler back that Ray Train replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _publish(config: Config, dataset: RegressionSet, uri: str, reported: Any, start: float) -> dict[str, Any]:
    """Write model, card, metrics and config, then the manifest, then drop the checkpoints."""
    folder = models.resolve(config.scorer.encoder, "scorer.encoder")
    model = new_model(folder, config.scorer, config.training, config.seed)
    tokenizer = load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
    target = storage.new_temporary_folder("scorer")
    try:
        with reported.as_directory() as saved:
            progress = checkpoint.load_state(Path(saved), model, loop.new_optimizer(model, config.training))
            shutil.copyfile(Path(saved, "metrics.jsonl"), target / "metrics.jsonl")
        summary = {
            "uri": uri,
            "steps": progress["step"],
            "pairs": progress["pairs"],
            "epochs": config.training.epochs,
            "seconds": round(time.monotonic() - start, 1),
            "pairs_per_second": round(progress["trained"] / max(progress["seconds"], 1e-9), 1),
            "train_mse": progress["train_mse"],
            "validation": progress["validation"],
            "cut_pairs": progress["cut_pairs"],
        }
        Scorer(model, tokenizer, config.scorer.max_length).save(target)
        lines = [json.loads(line) for line in (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        (target / "loss.svg").write_bytes(card.loss_plot(lines))
        (target / "README.md").write_text(card.model_card(config, summary, dataset.manifest), encoding="utf-8")
        (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        # Another run may have finished here meanwhile: its files must not be written over.
        if storage.exists(storage.join(uri, storage.MANIFEST)):
            raise CappyError(f"{uri} was published by another run meanwhile; its result stands, this one is not published")
        files = storage.upload_folder(target, uri)
        storage.publish(
            uri,
            {
                "kind": "scorer",
                "version": 1,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "code_version": code_version(),
                "dataset": {"uri": dataset.uri, "writer": dataset.manifest.get("writer")},
                "encoder": config.scorer.encoder,
                "summary": summary,
                "config": config.model_dump(mode="json"),
                "files": files,
            },
        )
    finally:
        shutil.rmtree(target)
    storage.delete(storage.join(uri, CHECKPOINTS))
    return summary
