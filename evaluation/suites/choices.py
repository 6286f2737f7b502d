"""Suites of kind `choices` and `questions`: select among given answers, zero-shot. They train no scorer and sample no response.

The value of a row is 1 if the selected choice is right, 0 if not; choices with the same highest score count as a random pick among them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cluster import storage
from cluster.config import Config, SuiteConfig
from cluster.errors import CappyError
from cluster.lease import Lease
from cluster.progress import log
from evaluation import statistics
from evaluation.evaluate import PairScorer
from evaluation.likelihood import ChoiceLikelihood
from evaluation.methods import choice_methods, rank_by
from evaluation.statistics import Floats
from evaluation.suites import results as suite_results
from evaluation.suites.rivals import add_rivals
from evaluation.suites.scores import Row, ScoreStore, add_field, score_candidates
from evaluation.suites.steps import Steps
from generation.sources.reader import read_rows
from generation.sources.row import DeadLetter, Instruction

_CALIBRATION_BINS = 10


def run_choices(
    config: Config, steps: Steps, held: Lease, zero_shot: str | None, load: Callable[[str], PairScorer]
) -> tuple[dict[str, Any], list[Row]]:
    """Score the choices of all rows and compare the methods; return the results, and the rows with their `values` by method.

    Arguments are those of `sampled.run_sampled`. Raises `CappyError` if no row has answer choices.
    """
    suite = config.suite
    assert suite is not None
    with steps.step("read"):
        rows, counts = _question_rows(suite) if suite.kind == "questions" else _source_rows(config)
    key = hashlib.sha256(json.dumps([[row["id"], row["references"]] for row in rows]).encode()).hexdigest()
    store = ScoreStore(storage.join(config.workspace, "scores"), key, held)
    tasks = sorted({row["dataset"] for row in rows})
    models = {}
    if zero_shot is not None:
        models["scorer"] = rank_by("scorer")
        with steps.step("score zero-shot") as measured:
            add_field(rows, "scorer", score_candidates(store, "zero-shot", rows, dict.fromkeys(tasks, zero_shot), load))
            measured |= {"pairs": store.pairs, "scoring_seconds": store.seconds}
    else:
        log("zero-shot scorer left out: scorer_path and adapt.base name none")
    if suite.likelihood:
        with steps.step("likelihood"):
            _add_likelihood(config, suite, rows, tasks, store)
    methods = choice_methods(models, suite.likelihood, add_rivals(config, rows, store, steps, load))
    labels = [np.asarray([each["label"] for each in row["candidates"]], np.float64) for row in rows]
    values = {
        method.name: np.asarray(
            [method.value(row["instruction"], row["candidates"], labels_C) for row, labels_C in zip(rows, labels, strict=True)]
        )
        for method in methods
    }
    for index, row in enumerate(rows):
        row["values"] = {name: float(each[index]) for name, each in values.items()}
    names, tasks_R = np.unique([row["dataset"] for row in rows], return_inverse=True)
    roles = {each.name: each.role for each in methods}
    settings = config.evaluation
    compared = suite_results.compare(
        values, roles, [str(name) for name in names], tasks_R, settings.resamples, settings.confidence, config.seed
    )
    baselines = [name for name, role in roles.items() if role == "baseline"]
    return {
        **compared,
        "titles": {each.name: each.title or each.name for each in methods},
        "roles": roles,
        "headline": "scorer" if models else baselines[-1],
        "rival": max(baselines, key=lambda name: compared["averages"][name]["mean"]),
        "left_out": {},
        "skipped": counts,
        "calibration": {"scorer": _calibration(rows)} if models else {},
        "dataset": None,
        "row_sha256": key,
    }, rows


def _question_rows(suite: SuiteConfig) -> tuple[list[Row], dict[str, int]]:
    rows = [
        _row(group, None, each.instruction, [each.right], [each.right, *each.wrong])
        for group, questions in suite.questions.items()
        for each in questions
    ]
    return rows, {}


def _source_rows(config: Config) -> tuple[list[Row], dict[str, int]]:
    """Return the rows of the source with answer choices, at most `suite.rows` of each dataset, and counts of the other rows.

    A row has no name of its example. Rows of a dataset with the same position among the rows of their template count as one example.
    This holds for P3, and for files with the templates of an example one after the other.
    """
    suite = config.suite
    assert suite is not None
    counts: Counter[str] = Counter()
    usable: list[Instruction] = []
    for each in read_rows(config.source, config.seed):
        if isinstance(each, DeadLetter):
            counts["unreadable"] += 1
        elif each.answer_choices is None:
            counts["without_choices"] += 1
        else:
            usable.append(each)
    if not usable:
        raise CappyError("the source has no rows with answer choices; suite.kind=choices needs classification rows")
    kept = cap_examples(usable, suite.rows, config.seed)
    counts["over_the_cap"] = len(usable) - len(kept)
    return [_row(each.dataset, each.template, each.instruction, each.references, each.answer_choices or ()) for each in kept], dict(counts)


def cap_examples(rows: Sequence[Instruction], most: int | None, seed: int) -> list[Instruction]:
    """Return at most `most` rows of each dataset, in their order: whole examples, drawn by a hash of the seed and the example."""
    seen: Counter[tuple[str, str | None]] = Counter()
    by_example: dict[str, dict[int, list[int]]] = {}
    for index, row in enumerate(rows):
        number = seen[row.dataset, row.template]
        seen[row.dataset, row.template] += 1
        by_example.setdefault(row.dataset, {}).setdefault(number, []).append(index)
    kept: set[int] = set()
    for dataset, examples in by_example.items():
        room = len(rows) if most is None else most
        for number in sorted(examples, key=lambda number: hashlib.blake2b(f"{seed}\0{dataset}\0{number}".encode()).digest()):
            if len(examples[number]) > room:
                break
            room -= len(examples[number])
            kept.update(examples[number])
    return [row for index, row in enumerate(rows) if index in kept]


def _row(dataset: str, template: str | None, instruction: str, references: Iterable[str], choices: Iterable[str]) -> Row:
    """Return a row whose candidates are the choices, stripped, with label 1 if right. Its id is a hash of its content."""
    right = {text.strip() for text in references}
    candidates = [{"response": text, "label": float(text in right)} for text in dict.fromkeys(choice.strip() for choice in choices)]
    identity = json.dumps([dataset, template, instruction, [each["response"] for each in candidates], sorted(right)])
    return {
        "id": hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        "dataset": dataset,
        "template": template,
        "instruction": instruction,
        "references": sorted(right),
        "candidates": candidates,
    }


def _add_likelihood(config: Config, suite: SuiteConfig, rows: Sequence[Row], tasks: Sequence[str], store: ScoreStore) -> None:
    """Add `likelihood`, `tokens` and `unconditional` to the candidates. The LLM is loaded only if a unit is missing."""
    model: list[ChoiceLikelihood] = []

    def compute(task: str, unit: Sequence[Row]) -> list[Floats]:
        if not model:
            model.append(ChoiceLikelihood(config.sampler, suite.neutral_prompt))
        found = model[0].score([row["instruction"] for row in unit], [[each["response"] for each in row["candidates"]] for row in unit])
        return [numbers.ravel() for numbers in found]

    sampler = config.sampler
    key = [sampler.model, sampler.prompt.model_dump(mode="json"), suite.neutral_prompt]
    numbers = store.read_or_compute("likelihood", rows, dict.fromkeys(tasks, key), compute)
    for place, field in enumerate(("likelihood", "tokens", "unconditional")):
        add_field(rows, field, [each.reshape(3, -1)[place] for each in numbers])


def _calibration(rows: Sequence[Row]) -> list[dict[str, float]]:
    choices = [each for row in rows for each in row["candidates"]]
    scores, labels = (np.asarray([each[field] for each in choices], np.float64) for field in ("scorer", "label"))
    return statistics.calibration(scores, labels, _CALIBRATION_BINS)
