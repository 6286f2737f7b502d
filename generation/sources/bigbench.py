"""BIG-bench generation tasks as instructions, out of the PyPI sdist, without unpacking its 1.8 GB.

The task files wanted are read in one pass over the archive and kept in the cache. Rendering is BIG-bench's standard
zero-shot one; the split is seeded per task. The texts carry BIG-bench's canary: evaluate on them, adapt to a task with its
train rows, never pretrain on them.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypedDict

from cluster import cache
from cluster.errors import UsageError

MIN_VALIDATION = 16
VALIDATION_SHARE = 0.2

_ROOT = "bigbench/benchmark_tasks/"


class Example(TypedDict):
    """One rendered example: what is asked, and every text that is right."""

    subtask: str
    instruction: str
    references: list[str]


class ChoiceExample(Example):
    """A multiple-choice example: the right texts are the references, all texts the choices."""

    answer_choices: list[str]


def read_tasks(tasks: Sequence[str], seed: int) -> Iterator[tuple[str, str, Example]]:
    """Yield `(task, split, example)` of each task in turn, its train rows first.

    Raises `UsageError` for a task BIG-bench does not have or that has no generation examples.
    """
    for task, subtasks in zip(tasks, load_tasks(tasks), strict=True):
        examples = {name: render_examples(name, body) for name, body in subtasks.items()}
        examples = {name: rows for name, rows in examples.items() if rows}
        if not examples:
            raise UsageError(f"source.tasks: {task!r} is multiple-choice only, it has no example with a target; leave it out")
        for name, rows in split_task(list(examples.values()), f"{seed}:{task}").items():
            for row in rows:
                yield task, name, row


def render_examples(subtask: str, body: dict[str, Any]) -> list[Example]:
    """Return the examples of one task file, zero-shot: `task_prefix + input_prefix + input + output_prefix`.

    Examples without a target (multiple choice) or with an empty one are left out; equal instructions become one example
    with several references.
    """
    prefix = body.get("task_prefix", "")
    before = body.get("example_input_prefix", "\nQ: ")
    after = body.get("example_output_prefix", "\nA: ")
    references: dict[str, list[str]] = {}
    for example in body.get("examples", []):
        targets = example.get("target")
        targets = [targets] if isinstance(targets, str) else targets or []
        targets = [target for target in targets if isinstance(target, str) and target.strip()]
        if targets and isinstance(example.get("input"), str):
            references.setdefault(f"{prefix}{before}{example['input']}{after}", []).extend(targets)
    return [
        Example(subtask=subtask, instruction=instruction, references=list(dict.fromkeys(targets)))
        for instruction, targets in references.items()
    ]


def render_choices(subtask: str, body: dict[str, Any]) -> list[ChoiceExample]:
    """Return the examples that have `target_scores` and no target, with their choices listed below the input.

    The order of the choices is drawn by the input's text: many tasks write the right one first.
    """
    prefix = body.get("task_prefix", "")
    before = body.get("example_input_prefix", "\nQ: ")
    after = body.get("example_output_prefix", "\nA: ")
    mark = body.get("choice_prefix", "\n  choice: ")
    found: list[ChoiceExample] = []
    for example in body.get("examples", []):
        scores = example.get("target_scores")
        if example.get("target") or not isinstance(scores, dict) or not scores or not isinstance(example.get("input"), str):
            continue
        choices = random.Random(f"{subtask}:{example['input']}").sample(list(scores), len(scores))
        listed = "".join(f"{mark}{choice}" for choice in choices) if body.get("append_choices_to_input", True) else ""
        best = max(scores.values())
        found.append(
            ChoiceExample(
                subtask=subtask,
                instruction=f"{prefix}{before}{example['input']}{listed}{after}",
                references=[choice for choice in choices if scores[choice] == best],
                answer_choices=choices,
            )
        )
    return found


def split_task(subtasks: Sequence[Sequence[Example]], seed: str) -> dict[str, list[Example]]:
    """Return `{"train", "validation"}` of one task, each with its subtasks in turn.

    Every subtask gives 20 % to validation; then one row of each subtask in turn follows until validation has 20 % of the
    task and at least 16 rows. A train row whose instruction also stands in validation is dropped.
    """
    draw = random.Random(seed)
    train = [draw.sample(list(rows), len(rows)) for rows in subtasks]
    wanted = max(MIN_VALIDATION, round(VALIDATION_SHARE * sum(map(len, train))))
    validation: list[list[Example]] = []
    for rows in train:
        count = int(VALIDATION_SHARE * len(rows))
        validation.append(rows[:count])
        del rows[:count]
    while sum(map(len, validation)) < wanted and any(train):
        for held_out, rows in zip(validation, train, strict=True):
            if rows and sum(map(len, validation)) < wanted:
                held_out.append(rows.pop(0))
    seen = {row["instruction"] for rows in validation for row in rows}
    train = [[row for row in rows if row["instruction"] not in seen] for rows in train]
    return {"train": _in_turn(train), "validation": _in_turn(validation)}


def _in_turn(groups: Sequence[Sequence[Example]]) -> list[Example]:
    return [row for round_ in zip_longest(*groups) for row in round_ if row is not None]


def load_tasks(tasks: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
    """Return `{subtask: task file}` for each task, from the cache or, for those not in it, one pass over the archive."""
    places = [cache.folder() / "bigbench-1.0.0" / task for task in tasks]
    missing = {task for task, place in zip(tasks, places, strict=True) if not place.exists()}
    if missing:
        _extract(missing)
    return [json.loads(Path(place, "subtasks.json").read_text(encoding="utf-8")) for place in places]


def _extract(tasks: set[str]) -> None:
    found: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    known: set[str] = set()
    with tarfile.open(cache.archive("bigbench"), "r|gz") as archive:
        for member in archive:
            _, marker, path = member.name.partition(_ROOT)
            if not marker or not path.endswith("/task.json"):
                continue
            task, *below = path.removesuffix("/task.json").split("/")
            known.add(task)
            if task in tasks and (stream := archive.extractfile(member)) is not None:
                found[task]["/".join(below) or task] = json.load(stream)
    unknown = sorted(tasks - known)
    if unknown:
        raise UsageError(
            f"source.tasks: BIG-bench has no JSON task {', '.join(map(repr, unknown))}; e.g. {', '.join(sorted(known)[:8])}, ..."
        )
    for task, subtasks in found.items():
        # The file of a task with subtasks repeats them in part or whole; its subtasks' own files are the examples.
        own = {name: body for name, body in subtasks.items() if name != task or len(subtasks) == 1}
        cache.build_once(f"bigbench-1.0.0/{task}", partial(_save, json.dumps(dict(sorted(own.items())))))


def _save(text: str, folder: Path) -> None:
    (folder / "subtasks.json").write_text(text, encoding="utf-8")
