"""BIG-bench generation tasks as instructions, read from the PyPI sdist. Imports no Ray.

The sdist unpacks to 1.8 GB, so it is read as a stream and never unpacked: one scan extracts the requested task files to the cache.
Rendering follows BIG-bench's standard zero-shot format; the split is seeded per task. The texts contain BIG-bench's canary:
evaluate on them or adapt to a task with its train rows, but never pretrain on them.
"""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypedDict, cast

from cluster import cache
from cluster.errors import UsageError
from generation.sources.values import as_text, as_texts

MIN_VALIDATION = 16
"""Validation rows of a task, at least."""
VALIDATION_SHARE = 0.2
"""Share of validation rows in a task."""

_ROOT = "bigbench/benchmark_tasks/"
PREFIXES = {"task_prefix": "", "example_input_prefix": "\nQ: ", "example_output_prefix": "\nA: ", "choice_prefix": "\n  choice: "}
"""Keys of a task file with texts that are put before parts of an example, and their defaults."""
TASK_KEYS = ("examples", "append_choices_to_input", *PREFIXES)
"""Keys of a task file that make its rows."""


class Example(TypedDict):
    """One rendered example: the instruction and all correct responses."""

    subtask: str
    instruction: str
    references: list[str]


class ChoiceExample(Example):
    """A multiple-choice example: `references` holds the correct choices, `answer_choices` all of them."""

    answer_choices: list[str]


def read_tasks(tasks: Sequence[str], seed: int) -> Iterator[tuple[str, str, Example]]:
    """Yield `(task, split, example)` task by task, the train rows of a task first.

    Raises `UsageError` for a task that BIG-bench does not have or that has no generation examples.
    """
    for task, subtasks in zip(tasks, load_tasks(tasks), strict=True):
        examples = {name: render_examples(name, body) for name, body in subtasks.items()}
        examples = {name: rows for name, rows in examples.items() if rows}
        if not examples:
            raise UsageError(f"source.tasks: {task!r} is multiple-choice only and has no example with a target; leave it out")
        for name, rows in split_task(list(examples.values()), f"{seed}:{task}").items():
            for row in rows:
                yield task, name, row


def count_left_out(task: str, seed: int) -> tuple[int, int]:
    """Return how many examples of a task have no usable target, and how many repeat the instruction of another row."""
    (subtasks,) = load_tasks([task])
    rendered = [render_example(name, body, example) for name, body in subtasks.items() for example in body.get("examples", [])]
    used = sum(not isinstance(each, str) and "answer_choices" not in each for each in rendered)
    return len(rendered) - used, used - sum(1 for _ in read_tasks([task], seed))


def render_examples(subtask: str, body: Mapping[str, Any]) -> list[Example]:
    """Return the zero-shot examples of one task file: `task_prefix + input_prefix + input + output_prefix`.

    Examples without a target (multiple choice) or with an empty target are left out. Equal instructions become one example with
    several references.
    """
    references: dict[str, list[str]] = {}
    for example in body.get("examples", []):
        rendered = render_example(subtask, body, example)
        if not isinstance(rendered, str) and "answer_choices" not in rendered:
            references.setdefault(rendered["instruction"], []).extend(rendered["references"])
    return [
        Example(subtask=subtask, instruction=instruction, references=list(dict.fromkeys(targets)))
        for instruction, targets in references.items()
    ]


def render_choices(subtask: str, body: Mapping[str, Any]) -> list[ChoiceExample]:
    """Return the examples that have `target_scores` and no target, with the choices listed below the input."""
    rendered = (render_example(subtask, body, example) for example in body.get("examples", []))
    return [cast(ChoiceExample, each) for each in rendered if not isinstance(each, str) and "answer_choices" in each]


