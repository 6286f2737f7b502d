"""`cappy adapt`: many tasks at once, each a Ray task, from one regression set to a scorer for every task that gains by it.

Below `{workspace}/adapted` each task has its folder: a published scorer where the gate let it pass, else `results.json` alone,
which says so; `results.json` beside them has all tasks. A task that came to an end is not done again; one whose process was
lost begins afresh, and one that fails leaves the others alone. On SIGTERM the run ends at once: what it was at begins afresh, as
a task may take longer than anyone waits. `_lease` keeps a second run away.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from cluster import artifacts, folder_writer, lease, models, storage
from cluster.config import Config, differences, paths
from cluster.errors import Stopped, UsageError
from cluster.lease import Lease
from cluster.progress import Bar, log
from cluster.runtime import find_cappy_error, on_sigterm, ray_session
from generation import engines, generate
from generation.dataset import RegressionSet
from generation.sampler import LoadLLM
from training import adapt_one, lora, scorer, train
from training.adapt_one import RESULTS, Base, Task
from training.scorer import CHECKPOINTS, Scorer, load_tokenizer, new_model

_LEASE = "_lease"
_OWNED = artifacts.OwnedFiles("scorer", "adapt", (f"{CHECKPOINTS}/adapting",), f"{CHECKPOINTS}/adapting", scorer.SCORER_FILES)
# A task whose gate let no scorer pass has this file alone.
_REJECTED = artifacts.OwnedFiles("scorer", "adapt", (*_OWNED.working, r"results\.json"), r"results\.json", ())
_LISTEN_S = 1.0  # after which a SIGTERM is noticed while all tasks are at work
_GONE_S = 30.0
# What may change when a run goes on.
_OPERATIONAL = ("tasks", "concurrency", "cpus_per_task", "gpus_per_task", "max_retries")


def run_adapt(config: Config, *, overwrite: bool = False, load: LoadLLM = engines.load_engine) -> dict[str, Any]:
    """Adapt to the tasks of the set (generated first where it is not there yet, by `load`'s LLM) and return the table of all outcomes.

    A task that fails is in the table with its `error`. Raises `UsageError` where a task was adapted with other settings and
    `overwrite` is not given, `CappyError` where base or set cannot be used, or another run is at work there, `Stopped` on SIGTERM.
    """
    start = time.monotonic()
    if config.training.objective.grouped:
        raise UsageError(
            "training.objective compares an instruction's candidates, and a task's pairs are repeated and cut one by one; "
            "adapt with pairwise=0, listwise=0 and other labels than rank"
        )
    config = paths.absolute(config)
    config = config.model_copy(update={"dataset": storage.check_uri(config.dataset_uri, "dataset"), "adapted_path": config.adapted_uri})
    uri = storage.check_uri(config.adapted_uri, "adapted_path")
    base = _base(config)
    with lease.hold(storage.join(uri, _LEASE), f"adapted_path={uri}") as held, ray_session():
        if not storage.exists(storage.join(config.dataset_uri, artifacts.MANIFEST)):
            generate.run_generate(config, load=load)
        dataset = RegressionSet(config.dataset_uri)
        _say_where_it_differs(config, dataset)
        _refuse_foreign_table(uri)
        tasks = _tasks(config, dataset, base, uri)
        outcomes = {} if overwrite else _finished(tasks)
        if outcomes:
            log(f"{len(outcomes)} of {len(tasks)} tasks are done already; going on")
        pending = [task for task in tasks if task.name not in outcomes]
        _clear(pending, held.check)
        for task in tasks:
            if task.name in outcomes:  # it may have been stopped between publishing and tidying
                artifacts.cleanup(storage.join(task.uri, CHECKPOINTS), held.check)
        closing = on_sigterm("leaving the tasks at work, which begin afresh when the same command goes on", lambda: None)
        with closing as told, Bar("adapting", len(tasks), "tasks", done=len(outcomes)) as bar:
            for task, outcome in _adapt(config, base, pending, told, held):
                outcomes[task.name] = outcome
                bar.advance()
                log(describe(outcome))
            if len(outcomes) < len(tasks):
                raise Stopped(f"stopped on SIGTERM; {len(outcomes)} of {len(tasks)} tasks came to an end, the same command does the rest")
        result = _summarise(uri, config, base, [outcomes[task.name] for task in tasks], time.monotonic() - start)
        folder_writer.FolderWriter(uri, held.check).write_json(RESULTS, result)
        held.finish()
    return result


def describe(outcome: dict[str, Any]) -> str:
    """Return what became of a task in one line."""
    name, gate = outcome["task"], outcome.get("gate")
    if outcome["state"] == "failed":
        return f"{name}: {outcome['error']}"
    gain = "not measured" if gate is None or gate["gain"] is None else f"{gate['before']:.1f} -> {gate['after']:.1f} on the gate's rows"
    return f"{name}: {gain}, {outcome['state']}"


def folder_name(task: str) -> str:
    """Return a task's name as a folder's: what a path cannot hold is `_`, with a hash so that no two tasks share one."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", task)[:100]
    if plain == task and not plain.startswith((".", "_")) and plain != RESULTS:
        return plain
    return f"task-{plain}-{hashlib.blake2b(task.encode(), digest_size=4).hexdigest()}"


