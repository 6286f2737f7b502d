"""`cappy train`: the Ray Train edge. From a published set to a published scorer, going on after any interruption.

Below `{scorer}/_checkpoints/{fingerprint}` the workers keep the last checkpoints; the fingerprint covers all that decides the
weights. Started again with the same settings, the run goes on from the newest sound one. The model files and the manifest,
last, are written at the end; the checkpoints go only then. `_checkpoints/_lease` keeps a second run away.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from cluster import artifacts, folder_writer, lease, models, storage
from cluster.config import Config, fingerprint, paths
from cluster.cpu import openmp_environment
from cluster.errors import CappyError, Stopped, UsageError
from cluster.lease import Claim, Lease
from cluster.progress import Bar, log
from cluster.runtime import code_version, find_cappy_error, on_sigterm, ray_session
from generation.dataset import RegressionSet
from training import batch_plan, checkpoint, model_card, stream
from training.batch_plan import Size
from training.run_channel import RunChannel, run_worker
from training.scorer import CHECKPOINTS, SCORER_FILES, Scorer, load_tokenizer, new_model
from training.trackers import Trackers

Work = Callable[[dict[str, Any]], None]

_LEASE = "_lease"
_FINISHED = CHECKPOINTS + r"/[0-9a-f]{16}/\d{8}-[0-9a-f]{8}/_MANIFEST\.json"
_OWNED = artifacts.OwnedFiles(
    "scorer",
    "train",
    (
        CHECKPOINTS + r"/_lease/\d+\.json",
        CHECKPOINTS + r"/[0-9a-f]{16}/size\.json",
        CHECKPOINTS + r"/[0-9a-f]{16}/best/\d{8}\.safetensors",
        CHECKPOINTS + r"/[0-9a-f]{16}/\d{8}-[0-9a-f]{8}/((weights|optimizer)-\d+\.safetensors|state\.json|metrics\.jsonl)",
        _FINISHED,
    ),
    _FINISHED,
    SCORER_FILES,
)
# Settings that decide how a scorer is trained and not what comes out, but for rounding.
_HOW = (
    *("workers", "min_workers", "parallel", "gpus_per_worker", "checkpoint_every", "checkpoints_kept", "max_failures"),
    *("tensorboard", "mlflow"),
)


def run_train(config: Config, *, overwrite: bool = False, work: Work = run_worker) -> dict[str, Any]:
    """Train a scorer on the published set and publish it; return its summary. `work` is what each worker runs.

    Raises `UsageError` when the destination holds a finished scorer and `overwrite` is not given, `CappyError` when the set is not
    finished or has no train pairs, the encoder does not load, the loss is no longer a number, or another run is at work there,
    `Stopped` on SIGTERM.
    """
    start = time.monotonic()
    config = paths.absolute(config)
    config = config.model_copy(update={"dataset": storage.check_uri(config.dataset_uri, "dataset"), "scorer_path": config.scorer_uri})
    uri = storage.check_uri(config.scorer_uri, "scorer_path")
    if not overwrite:
        artifacts.refuse_published(uri, "scorer_path", "train")
    artifacts.refuse_foreign(uri, "scorer_path", _OWNED, overwrite=overwrite)
    dataset = RegressionSet(config.dataset_uri)
    _refuse_unmeasured(config, dataset)
    folder = models.resolve(config.scorer.encoder, "scorer.encoder")
    load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
    new_model(folder, config.scorer, config.training, config.seed)
    name = fingerprint(identity(config, dataset.manifest))
    watchers = Trackers(config.training, name)
    checkpoints = storage.join(uri, CHECKPOINTS)
    with lease.hold(storage.join(checkpoints, _LEASE), f"scorer_path={uri}") as held:
        kept = f"{CHECKPOINTS}/{_LEASE}"
        if overwrite:
            artifacts.withdraw(uri, "scorer_path", _OWNED, keep=kept, check=held.check)
        artifacts.finish_withdrawal(uri, "scorer_path", _OWNED, keep=kept, check=held.check)
        artifacts.refuse_published(uri, "scorer_path", "train")
        mine = storage.join(checkpoints, name)
        size = _count(dataset, storage.join(mine, "size.json"))
        total = config.training.epochs * batch_plan.steps_in_epoch(size, config.training)
        if checkpoint.last_step(mine) < total:
            with ray_session():
                _train(config, mine, held.claim, size, total, work, watchers)
        state = checkpoint.read_newest(mine, log)
        if state is None or state.step < total:
            raise CappyError(f"{mine} was damaged while the run ended; the same command trains what is missing")
        summary = _publish(config, dataset, uri, state, start, held)
        for name in {name.split("/")[0] for name in storage.list_files(checkpoints)} - {_LEASE}:
            artifacts.cleanup(storage.join(checkpoints, name), held.check)
        held.finish()
    storage.remove_empty_folder(checkpoints)
    return summary


def _refuse_unmeasured(config: Config, dataset: RegressionSet) -> None:
    """Refuse to choose a state by validation rows where there are none."""
    if config.training.best_by != "last" and not dataset.rows("validation"):
        raise UsageError(
            f"training.best_by={config.training.best_by} needs validation rows, and dataset={dataset.uri} has none; leave it out"
        )


def identity(config: Config, dataset: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights, as a plain tree; the settings of `_HOW` may change on resume. `dataset` is its manifest."""
    training = config.training.model_dump(mode="json")
    for key in _HOW:
        del training[key]
    scorer = config.scorer.model_dump(mode="json")
    return {"seed": config.seed, "scorer": scorer, "training": training, "dataset": dataset.get("writer"), "files": dataset["files"]}


