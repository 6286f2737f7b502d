"""`cappy run`: run the steps of a pipeline in one process, or as one Ray job.

The manifests of the outputs are the only state. A step is kept if its output is published with the same settings and the same versions
of its inputs. All other steps run, and each verb resumes its own work, so the same command continues after any interruption. A step
that would delete an output needs a permission, `redo`. The steps after a step that runs are redone, because they read its output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from cappy import jobs, pipeline_plan
from cappy.pipeline_plan import Planned
from cappy.pipeline_verbs import VERBS, Step
from cluster import progress, runtime, versions
from cluster.errors import CappyError, Stopped, first_line
from cluster.progress import log

RunStep = Callable[[Step, bool], dict[str, Any]]
"""Runs a step, with `overwrite`; returns the summary of the verb."""


def run_step(step: Step, overwrite: bool) -> dict[str, Any]:
    """Run the verb of a step in this process; return its summary. Raises `CappyError` if tasks of adapt failed."""
    if run := VERBS[step.verb].run:
        return run(step, overwrite)
    places = {"src": step.src, "dst": step.dst} if step.dst else {}
    summary = jobs.run_verb(step.verb, step.config, overwrite=overwrite, **places)
    if step.verb == "adapt" and summary["failed"]:
        reasons = [task["error"] for task in summary["tasks"] if task["state"] == "failed"]
        raise CappyError(f"{summary['failed']} of {len(summary['tasks'])} tasks failed, first: {reasons[0]}")
    return summary


def run_pipeline(
    steps: Sequence[Step], *, redo: Sequence[str] = (), dry_run: bool = False, command: str = "cappy run PIPELINE", run: RunStep = run_step
) -> dict[str, Any]:
    """Run the steps that are not finished; return the state and the minutes of each step.

    Args:
        steps: The steps of `pipeline_file.read_pipeline`.
        redo: Names of steps whose output may be deleted and made again, with the outputs that are made from it.
        dry_run: Return the plan with an estimate of the costs, and change nothing.
        command: The command of this run, for errors.
        run: Runs one step.

    Raises:
        UsageError: The steps do not fit together, or one would delete an output that `redo` does not allow.
        CappyError: A step failed. The message names the step.
        Stopped: SIGTERM ended a step after it saved its state.
    """
    from cappy import display_pipeline

    start = time.monotonic()
    sigterm = runtime.watch_sigterm()
    planned = pipeline_plan.plan_steps(steps)
    report = [pipeline_plan.describe(each) for each in planned]
    if dry_run:
        estimates = [estimate(each) for each in planned]
        return {"dry_run": True, "steps": [entry | {"estimate": cost} for entry, cost in zip(report, estimates, strict=True)]}
    if any(each.runs for each in planned):
        display_pipeline.show_states(report, progress.console)
    pipeline_plan.refuse_unnamed(planned, redo, command)
    for number, (each, entry) in enumerate(zip(planned, report, strict=True), 1):
        name = f"[{number}/{len(planned)}] {each.step.name}"
        if not each.runs:
            log(f"{name}: kept, {each.step.uri}")
            continue
        log(f"{name}: starting ({each.state}), {each.step.uri}")
        began = time.monotonic()
        entry["result"] = _run_one(each, number, len(planned), run)
        entry["minutes"] = round((time.monotonic() - began) / 60, 2)
        log(f"{name}: done in {entry['minutes']:.1f} minutes")
        if sigterm.is_set() and number < len(planned):
            raise Stopped(f"stopped on SIGTERM after step {each.step.name} ({number} of {len(planned)}); run the same command to resume")
    return {"dry_run": False, "steps": report, "minutes": round((time.monotonic() - start) / 60, 2)}


def _run_one(each: Planned, number: int, count: int, run: RunStep) -> dict[str, Any]:
    if each.replaces and versions.version(each.step.uri) != each.version:
        raise CappyError(
            f"step {each.step.name} ({number} of {count}): {each.step.uri} was published again since the start of this run, and was not "
            f"deleted; run the same command again to plan with it"
        )
    try:
        return run(each.step, each.replaces)
    except CappyError as error:
        raise type(error)(f"step {each.step.name} ({number} of {count}): {error}") from error


def estimate(planned: Planned) -> dict[str, Any] | None:
    """Return the estimate of `cappy plan` for a step of generate or train that runs: hours, dollars and pairs. None for other steps.

    `error` has the reason if there is no estimate, e.g. because another step writes the source.
    """
    from generation.plan import run_plan

    step = planned.step
    if not planned.runs or step.verb not in ("generate", "train"):
        return None
    try:
        plan = run_plan(step.config)
    except CappyError as error:
        return {"error": first_line(error)}
    if step.verb == "train":
        if not (training := plan["training"]):
            return {"error": "the size of the encoder or the length of the pairs is unknown"}
        return {"pairs": training["pairs"], "machine_hours": training["machine_hours"], "gpu_hours": training["gpu_hours"]}
    compute = plan["compute"] or {}
    machine = compute.get("machine")
    return {
        "pairs": plan["totals"]["pairs"],
        "machine_hours": machine["hours"]["expected"] if machine else None,
        "gpu_hours": compute["gpu_hours"]["expected"] if compute else None,
        "dollars": plan["dollars"]["expected"],
        "most_dollars": plan["dollars"]["most"],
    }


def submit_pipeline(steps: Sequence[Step], address: str, *, redo: Sequence[str], dry_run: bool, command: str) -> dict[str, Any]:
    """Run the whole pipeline as one Ray job on the cluster with dashboard `address`; return the result of `run_pipeline`."""
    request = {"steps": [step.to_json() for step in steps], "redo": list(redo), "dry_run": dry_run, "command": command}
    return jobs.submit_job("python -m cappy.pipeline", request, address)


def main() -> int:
    """Run a pipeline inside a Ray job; return the exit code."""
    request = jobs.read_request()
    steps = [Step.from_json(tree) for tree in request.pop("steps")]
    places = {f"the output of step {step.name}": step.uri for step in steps}
    return jobs.run_in_job(places, lambda: run_pipeline(steps, **request))


if __name__ == "__main__":
    sys.exit(main())