def _base(config: Config) -> Base:
    """Load what all tasks start from once, so that what cannot work fails before anything is spent."""
    name = config.adapt.base
    if name is None:
        folder = models.resolve(config.scorer.encoder, "scorer.encoder")
        load_tokenizer(folder, config.scorer.encoder, "scorer.encoder")
        new_model(folder, config.scorer, config.adapt.training(config.training), config.seed)
        return Base(config.scorer.encoder, False, lora.weights_sha256(folder), None, config.scorer.max_length)
    folder = models.resolve(name, "adapt.base")
    scorer = Scorer.load(name, device="cpu", setting="adapt.base")
    manifest = folder / artifacts.MANIFEST
    writer = storage.read_json(str(manifest)).get("writer") if manifest.exists() else None
    base = Base(name, True, lora.weights_sha256(folder), writer, scorer.max_length)
    adapt_one.load_trainable(config, config.adapt.training(config.training), base, torch.device("cpu"))
    return base


def _say_where_it_differs(config: Config, dataset: RegressionSet) -> None:
    """Tell the operator where a set that was there already is not what this config would generate."""
    made = dataset.manifest.get("lineage")
    changes = [change.split(":")[0] for change in differences(made, generate.result_settings(config))] if made else []
    if changes:
        log(f"dataset={dataset.uri} is used as it is; it was generated with another {', '.join(changes)} than this config has")


def _tasks(config: Config, dataset: RegressionSet, base: Base, uri: str) -> list[Task]:
    """Return the tasks of the set that are wanted, in the order of their names."""
    if config.adapt.by == "all":
        names: dict[str, str | None] = {"all": None}
        if config.adapt.tasks:
            raise UsageError(f"adapt.tasks={list(config.adapt.tasks)} with adapt.by=all: all rows are one task; leave adapt.tasks out")
    else:
        names = {name: name for name in sorted(_datasets(dataset))}
        for wanted in config.adapt.tasks or ():
            if wanted not in names:
                close = difflib.get_close_matches(wanted, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(list(names)[:10])}"
                raise UsageError(f"adapt.tasks: dataset={dataset.uri} has no {wanted!r}; {hint}")
        names = {name: name for name in names if not config.adapt.tasks or name in config.adapt.tasks}
    settings = config.adapt.model_dump(mode="json", exclude=set(_OPERATIONAL))
    shared = train.identity(config.model_copy(update={"training": config.adapt.training(config.training)}), dataset.manifest)
    shared = {key: value for key, value in shared.items() if key != "files"} | {"adapt": settings, "base": asdict(base)}
    return [Task(name, only, storage.join(uri, folder_name(name)), {**shared, "task": name}) for name, only in names.items()]


def _datasets(dataset: RegressionSet) -> Counter[str]:
    """The instructions of each dataset of a set."""
    counts: Counter[str] = Counter()
    for split in dataset.manifest["counts"]:
        for table in dataset.batches(split, rows=65536, columns=["dataset"]):
            counts.update({each["values"]: each["counts"] for each in table["dataset"].value_counts().to_pylist()})
    return counts


def _finished(tasks: list[Task]) -> dict[str, dict[str, Any]]:
    """Return the outcomes of the tasks that came to an end with the same settings.

    One that was rejected with others is done again; one that was published with others is a `UsageError`.
    """
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        outcome = adapt_one.read_outcome(task)
        if outcome is None:
            continue
        if outcome["identity"] == task.identity:
            found[task.name] = outcome
        elif outcome["state"] == "published":
            changes = "; ".join(differences(outcome["identity"], task.identity))
            raise UsageError(
                f"adapted_path: {task.uri} was adapted with other settings ({changes}); set them back to go on, "
                f"choose another adapted_path, or start afresh with --overwrite"
            )
    return found


