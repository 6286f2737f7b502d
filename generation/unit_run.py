"""Drive the units of a run: claim the destination, admit units within the budget, stop on SIGTERM, show progress, merge the results.

`generate`, `answer` and `score` use it. A run has a staging folder with `run.json`, its prepared units, and one object for each finished
unit. Any interruption leaves finished units, and the same command resumes the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from cluster import artifacts, lease, storage
from cluster.artifacts import OwnedFiles
from cluster.config import SamplerConfig, differences, fingerprint
from cluster.errors import CappyError, Stopped, UsageError
from cluster.lease import Lease
from cluster.progress import Bar
from cluster.runtime import on_sigterm
from generation import engines, units

LEASE = "_lease"
"""Folder of the lease, below the destination."""
_BLOCKS = 1000
"""Largest number of blocks of a plan: the state of Ray Data in the driver grows with the number of blocks."""


@contextmanager
def hold_destination(uri: str, setting: str, owned: OwnedFiles, *, overwrite: bool) -> Iterator[Lease]:
    """Hold the lease of a destination that has no finished run; with `overwrite` a finished run is deleted first.

    Raises `UsageError` if the destination has a finished run or foreign files, and `CappyError` if another run has the lease.
    """
    refuse_destination(uri, setting, owned, overwrite=overwrite)
    with lease.hold(storage.join(uri, LEASE), f"{setting}={uri}") as run_lease:
        artifacts.clear_destination(uri, setting, owned, LEASE, run_lease.check, overwrite=overwrite)
        refuse_destination(uri, setting, owned, overwrite=False)
        run_lease.check()
        yield run_lease


def refuse_destination(uri: str, setting: str, owned: OwnedFiles, *, overwrite: bool) -> None:
    """Raise `UsageError` if the destination has a finished run (without `overwrite`) or foreign files."""
    if not overwrite:
        artifacts.refuse_published(uri, setting, owned.verb)
    artifacts.refuse_foreign(uri, setting, owned, overwrite=overwrite)


def claim_destination(staging: str, settings: Mapping[str, Any], setting: str) -> Mapping[str, Any]:
    """Record the settings that decide the result of the run, or compare them with the record of an earlier attempt; return them.

    `inputs` among them has the versions of the published folders that the run reads, by setting. Once the rows are prepared they are not
    read again. So an input that no longer exists keeps its recorded version.

    `setting` names the destination in errors. Raises `UsageError` if the destination was started with other settings.
    """
    record = storage.join(staging, "run.json")
    if storage.create_json(record, {"fingerprint": fingerprint(settings), "settings": settings}):
        return settings
    started = storage.read_json(record)
    # Without prepared.json there is no work to lose: for example, the source of the earlier attempt could not be read.
    if not storage.exists(storage.join(staging, "prepared.json")):
        storage.write_json(record, {"fingerprint": fingerprint(settings), "settings": settings})
        return settings
    without = {name: value for name, value in settings.items() if name != "inputs"}
    recorded = started["settings"].get("inputs")
    settings = without if recorded is None else {**without, "inputs": {**recorded, **settings.get("inputs", {})}}
    if started["fingerprint"] != fingerprint(settings):
        changes = "; ".join(differences(started["settings"], settings))
        raise UsageError(
            f"{setting}={staging.removesuffix('/_staging')} was started with other settings ({changes}); "
            f"use the same settings to resume, choose another {setting}, or start again with --overwrite"
        )
    return settings


class UnitRun:
    """One attempt to finish the units of a run, as a context manager around its Ray Data plan.

    Args:
        title: the work on a unit, for the progress line.
        sampler: the settings with the cost limit.
        total: rows of the whole run.
        done: rows that earlier attempts finished.
        spent: dollars that earlier attempts spent.
        run_lease: checked at each result.
        noun: name of the rows in progress lines and messages.
    """

    def __init__(
        self, title: str, sampler: SamplerConfig, total: int, done: int, spent: float, run_lease: Lease, noun: str = "instructions"
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.spent, self.dead_letters = spent, 0
        self._ceiling, self._lease, self._stack = engines.cost_limit(sampler), run_lease, ExitStack()
        self.done_before = done
        """Rows that earlier attempts finished."""
        # On the node of the driver: if the gate were on a worker node, the loss of that node would end the run.
        self.driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        """Schedules an actor or a task on the node of this process."""
        self.gate = ray.remote(num_cpus=0, scheduling_strategy=self.driver_node)(units.BudgetGate).remote(self._ceiling, spent)
        """The `BudgetGate` of the run, a Ray actor."""
        self._bar = Bar(title, total, noun, done=done)

    def __enter__(self) -> UnitRun:
        closing = on_sigterm("finishing the units in progress; run the same command again to resume", self.gate.close.remote)
        self._stop_requested = self._stack.enter_context(closing)
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def new_rows(self) -> int:
        """Return the number of rows that this attempt finished."""
        return self._bar.done - self.done_before

    def results(self, plan: Any, paid: frozenset[str] = frozenset()) -> Iterator[Any]:
        """Run the plan and yield the counts of each unit. The cost of the units in `paid` is in `spent` already."""
        for result in plan.iter_rows():
            self._lease.check(read_store=False)
            self.dead_letters += result["dead_letters"]
            self.spent += 0.0 if result["unit"] in paid else result["cost"]
            yield result

    def advance(self, rows: int, **counts: int) -> None:
        """Show `rows` more finished rows; `counts` are shown as rates."""
        if not self.new_rows:
            import ray

            self._bar.start_rates(ray.get(self.gate.seconds_of_work.remote()))
        note = "  ".join([f"{self.dead_letters} dead letters"] * bool(self.dead_letters) + [f"${self.spent:,.4f}"] * bool(self.spent))
        self._bar.advance(rows, note=note, **counts)

    def raise_if_stopped(self) -> None:
        """Raise `Stopped` after SIGTERM, and `CappyError` if the next unit could exceed the cost limit."""
        import ray

        state = f"{self._bar.done:,} of {self._bar.total:,} {self._bar.unit} are finished and saved"
        if self._stop_requested.is_set():
            raise Stopped(f"stopped on SIGTERM; {state}; run the same command again to resume")
        if ray.get(self.gate.exhausted.remote()):
            raise CappyError(
                f"sampler.engine.max_cost={self._ceiling:g}: the next unit could exceed it, so no other unit was started "
                f"(${self.spent:,.4f} spent); {state}; raise max_cost and run the same command again to resume"
            )

    def rates(self) -> dict[str, float]:
        """Return the rates of this attempt by name, per second, since its first unit was started."""
        return {f"{name}_per_second": rate for name, rate in self._bar.rates().items()}


def unit_source(names: Sequence[str]) -> Any:
    """Return a Ray Data set with one row for each unit name, and turn off the progress bars of Ray Data, which overlap with `Bar`."""
    import ray.data

    # Ray Data sets its log level when it is imported, so set it after.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.from_items([{"unit": name} for name in names], override_num_blocks=min(len(names), _BLOCKS))


def sampling_pool(replicas: int) -> Any:
    """Return the pool of sampling actors. An actor works on several units at a time, so that its engine has the next rows early."""
    import ray.data

    return ray.data.ActorPoolStrategy(size=replicas, max_concurrent_calls_per_actor=4, max_tasks_in_flight_per_actor=8)


def merge_shards(shards: Mapping[str, Sequence[Any]], write: Callable[..., Any]) -> dict[str, Any]:
    """Write each shard in a Ray task, `write(*arguments)` with the arguments of the shard; return the results by path, sorted."""
    import ray

    merge = ray.remote(num_cpus=1)(write)
    tasks = {merge.remote(*arguments): name for name, arguments in shards.items()}
    merged: dict[str, Any] = {}
    pending = list(tasks)
    with Bar("merging units into shards", len(tasks), "shards") as bar:
        while pending:
            ready, pending = ray.wait(pending)
            for task in ready:
                merged[tasks[task]] = ray.get(task)
                bar.advance()
    return dict(sorted(merged.items()))
