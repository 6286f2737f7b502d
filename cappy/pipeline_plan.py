"""Plan a pipeline: the order of its steps, and which of them are kept, run or redone. Reads manifests, and writes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cappy import pipeline_verbs
from cappy.pipeline_verbs import VERBS, Record, Step
from cluster import storage, versions
from cluster.config import differences
from cluster.errors import CappyError, UsageError

State = Literal["kept", "new", "resumed", "changed", "redo"]
Needs = Mapping[str, Mapping[str, str]]
"""For each step, the steps whose output it reads, by the setting with the path."""
_SHOWN = 120
"""Largest length of a changed setting in a text."""


@dataclass(frozen=True)
class Planned:
    """A step and its state."""

    step: Step
    state: State
    """`kept`: published with the same settings and inputs. `new`: not there. `resumed`: an unfinished run continues. `changed`: there with
    other settings or inputs. `redo`: there, and a step whose output it reads runs."""
    reasons: tuple[str, ...] = ()
    """The changed settings as `setting: old -> new`, and the steps and inputs that make a run necessary."""
    replaces: bool = False
    """Whether the run deletes an output, or work of an unfinished run."""
    own: bool = False
    """Whether settings of the step, or inputs from outside of the pipeline, have changed."""
    causes: tuple[str, ...] = ()
    """Names of the steps whose output it reads and that run, or were published again since."""
    version: str | None = None
    """The version of the output at the time of the plan."""

    @property
    def runs(self) -> bool:
        """Return whether the step runs."""
        return self.state != "kept"


def plan_steps(steps: Sequence[Step]) -> list[Planned]:
    """Return the steps in the order in which they run, each with its state.

    Raises `UsageError` for steps that write to one folder, need each other, or read a folder that no step writes and that is not there.
    """
    _refuse_shared_outputs(steps)
    needs = find_needs(steps)
    planned: dict[str, Planned] = {}
    for step in order_steps(steps, needs):
        try:
            planned[step.name] = _plan_step(step, needs[step.name], {name for name, each in planned.items() if each.runs})
        except CappyError as error:
            raise type(error)(f"step {step.name}: {error}") from None
    return list(planned.values())


def find_needs(steps: Sequence[Step]) -> dict[str, dict[str, str]]:
    """Return for each step the steps whose output it reads. A path below an output belongs to it."""
    needs: dict[str, dict[str, str]] = {}
    for step in steps:
        needs[step.name] = {}
        for setting, path in step.reads().items():
            for other in steps:
                if _is_within(path, other.uri):
                    if other is step:
                        raise UsageError(f"step {step.name} reads {setting}={path}, which it writes itself; give it another destination")
                    needs[step.name][setting] = other.name
    return needs


def order_steps(steps: Sequence[Step], needs: Needs) -> list[Step]:
    """Return the steps so that each is after the steps that it needs, else in the given order.

    Raises `UsageError` if steps need each other.
    """
    ordered: list[Step] = []
    waiting = list(steps)
    while waiting:
        done = {step.name for step in ordered}
        ready = next((step for step in waiting if {*needs[step.name].values(), *step.after} <= done), None)
        if ready is None:
            names = ", ".join(step.name for step in waiting)
            raise UsageError(f"the steps {names} need each other, so none of them can run first; change their paths or `after`")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def refuse_unnamed(planned: Sequence[Planned], redo: Collection[str], command: str) -> None:
    """Raise `UsageError` if a step would delete an output and `redo` does not allow it. `command` is the command of the run.

    A name in `redo` allows a step to be replaced for any reason. It also allows its dependents to be replaced because of their inputs,
    and not because of changed settings.
    """
    names = [each.step.name for each in planned]
    if unknown := next((name for name in redo if name not in names), None):
        raise UsageError(f"--redo={unknown}: no such step; the steps are {', '.join(names)}")
    needs = find_needs([each.step for each in planned])
    by_name = {each.step.name: each for each in planned}

    def allowed(each: Planned) -> bool:
        return each.step.name in redo or (not each.own and all({name, *_upstream(name, needs)} & {*redo} for name in each.causes))

    if refused := [each for each in planned if each.replaces and not allowed(each)]:
        wanted = dict.fromkeys(itertools.chain.from_iterable(_roots(each, by_name) for each in refused))
        flags = " ".join(f"--redo {name}" for name in [*dict.fromkeys([*redo, *wanted])])
        what = "; ".join(f"{each.step.name} ({', '.join(each.reasons)})" for each in refused)
        raise UsageError(
            f"{len(refused)} step(s) would delete their output and make it again: {what}. Nothing was changed. To replace them: "
            f"{command} {flags}. To keep them: restore the settings, or choose another workspace"
        )


def _plan_step(step: Step, needs: Mapping[str, str], running: Collection[str]) -> Planned:
    storage.check_uri(step.uri, "its output")
    verb = VERBS[step.verb]
    for setting in verb.needs:
        if setting not in needs and versions.version(path := step.reads()[setting]) is None:
            raise UsageError(f"{setting}={path} is not published, and no step writes it; add a step that does, or give another path")
    expected = pipeline_verbs.expected(step)
    found = pipeline_verbs.find(step, expected[-1])
    causes = dict.fromkeys(name for name in needs.values() if name in running)
    ignored = {setting for setting, name in needs.items() if name in running}
    settings: list[str] = []
    inputs: list[str] = []
    for record in (*([found.done] if found.done else []), *found.started):
        changed = min((_changes(record, each, ignored) for each in expected), key=lambda each: len(each[0]))
        settings, inputs = [*settings, *changed[0]], [*inputs, *changed[1]]
    causes |= dict.fromkeys(needs[setting] for setting in inputs if setting in needs)
    outside = [setting for setting in dict.fromkeys(inputs) if setting not in needs]
    reasons = [
        *dict.fromkeys(settings),
        *(f"another version of {setting}" for setting in outside),
        *(f"because of {name}" for name in causes),
    ]
    there = bool(found.done or found.started)
    if settings or inputs:
        state: State = "changed" if settings or outside else "redo"
    elif found.done and not causes:
        state = "kept"
    elif there:
        state = "redo" if causes else "resumed"
    else:
        state = "new"
    replaces = state in ("changed", "redo")
    own = bool(settings or outside)
    return Planned(step, state, tuple(reasons if there else ()), replaces, own, tuple(causes), versions.version(step.uri))


def _changes(found: Record, expected: Record, ignored: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the changed settings as texts, and the settings of changed inputs without those in `ignored`."""
    texts = [text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…" for text in differences(found.settings, expected.settings)]
    names = sorted({*found.inputs, *expected.inputs} - {*ignored})
    return texts, [name for name in names if found.inputs.get(name) != expected.inputs.get(name)]


def _refuse_shared_outputs(steps: Sequence[Step]) -> None:
    for one, other in itertools.combinations(steps, 2):
        if _is_within(one.uri, other.uri) or _is_within(other.uri, one.uri):
            raise UsageError(
                f"the steps {one.name} and {other.name} write to {one.uri} and {other.uri}, and one folder cannot hold both outputs; "
                f"give one of them another path in its settings, e.g. scorer_path, or another `dst`"
            )


def _is_within(path: str, folder: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def _upstream(name: str, needs: Needs) -> set[str]:
    """Return the names of all steps that a step needs, directly or not."""
    direct = set(needs[name].values())
    return direct.union(*(_upstream(each, needs) for each in direct))


def _roots(each: Planned, planned: Mapping[str, Planned]) -> list[str]:
    """Return the names of the steps that `--redo` must name for a step, itself included if its own settings changed."""
    if each.own or not each.causes:
        return [each.step.name]
    return list(itertools.chain.from_iterable(_roots(planned[name], planned) for name in each.causes))


def describe(planned: Planned) -> dict[str, Any]:
    """Return a planned step as JSON values."""
    step = planned.step
    return {"name": step.name, "verb": step.verb, "uri": step.uri, "state": planned.state, "reasons": list(planned.reasons)}
