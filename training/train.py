"""`cappy train`: train a scorer on a published set with Ray Train, and publish it.

The workers write checkpoints below `{scorer}/_checkpoints/{fingerprint}`. The fingerprint covers all settings that decide the
weights. The same command resumes from the newest valid checkpoint. After the last step the model files are written, then the
manifest, and the checkpoints are deleted. The lease `_checkpoints/_lease` excludes a second run.
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
from typing import Any

from cluster import artifacts, folder_writer, lease, models, storage, versions
from cluster.config import Config, fingerprint, paths
from cluster.cpu import openmp_environment
from cluster.errors import CappyError, Stopped, UsageError
from cluster.lease import Claim, Lease
from cluster.progress import Bar, log
from cluster.runtime import find_cappy_error, on_sigterm, ray_session
from generation.dataset import RegressionSet
from training import batch_plan, checkpoint, model_card, selection, stream
from training.batch_plan import Size
from training.records import Event, Job, TrainSummary
from training.run_channel import RunChannel, run_worker
from training.scorer import CHECKPOINTS, SCORER_FILES, Scorer, load_tokenizer, new_model
from training.trackers import Trackers

Work = Callable[[Job], None]
"""The function that each worker runs."""

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
# Settings that change how a scorer is trained but not its weights, up to rounding. They may change when a run resumes.
_OPERATIONAL = (
    *("workers", "min_workers", "parallel", "gpus_per_worker", "checkpoint_every", "checkpoints_kept", "max_failures"),
    *("tensorboard", "mlflow"),
)


def run_train(config: Config, *, overwrite: bool = False, work: Work = run_worker) -> TrainSummary:
    """Train a scorer on the published set, publish it and return its summary. Each worker runs `work`.

    Raises:
        UsageError: the destination has a finished scorer and `overwrite` is False, or it has foreign files.
        CappyError: the set is unfinished or has no train pairs, the encoder does not load, the loss is not finite, or another run
            holds the lease.
        Stopped: SIGTERM ended the run; its state is saved.
    """
    start = time.monotonic()
    config = paths.absolute(config)
    config = config.model_copy(update={"dataset": storage.check_uri(config.dataset_uri, "dataset"), "scorer_path": config.scorer_uri})
    inputs = read_inputs(config)
    uri = storage.check_uri(config.scorer_uri, "scorer_path")
    if not overwrite:
        artifacts.refuse_published(uri, "scorer_path", "train")
    artifacts.refuse_foreign(uri, "scorer_path", _OWNED, overwrite=overwrite)
    dataset = RegressionSet(config.dataset_uri)
    _require_validation_rows(config, dataset)
    folder = models.resolve(config.scorer.encoder, "scorer.encoder")
    load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
    new_model(folder, config.scorer, config.training, config.seed)
    run_name = fingerprint(identity(config, dataset.manifest))
    trackers = Trackers(config.training, run_name)
    checkpoints = storage.join(uri, CHECKPOINTS)
    with lease.hold(storage.join(checkpoints, _LEASE), f"scorer_path={uri}") as held:
        lease_folder = f"{CHECKPOINTS}/{_LEASE}"
        artifacts.clear_destination(uri, "scorer_path", _OWNED, lease_folder, held.check, overwrite=overwrite)
        artifacts.refuse_published(uri, "scorer_path", "train")
        dataset.verify("train", "validation")
        run_folder = storage.join(checkpoints, run_name)
        size = _count_pairs(config, dataset, storage.join(run_folder, "size.json"))
        total = config.training.epochs * batch_plan.steps_in_epoch(size, config.training)
        if checkpoint.last_step(run_folder) < total:
            with ray_session():
                _run_workers(config, run_folder, held.claim, size, total, work, trackers)
        state = checkpoint.read_newest(run_folder, log)
        if state is None or state.step < total:
            raise CappyError(f"the last checkpoint in {run_folder} is damaged; run the same command again to train the lost steps")
        summary = _publish(config, dataset, inputs, uri, state, start, held)
        for folder_name in {name.split("/")[0] for name in storage.list_files(checkpoints)} - {_LEASE}:
            artifacts.cleanup(storage.join(checkpoints, folder_name), held.check)
        held.finish()
    storage.remove_empty_folder(checkpoints)
    return summary


def _require_validation_rows(config: Config, dataset: RegressionSet) -> None:
    """Raise `UsageError` when `training.best_by` needs validation rows and the set has none."""
    if config.training.best_by != "last" and not dataset.rows("validation"):
        raise UsageError(
            f"training.best_by={config.training.best_by} needs validation rows, and dataset={dataset.uri} has none; use best_by=last"
        )


def identity(config: Config, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the settings and files that decide the weights, as a plain tree. `manifest` is that of the dataset."""
    return {**result_settings(config), "dataset": manifest.get("writer"), "files": manifest["files"]}


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide the weights, as a plain tree.

    Operational settings are left out: they may change when a run resumes.
    """
    training = config.training.model_dump(mode="json")
    for key in _OPERATIONAL:
        del training[key]
    scorer = config.scorer.model_dump(mode="json")
    scorer.pop("cpu_kernels", None)  # operational too
    return {"seed": config.seed, "scorer": scorer, "training": training}


def read_inputs(config: Config) -> dict[str, str | None]:
    """Return the versions of the set and, if the encoder is a published scorer, of the encoder."""
    encoder = versions.version(config.scorer.encoder)
    return {"dataset": versions.version(config.dataset_uri)} | ({"scorer.encoder": encoder} if encoder else {})


def _count_pairs(config: Config, dataset: RegressionSet, uri: str) -> Size:
    """Return the size of the train split. It is counted once in a run and stored in the file `uri` for a resumed run."""
    try:
        return Size(**storage.read_json(uri))
    except (FileNotFoundError, ValueError, TypeError):
        size = stream.count_pairs(dataset, "train", config.seed, config.training.selection_share)
    if not size.pairs:
        raise CappyError(f"dataset={dataset.uri} has no train pairs; generate a set with train rows")
    storage.write_json(uri, size._asdict())
    return size


def _run_workers(config: Config, checkpoints: str, claim: Claim, size: Size, total: int, work: Work, trackers: Trackers) -> None:
    """Run the workers until the last step. Their result is the last checkpoint. Raises `Stopped` when SIGTERM came earlier."""
    # The interval of health checks by Ray Train's controller. It detects the end of a run at such a check.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if config.training.min_workers:  # the timeout after a lost node, before Ray Train starts with fewer workers
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
    # On the driver's node: the loss of a worker node must not lose the channel.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    channel = ray.remote(num_cpus=0, scheduling_strategy=driver_node)(RunChannel).remote()
    # Ray Train requires a folder for checkpoints. The workers write checkpoints directly, so this folder stays empty.
    unused = storage.new_temporary_folder("ray-train")
    job: Job = {
        "config": config.model_dump(mode="json"),
        "size": size,
        "checkpoints": checkpoints,
        "claim": claim,
        "channel": channel,
        # Ray sets OMP_NUM_THREADS=1 in its workers, so the job carries the driver's value.
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
    }
    trainer = TorchTrainer(
        work,
        train_loop_config=dict(job),
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
            # OpenMP threads that spin at barriers make training many times slower on a machine with other load.
            worker_runtime_env={"env_vars": openmp_environment()},
        ),
    )
    log(f"starting {training.workers} worker(s) on {'GPU' if gpus else 'CPU'}: {size.pairs:,} pairs, {training.epochs} epochs")
    handler = on_sigterm("finishing the step and writing a checkpoint; run the same command again to resume", channel.request_stop.remote)
    error: Exception | None = None
    try:
        with handler as stop_requested, _show_events(channel, total, trackers), _sigint_handler_kept():
            trainer.fit()
    except Exception as raised:
        error = raised
    finally:
        shutil.rmtree(unused, ignore_errors=True)
    failure = ray.get(channel.failure.remote()) or (find_cappy_error(error) if error else None)
    if failure:
        raise failure from None
    if error:
        raise error
    reached = checkpoint.last_step(checkpoints)
    if stop_requested.is_set() and reached < total:
        raise Stopped(f"stopped on SIGTERM after step {reached} of {total}, which is saved; run the same command again to resume")


@contextmanager
def _show_events(channel: Any, total: int, trackers: Trackers) -> Iterator[None]:
    """Show the channel's events in the terminal, and send its lines to the trackers, while the block runs."""
    import ray

    ended = threading.Event()

    def show() -> None:
        bar: Bar | None = None
        while True:
            last = ended.wait(1.0)
            try:
                events: list[Event] = ray.get(channel.take_events.remote(), timeout=10)
            except ray.exceptions.GetTimeoutError:  # the actor starts late on a busy machine; its events are kept
                if last:
                    break
                continue
            except Exception:  # the session is ending; the main thread raises the cause
                break
            for event in events:
                if "log" in event:
                    log(event["log"])
                elif "line" in event:
                    trackers.write(event["line"])
                elif bar is None:  # the first step event has the step where the run begins
                    bar = Bar("training", total, "steps", done=event["step"]).__enter__()
                else:
                    # The step decreases when the workers were restarted from a checkpoint.
                    counts = {name: event[name] for name in ("pairs", "tokens") if name in event}
                    bar.advance(event["step"] - bar.done, event.get("note", ""), **counts)
            if last:
                break
        if bar:
            bar.__exit__(None, None, None)

    thread = threading.Thread(target=show, name="cappy-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=15)


@contextmanager
def _sigint_handler_kept() -> Iterator[None]:
    """Restore the SIGINT handler after the block, because Ray Train replaces it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _publish(
    config: Config,
    dataset: RegressionSet,
    inputs: dict[str, str | None],
    uri: str,
    state: checkpoint.Checkpoint,
    start: float,
    held: Lease,
) -> TrainSummary:
    """Write model, card, metrics and config, then the manifest. `start` is the monotonic time at the start of the run."""
    folder = models.resolve(config.scorer.encoder, "scorer.encoder")
    model = new_model(folder, config.scorer, config.training, config.seed)
    checkpoint.restore(state, model)
    tokenizer = load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
    progress = state.trainer_state["progress"]
    best = progress["best"]
    tree = progress.get("selection")
    fitted = None if tree is None else selection.Selection.from_json(tree)
    target = storage.new_temporary_folder("scorer")
    try:
        (target / "metrics.jsonl").write_text("".join(f"{line}\n" for line in state.lines), encoding="utf-8")
        summary: TrainSummary = {
            "uri": uri,
            "steps": progress["step"],
            "pairs": progress["pairs"],
            "epochs": config.training.epochs,
            "seconds": round(time.monotonic() - start, 1),
            "pairs_per_second": round(progress["trained"] / max(progress["seconds"], 1e-9), 1),
            "train_mse": progress["train_mse"],
            "validation": progress["validation"],
            "calibration": progress["calibration"],
            "best": {"metric": best["metric"], "value": best["value"], "step": best["step"]},
            "blend": progress["blend"],
            "selection": selection.summarise(fitted),
            "cut_pairs": progress["cut_pairs"],
        }
        scorer = Scorer(model, tokenizer, config.scorer.max_length, format=config.scorer.format)
        model.config.cappy = {**(getattr(model.config, "cappy", None) or {}), "blend": progress["blend"]}
        scorer.save(target)
        if fitted is not None:
            (target / selection.FILE).write_text(selection.to_text(fitted), encoding="utf-8")
        (target / "loss.svg").write_bytes(model_card.plot_loss([json.loads(line) for line in state.lines]))
        if progress["calibration"]:
            (target / "calibration.svg").write_bytes(model_card.plot_calibration(progress["calibration"]))
        (target / "README.md").write_text(model_card.render_card(config, summary, dataset.manifest, scorer.format), encoding="utf-8")
        (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        files = folder_writer.FolderWriter(uri, held.check).upload_folder(target)
        artifacts.publish_folder(
            uri,
            "scorer",
            dataset={"uri": dataset.uri, "writer": dataset.manifest.get("writer")},
            inputs=inputs,
            encoder=config.scorer.encoder,
            summary=summary,
            config=config,
            files=files,
            check=held.check,
        )
    finally:
        shutil.rmtree(target)
    return summary
