"""`cappy adapt`: adapt a scorer to many tasks of one regression set, each task as a Ray task.

Each task has a folder below `{workspace}/adapted`. It has the published scorer, or only a `results.json` when the gate rejected the
scorer. `results.json` beside the folders has all tasks. Finished tasks are not repeated. A task whose process was lost starts
again. A failed task does not stop the others. On SIGTERM the run cancels the unfinished tasks. They start again with the
same command. The lease `_lease` excludes a second run.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypedDict, cast

import torch

from cluster import artifacts, folder_writer, lease, models, storage
from cluster.config import DEFAULT_SCORER, AdaptConfig, Config, differences, paths
from cluster.errors import Stopped, UsageError
from cluster.lease import Lease
from cluster.progress import Bar, log
from cluster.runtime import find_cappy_error, on_sigterm, ray_session
from generation import engines, generate
from generation.dataset import RegressionSet
from generation.sampler import LoadLLM
from training import adapt_one, lora, scorer, train
from training.adapt_one import RESULTS, Base, Task
from training.records import Outcome, TaskPoints
from training.scorer import CHECKPOINTS, Scorer, load_tokenizer, new_model

_LEASE = "_lease"
_OWNED = artifacts.OwnedFiles("scorer", "adapt", (f"{CHECKPOINTS}/adapting",), f"{CHECKPOINTS}/adapting", scorer.SCORER_FILES)
# The only file of a task whose scorer was rejected by the gate is `results.json`.
_REJECTED = artifacts.OwnedFiles("scorer", "adapt", (*_OWNED.working, r"results\.json"), r"results\.json", ())
_WAIT_S = 1.0  # interval of checks for SIGTERM and for the lease while tasks run, in seconds
_CANCEL_TIMEOUT_S = 30.0
# Settings that may change when a run resumes.
_OPERATIONAL = ("tasks", "concurrency", "cpus_per_task", "gpus_per_task", "max_retries")


class AdaptSummary(TypedDict):
    """The result of `cappy adapt`, as `results.json` stores it."""

    uri: str
    dataset: str
    base: str
    method: str
    tasks: list[Outcome]
    """Without their `identity`."""
    published: int
    rejected: int
    failed: int
    averages: dict[str, float]
    """Means over the measured tasks, in points. `after the gate` uses the published selections, and the base for rejected tasks."""
    seconds: float


def run_adapt(config: Config, *, overwrite: bool = False, load: LoadLLM = engines.load_engine) -> AdaptSummary:
    """Adapt the base to the tasks of the set and return the outcomes. A missing set is generated first, with the LLM of `load`.

    A failed task is in the result with its `error`.

    Raises:
        UsageError: a task was adapted with other settings and `overwrite` is False, or a folder has foreign files.
        CappyError: the base or the set cannot be used, or another run holds the lease.
        Stopped: SIGTERM ended the run.
    """
    start = time.monotonic()
    given, config = config, paths.absolute(config)
    config = config.model_copy(update={"dataset": storage.check_uri(config.dataset_uri, "dataset"), "adapted_path": config.adapted_uri})
    uri = storage.check_uri(config.adapted_uri, "adapted_path")
    base = _load_base(config)
    with lease.hold(storage.join(uri, _LEASE), f"adapted_path={uri}") as held, ray_session():
        if not storage.exists(storage.join(config.dataset_uri, artifacts.MANIFEST)):
            generate.run_generate(config, load=load)
        dataset = RegressionSet(config.dataset_uri)
        dataset.verify(*dataset.manifest["counts"])
        _log_differences((given, config), dataset)
        _refuse_foreign_results(uri)
        shared = {**result_settings(config), "dataset": dataset.manifest.get("writer"), "base": asdict(base)}
        tasks = _select_tasks(config, dataset, shared, uri)
        outcomes = {} if overwrite else _finished_outcomes(tasks)
        if outcomes:
            log(f"{len(outcomes)} of {len(tasks)} tasks are finished; resuming with the others")
        pending = [task for task in tasks if task.name not in outcomes]
        if pending:
            log(describe_work(config.adapt, len(pending)))
        _delete_earlier_files(pending, held.check)
        for task in tasks:
            if task.name in outcomes:  # its run may have stopped after publishing and before the cleanup
                artifacts.cleanup(storage.join(task.uri, CHECKPOINTS), held.check)
        handler = on_sigterm("cancelling the running tasks; run the same command again to start them again", lambda: None)
        with handler as stop_requested, Bar("adapting", len(tasks), "tasks", done=len(outcomes)) as bar:
            for task, outcome in _run_tasks(config, base, pending, stop_requested, held):
                outcomes[task.name] = outcome
                bar.advance()
                log(describe_outcome(outcome))
            if len(outcomes) < len(tasks):
                raise Stopped(
                    f"stopped on SIGTERM; {len(outcomes)} of {len(tasks)} tasks are finished; run the same command again to resume"
                )
        result = _summarise(uri, config, base, [outcomes[task.name] for task in tasks], time.monotonic() - start)
        identity = {**shared, "tasks": config.adapt.tasks}
        folder_writer.FolderWriter(uri, held.check).write_json(RESULTS, {**result, "identity": identity})
        held.finish()
    return result


def describe_work(settings: AdaptConfig, tasks: int) -> str:
    """Return the trainings of a run in one line, those of the cross-validation included."""
    pairs = settings.pairs * settings.epochs
    folds = settings.folds
    extra = f", and {folds} trainings for cross-validation, {(folds - 1) * pairs:,} pairs more (adapt.folds={folds})" if folds else ""
    return f"adapting {tasks} task(s): {pairs:,} pairs each{extra}"


def describe_outcome(outcome: Outcome) -> str:
    """Return the outcome of a task in one line."""
    name, gate = outcome["task"], outcome.get("gate")
    kept = "; the base with a fitted selection" if gate and gate.get("weights") == "base" else ""
    if outcome["state"] == "failed":
        return f"{name}: {outcome['error']}"
    if gate is None or gate["before"] is None or gate["after"] is None:
        gain = "not measured"
    else:
        gain = f"{gate['before']:.1f} -> {gate['after']:.1f} points on the gate's rows"
        if (low := gate.get("low")) is not None and (high := gate.get("high")) is not None:
            gain += f" (cross-validated, gain {gate['gain']:+.1f} [{low:+.1f}, {high:+.1f}])"
    return f"{name}: {gain}, {outcome['state']}{kept}"


def folder_name(task: str) -> str:
    """Return the folder name of a task. Other characters than letters, digits, `.`, `_` and `-` become `_`, and a hash is added."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", task)[:100]
    if plain == task and not plain.startswith((".", "_")) and plain != RESULTS:
        return plain
    return f"task-{plain}-{hashlib.blake2b(task.encode(), digest_size=4).hexdigest()}"