def render_example(subtask: str, body: Mapping[str, Any], example: Mapping[str, Any]) -> Example | ChoiceExample | str:
    """Return a rendered example, or the reason for its rejection. An example with a target is not a multiple-choice example.

    Raises `ValueError` if a prefix of the task is not text.
    """
    prefix, before, after, mark = (default if (text := as_text(body.get(key), key)) is None else text for key, default in PREFIXES.items())
    try:
        text = as_text(example.get("input"), "input")
        targets = [target for target in as_texts(example.get("target"), "target") or [] if target.strip()]
    except ValueError as error:
        return str(error)
    if text is None:
        return "the example has no `input`"
    if targets:
        return Example(subtask=subtask, instruction=f"{prefix}{before}{text}{after}", references=targets)
    scores = example.get("target_scores")
    if not isinstance(scores, Mapping) or not scores:
        return "the example has no `target` and no `target_scores`"
    if not all(isinstance(score, int | float) for score in scores.values()) or not max(scores.values()) > 0:
        return "`target_scores` gives no choice a score above 0"
    # The choices are shuffled with the text of the input as seed, because many tasks list the correct choice first.
    choices = random.Random(f"{subtask}:{text}").sample(list(scores), len(scores))
    listed = "".join(f"{mark}{choice}" for choice in choices) if body.get("append_choices_to_input", True) else ""
    best = max(scores.values())
    return ChoiceExample(
        subtask=subtask,
        instruction=f"{prefix}{before}{text}{listed}{after}",
        references=[choice for choice in choices if scores[choice] == best],
        answer_choices=choices,
    )


def split_task(subtasks: Sequence[Sequence[Example]], seed: str) -> dict[str, list[Example]]:
    """Return the rows of one task by split: `{"train": [...], "validation": [...]}`.

    Each subtask gives 20 % of its rows to validation. Then the subtasks give one more row in rotation until validation has 20 % of
    the task and at least 16 rows. A train row whose instruction is also in validation is dropped. The rows of the subtasks alternate.
    """
    rng = random.Random(seed)
    train = [rng.sample(list(rows), len(rows)) for rows in subtasks]
    target = max(MIN_VALIDATION, round(VALIDATION_SHARE * sum(map(len, train))))
    validation: list[list[Example]] = []
    for rows in train:
        count = int(VALIDATION_SHARE * len(rows))
        validation.append(rows[:count])
        del rows[:count]
    while sum(map(len, validation)) < target and any(train):
        for held_out, rows in zip(validation, train, strict=True):
            if rows and sum(map(len, validation)) < target:
                held_out.append(rows.pop(0))
    seen = {row["instruction"] for rows in validation for row in rows}
    train = [[row for row in rows if row["instruction"] not in seen] for rows in train]
    return {"train": _alternate(train), "validation": _alternate(validation)}


def _alternate(groups: Sequence[Sequence[Example]]) -> list[Example]:
    """Return the rows of all groups, one of each group in rotation."""
    return [row for round_ in zip_longest(*groups) for row in round_ if row is not None]


def load_tasks(tasks: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
    """Return `{subtask: task file}` for each task. Tasks that are not in the cache are extracted first, in one scan of the archive."""
    folders = [cache.folder() / "bigbench-1.0.0" / task for task in tasks]
    missing = {task for task, folder in zip(tasks, folders, strict=True) if not folder.exists()}
    if missing:
        _extract_tasks(missing)
    return [json.loads(Path(folder, "subtasks.json").read_text(encoding="utf-8")) for folder in folders]


def _extract_tasks(tasks: set[str]) -> None:
    """Extract the task files of some tasks from the archive to the cache. Raises `UsageError` for an unknown task."""
    found: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    known: set[str] = set()
    with tarfile.open(cache.fetch_archive("bigbench"), "r|gz") as archive:
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
        # The file of a task with subtasks repeats some or all of their examples, so only the files of the subtasks are used.
        own = {name: body for name, body in subtasks.items() if name != task or len(subtasks) == 1}
        cache.build_once(f"bigbench-1.0.0/{task}", partial(_save_subtasks, json.dumps(dict(sorted(own.items())))))


def _save_subtasks(text: str, folder: Path) -> None:
    (folder / "subtasks.json").write_text(text, encoding="utf-8")