def _clear(tasks: list[Task], check: Callable[[], None] = lambda: None) -> None:
    """Empty the places of tasks, but only of what `cappy adapt` wrote, and none of them where one holds anything else."""
    owned = [(task.uri, _owned(task)) for task in tasks]
    for uri, own in owned:
        artifacts.refuse_foreign(uri, "adapted_path", own, overwrite=True)
    for uri, own in owned:
        artifacts.withdraw(uri, "adapted_path", own, check=check)


def _owned(task: Task) -> artifacts.OwnedFiles:
    """What `cappy adapt` may delete of a task's place: an earlier outcome, or what a lost run left."""
    published = storage.exists(storage.join(task.uri, artifacts.MANIFEST))
    return _OWNED if adapt_one.read_outcome(task) is None or published else _REJECTED


def _refuse_foreign_table(uri: str) -> None:
    """Refuse to write the table of all outcomes over a file of its name that is no such table."""
    place = storage.join(uri, RESULTS)
    try:
        found = storage.read_json(place)
    except FileNotFoundError:
        return
    except ValueError:
        found = None
    if not isinstance(found, dict) or "tasks" not in found:
        raise UsageError(
            f"adapted_path={uri} holds files that no `cappy adapt` wrote, e.g. {RESULTS}; nothing was deleted: "
            f"choose another adapted_path, or move them away"
        )


def _adapt(config: Config, base: Base, tasks: list[Task], told: threading.Event, held: Lease) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Run tasks over the cluster and yield the outcome of each as it ends; one that fails has state `failed` and its `error`.

    Ends early, its tasks cancelled, once `told` is set. Raises `LeaseLost` once another run took over.
    """
    import ray

    settings = config.adapt
    gpus = settings.gpus_per_task
    if gpus is None:
        gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
    remote = ray.remote(num_cpus=settings.cpus_per_task, num_gpus=gpus, max_retries=settings.max_retries)(adapt_one.adapt_task)
    at_once = settings.concurrency or _room(settings.cpus_per_task, len(tasks))
    waiting = list(reversed(tasks))
    running: dict[Any, Task] = {}
    while (waiting or running) and not told.is_set():
        while waiting and len(running) < at_once:
            task = waiting.pop()
            reference = remote.remote(config, task, base, threads=settings.cpus_per_task, gpu=gpus > 0, check=held.claim.check)
            running[reference] = task
        ready, _ = ray.wait(list(running), timeout=_LISTEN_S)
        held.check(look=False)
        for reference in ready:
            task = running.pop(reference)
            try:
                yield task, ray.get(reference)
            except Exception as error:  # whatever it was, the others go on
                clean = find_cappy_error(error)
                reason = str(clean) if clean else f"{type(error).__name__}: {_last_line(error)}"
                yield task, {"task": task.name, "state": "failed", "error": reason, "uri": None, "use": base.name if base.scorer else None}
    for reference in running:
        ray.cancel(reference, force=True)
    if running:  # who goes on clears their places: they must be gone by then
        ray.wait(list(running), num_returns=len(running), timeout=_GONE_S)


def _room(cpus: int, tasks: int) -> int:
    """How many tasks to hand out at once: on this machine as many as it has cores for, on a cluster all, as it may grow."""
    if os.environ.get("RAY_ADDRESS"):
        return max(tasks, 1)
    return max((os.cpu_count() or 1) // cpus, 1)  # an embedded Ray counts more CPUs than there are


def _last_line(error: BaseException) -> str:
    return next(reversed(str(error).strip().splitlines()), "")[:300]


def _summarise(uri: str, config: Config, base: Base, outcomes: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the table of a run: the outcome of each task, and averages of the figures over the tasks that have some."""
    states = Counter(outcome["state"] for outcome in outcomes)
    measured = [outcome["figures"] for outcome in outcomes if outcome.get("figures")]
    means = {
        name: sum(each[name] for each in measured) / len(measured)
        for name in ("before", "after", "random", "self", "oracle")
        if measured and all(each[name] is not None for each in measured)
    }
    used = [outcome["figures"]["after" if outcome["state"] == "published" else "before"] for outcome in outcomes if outcome.get("figures")]
    used = [points for points in used if points is not None]
    return {
        "uri": uri,
        "dataset": config.dataset_uri,
        "base": base.name,
        "method": config.adapt.method,
        "tasks": [{key: value for key, value in outcome.items() if key != "identity"} for outcome in outcomes],
        "published": states["published"],
        "rejected": states["rejected"],
        "failed": states["failed"],
        "averages": means | ({"after the gate": sum(used) / len(used)} if used else {}),
        "seconds": round(seconds, 1),
    }