def _load_base(config: Config) -> Base:
    """Load the base once, so that an error is raised before any task starts."""
    name = config.adapt.base
    if name is None:
        folder = models.resolve(config.scorer.encoder, "scorer.encoder")
        load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
        new_model(folder, config.scorer, config.adapt.training(config.training), config.seed)
        return Base(config.scorer.encoder, False, lora.weights_sha256(folder), None, config.scorer.max_length)
    folder = models.resolve(name, "adapt.base")
    scorer = Scorer.load(name, device="cpu", setting="adapt.base", cpu_kernels=config.scorer.cpu_kernels, format=config.scorer.format)
    manifest = folder / artifacts.MANIFEST
    writer = storage.read_json(str(manifest)).get("writer") if manifest.exists() else None
    base = Base(name, True, lora.weights_sha256(folder), writer, scorer.max_length)
    adapt_one.load_trainable(config, config.adapt.training(config.training), base, torch.device("cpu"))
    return base


def _log_differences(configs: Sequence[Config], dataset: RegressionSet) -> None:
    """Log the settings in which an existing set differs from the set of this config.

    `configs` has this config with the paths as given and with absolute paths; a set may have been generated with either.
    """
    made = dataset.manifest.get("lineage")
    if not made or "combines" in made:  # the sets of a combined set have their own settings
        return
    try:
        found = min((differences(made, generate.result_settings(config)) for config in configs), key=len)
    except UsageError:  # a label function that is not on this machine; an existing set needs no labels
        return
    changes = [change.split(":")[0] for change in found]
    if changes:
        log(f"dataset={dataset.uri} exists and is used; it was generated with other values of {', '.join(changes)} than this config has")


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide an adapted scorer, as a plain tree. Operational settings are left out."""
    settings = config.adapt.model_dump(mode="json", exclude=set(_OPERATIONAL))
    return {**train.result_settings(config.model_copy(update={"training": config.adapt.training(config.training)})), "adapt": settings}


def _select_tasks(config: Config, dataset: RegressionSet, shared: dict[str, Any], uri: str) -> list[Task]:
    """Return the tasks of the set that `adapt.tasks` selects, sorted by name. `shared` is the common part of their identities."""
    if config.adapt.by == "all":
        names: dict[str, str | None] = {"all": None}
        if config.adapt.tasks:
            raise UsageError(f"adapt.tasks={list(config.adapt.tasks)} with adapt.by=all: all rows are one task; set adapt.tasks=null")
    else:
        names = {name: name for name in sorted(_count_instructions(dataset))}
        for wanted in config.adapt.tasks or ():
            if wanted not in names:
                close = difflib.get_close_matches(wanted, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(list(names)[:10])}"
                raise UsageError(f"adapt.tasks: dataset={dataset.uri} has no {wanted!r}; {hint}")
        names = {name: name for name in names if not config.adapt.tasks or name in config.adapt.tasks}
    return [Task(name, only, storage.join(uri, folder_name(name)), {**shared, "task": name}) for name, only in names.items()]


def _count_instructions(dataset: RegressionSet) -> Counter[str]:
    """Return the number of instructions of each dataset of a set."""
    counts: Counter[str] = Counter()
    for split in dataset.manifest["counts"]:
        for table in dataset.batches(split, rows=65536, columns=["dataset"]):
            counts.update({each["values"]: each["counts"] for each in table["dataset"].value_counts().to_pylist()})
    return counts


def _finished_outcomes(tasks: list[Task]) -> dict[str, Outcome]:
    """Return the outcomes, by task name, of the tasks that were finished with the same settings.

    A task that was rejected with other settings is not included. Raises `UsageError` for a task that was published with other settings.
    """
    found: dict[str, Outcome] = {}
    for task in tasks:
        outcome = adapt_one.read_outcome(task)
        if outcome is None:
            continue
        if outcome["identity"] == task.identity or _has_earlier_default_base(outcome, task):
            found[task.name] = outcome
        elif outcome["state"] == "published":
            changes = "; ".join(differences(outcome["identity"], task.identity))
            raise UsageError(
                f"adapted_path: {task.uri} was adapted with other settings ({changes}); restore them to resume, "
                f"choose another adapted_path, or use --overwrite"
            )
    return found


def _has_earlier_default_base(outcome: Outcome, task: Task) -> bool:
    """Return whether a task was adapted from the plain encoder, the default before `cappy-minilm`, with otherwise equal settings."""
    base, before = task.identity.get("base", {}), outcome["identity"].get("base", {})
    if base.get("name") != DEFAULT_SCORER or before.get("scorer") is not False:
        return False

    def without_base(identity: dict[str, Any]) -> dict[str, Any]:
        return {**identity, "base": None, "adapt": {**identity["adapt"], "base": None}}

    equal = without_base(outcome["identity"]) == without_base(task.identity)
    if equal:
        log(f"{task.name} was adapted from {before['name']} by an earlier version and is kept; --overwrite adapts it from {DEFAULT_SCORER}")
    return equal


def _delete_earlier_files(tasks: list[Task], check: Callable[[], None] = lambda: None) -> None:
    """Delete the files of `cappy adapt` in the folders of tasks. Raises `UsageError`, and deletes nothing, when one has foreign files."""
    owned = [(task.uri, _deletable_files(task)) for task in tasks]
    for uri, own in owned:
        artifacts.refuse_foreign(uri, "adapted_path", own, overwrite=True)
    for uri, own in owned:
        artifacts.withdraw(uri, "adapted_path", own, check=check)
        artifacts.abort_uploads(uri, _OWNED.includes, check)


def _deletable_files(task: Task) -> artifacts.OwnedFiles:
    """Return the files of a task's folder that `cappy adapt` may delete: an earlier outcome, or the remains of a lost run."""
    published = storage.exists(storage.join(task.uri, artifacts.MANIFEST))
    return _OWNED if adapt_one.read_outcome(task) is None or published else _REJECTED