def _count(dataset: RegressionSet, place: str) -> Size:
    """Return the size of the train split, counted by reading it once a run: it is noted at `place` for the run's restarts."""
    try:
        return Size(**storage.read_json(place))
    except (FileNotFoundError, ValueError, TypeError):
        size = stream.count_pairs(dataset, "train")
    if not size.pairs:
        raise CappyError(f"dataset={dataset.uri} has no train pairs; generate it with train rows")
    storage.write_json(place, size._asdict())
    return size


def _train(config: Config, checkpoints: str, claim: Claim, size: Size, total: int, work: Work, watchers: Trackers) -> None:
    """Run the workers to the end; what they made is their last checkpoint. Raises `Stopped` where SIGTERM came before that."""
    # Ray Train's controller looks at its workers this often, and a finished run waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if config.training.min_workers:  # it waits this long for the workers of a lost node before it tries with fewer
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    training = config.training
    gpus = training.gpus_per_worker
    if gpus is None:
        gpus = int(ray.cluster_resources().get("GPU", 0) >= (training.min_workers or training.workers))
    # Beside the driver: on a worker node it would be lost with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(RunChannel).remote()
    # Ray Train wants a folder for checkpoints reported to it; ours are written without it, so this one stays empty.
    unused = storage.new_temporary_folder("ray-train")
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "size": size,
            "checkpoints": checkpoints,
            "claim": claim,
            "board": board,
            # Ray sets it to 1 in its workers, so what the operator set is carried there.
            "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        },
        scaling_config=ScalingConfig(
            num_workers=training.workers if training.min_workers is None else (training.min_workers, training.workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(unused),
            failure_config=FailureConfig(max_failures=training.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            # Threads that spin at every barrier bring training to a halt on a machine with other work (10 times slower at load 5).
            worker_runtime_env={"env_vars": openmp_environment()},
        ),
    )
    log(f"starting {training.workers} worker(s) on {'GPU' if gpus else 'CPU'}: {size.pairs:,} pairs, {training.epochs} epochs")
    closing = on_sigterm("finishing the step and writing a checkpoint; the same command goes on afterwards", board.stop.remote)
    error: Exception | None = None
    try:
        with closing as told, _following(board, total, watchers), _signals_kept():
            trainer.fit()
    except Exception as raised:
        error = raised
    finally:
        shutil.rmtree(unused, ignore_errors=True)
    failure = ray.get(board.failure.remote()) or (find_cappy_error(error) if error else None)
    if failure:
        raise failure from None
    if error:
        raise error
    reached = checkpoint.last_step(checkpoints)
    if told.is_set() and reached < total:
        raise Stopped(f"stopped on SIGTERM after step {reached} of {total}, which is saved; the same command goes on")


@contextmanager
def _following(board: Any, total: int, watchers: Trackers) -> Iterator[None]:
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
                    log(event["say"])
                elif "line" in event:
                    watchers.write(event["line"])
                elif bar is None:  # the first says where the run begins
                    bar = Bar("training", total, "steps", done=event["step"]).__enter__()
                else:
                    # Fewer steps than before: the workers were started again from a checkpoint.
                    bar.advance(event.pop("step") - bar.done, **event)
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


def _publish(config: Config, dataset: RegressionSet, uri: str, state: checkpoint.Checkpoint, start: float, held: Lease) -> dict[str, Any]:
    """Write model, card, metrics and config, then the manifest."""
    folder = models.resolve(config.scorer.encoder, "scorer.encoder")
    model = new_model(folder, config.scorer, config.training, config.seed)
    checkpoint.restore(state, model)
    tokenizer = load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
    progress = state.books["progress"]
    target = storage.new_temporary_folder("scorer")
    try:
        (target / "metrics.jsonl").write_text("".join(f"{line}\n" for line in state.lines), encoding="utf-8")
        summary = {
            "uri": uri,
            "steps": progress["step"],
            "pairs": progress["pairs"],
            "epochs": config.training.epochs,
            "seconds": round(time.monotonic() - start, 1),
            "pairs_per_second": round(progress["trained"] / max(progress["seconds"], 1e-9), 1),
            "train_mse": progress["train_mse"],
            "validation": progress["validation"],
            "calibration": progress["calibration"],
            "best": {key: progress["best"][key] for key in ("metric", "value", "step")},
            "blend": progress["blend"],
            "cut_pairs": progress["cut_pairs"],
        }
        model.config.cappy = {"blend": progress["blend"]}
        Scorer(model, tokenizer, config.scorer.max_length).save(target)
        (target / "loss.svg").write_bytes(model_card.plot_loss([json.loads(line) for line in state.lines]))
        if progress["calibration"]:
            (target / "calibration.svg").write_bytes(model_card.plot_calibration(progress["calibration"]))
        (target / "README.md").write_text(model_card.render_card(config, summary, dataset.manifest), encoding="utf-8")
        (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        files = folder_writer.FolderWriter(uri, held.check).upload_folder(target)
        held.check()
        artifacts.publish(
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
    return summary