def _refuse_foreign_results(uri: str) -> None:
    """Raise `UsageError` when the `results.json` at `uri` was not written by `cappy adapt`."""
    try:
        found = storage.read_json(storage.join(uri, RESULTS))
    except FileNotFoundError:
        return
    except ValueError:
        found = None
    if not isinstance(found, dict) or "tasks" not in found:
        raise UsageError(
            f"adapted_path={uri} holds files that no `cappy adapt` wrote, e.g. {RESULTS}; nothing was deleted: "
            f"choose another adapted_path, or move them away"
        )


def _run_tasks(
    config: Config, base: Base, tasks: list[Task], stop_requested: threading.Event, held: Lease
) -> Iterator[tuple[Task, Outcome]]:
    """Run tasks on the cluster and yield the outcome of each when it ends. A failed task has state `failed` and its `error`.

    Cancels the tasks and returns once `stop_requested` is set. Raises `LeaseLost` when another run took over.
    """
    import ray

    settings = config.adapt
    gpus = settings.gpus_per_task
    if gpus is None:
        gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
    remote = ray.remote(num_cpus=settings.cpus_per_task, num_gpus=gpus, max_retries=settings.max_retries)(adapt_one.adapt_task)
    concurrency = settings.concurrency or _default_concurrency(settings.cpus_per_task, len(tasks))
    pending = list(reversed(tasks))
    running: dict[Any, Task] = {}
    while (pending or running) and not stop_requested.is_set():
        while pending and len(running) < concurrency:
            task = pending.pop()
            reference = remote.remote(config, task, base, threads=settings.cpus_per_task, gpu=gpus > 0, check=held.claim.check)
            running[reference] = task
        ready, _ = ray.wait(list(running), timeout=_WAIT_S)
        held.check(read_store=False)
        for reference in ready:
            task = running.pop(reference)
            try:
                yield task, ray.get(reference)
            except Exception as error:  # no error of a task may stop the other tasks
                clean = find_cappy_error(error)
                reason = str(clean) if clean else f"{type(error).__name__}: {_last_line(error)}"
                yield task, {"task": task.name, "state": "failed", "error": reason, "uri": None, "use": base.name if base.scorer else None}
    for reference in running:
        ray.cancel(reference, force=True)
    if running:  # the next run deletes their files, so they must have ended by then
        ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_TIMEOUT_S)


def _default_concurrency(cpus: int, tasks: int) -> int:
    """Return how many tasks run concurrently: all on a cluster, which may scale up, else as many as the cores allow."""
    if os.environ.get("RAY_ADDRESS"):
        return max(tasks, 1)
    return max((os.cpu_count() or 1) // cpus, 1)  # the embedded Ray is given more CPUs than the machine has


def _used_points(state: str, points: TaskPoints) -> float | None:
    """Return the points of a task after the gate: of the base, or of the published scorer with its selection."""
    if state != "published":
        return points["before"]
    fitted = points.get("fitted")
    return points["after"] if fitted is None else fitted


def _last_line(error: BaseException) -> str:
    return next(reversed(str(error).strip().splitlines()), "")[:300]


def _summarise(uri: str, config: Config, base: Base, outcomes: list[Outcome], seconds: float) -> AdaptSummary:
    """Return the outcomes of a run and the averages over the measured tasks."""
    states = Counter(outcome["state"] for outcome in outcomes)
    measured = [(outcome["state"], points) for outcome in outcomes if (points := outcome.get("figures"))]
    means = {}
    for name in ("before", "after", "fitted", "random", "self", "oracle"):
        values = [cast("float | None", points.get(name)) for _, points in measured]
        known = [value for value in values if value is not None]
        if values and len(known) == len(values):
            means[name] = sum(known) / len(known)
    used = [value for state, points in measured if (value := _used_points(state, points)) is not None]
    return {
        "uri": uri,
        "dataset": config.dataset_uri,
        "base": base.name,
        "method": config.adapt.method,
        "tasks": [cast("Outcome", {key: value for key, value in outcome.items() if key != "identity"}) for outcome in outcomes],
        "published": states["published"],
        "rejected": states["rejected"],
        "failed": states["failed"],
        "averages": means | ({"after the gate": sum(used) / len(used)} if used else {}),
        "seconds": round(seconds, 1),
    }
