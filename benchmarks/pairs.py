"""Provide real texts for benchmarks: rows of BIG-bench tasks (from PyPI) or of a Parquet file, and labelled pairs made from them.

A row has T0's columns: `dataset` (the task), `template` (the subtask), `instruction`, `references` and, for
classification, `answer_choices` (else None). The texts of BIG-bench carry its canary. The benchmarks train on
them to measure speed, and no trained model is kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.errors import UsageError
from generation.sources import bigbench

Row = dict[str, Any]
Pairs = tuple[list[str], list[str], list[float]]

BIGBENCH_ROWS = {
    **{"auto_categorization": 300, "codenames": 80, "date_understanding": 300, "disfl_qa": 2_500, "few_shot_nlg": 150, "gem": 2_500},
    **{"gender_inclusive_sentences_german": 200, "language_games": 2_000, "linguistic_mappings": 500, "movie_recommendation": 500},
    **{"mult_data_wrangling": 500, "physics_questions": 50, "qa_wikidata": 500, "rephrase": 78, "semantic_parsing_spider": 1_000},
    **{"strategyqa": 2_000, "tense": 286, "topical_chat": 1_500},
}
"""Tasks read by default, and the largest number of rows of each."""

COLUMNS = ("dataset", "template", "instruction", "references", "answer_choices")
DATA_HELP = "Parquet file with dataset, instruction, references; rows of BIG-bench tasks (from PyPI) by default"


def read_rows(path: Path | None = None, needed: Sequence[str] = ("dataset", "instruction", "references")) -> list[Row]:
    """Return the rows of a Parquet file, with at least the columns `needed`; without a file, `bigbench_rows(BIGBENCH_ROWS)`."""
    if path is None:
        return bigbench_rows(BIGBENCH_ROWS)
    try:
        names = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise UsageError(f"--data {path} cannot be read as Parquet: {str(error).splitlines()[0]}; give a Parquet file") from None
    missing = [name for name in needed if name not in names]
    if missing:
        raise UsageError(f"--data {path} has no column {', '.join(missing)}, but {', '.join(names)}; rename its columns")
    return list(pq.read_table(path, columns=[name for name in COLUMNS if name in names]).to_pylist())


def bigbench_rows(wanted: dict[str, int], seed: int = 20261121) -> list[Row]:
    """Return rows of BIG-bench tasks, at most `wanted[task]` of each, drawn by seed.

    The first call reads the package's archive in one pass, which takes about half a minute.
    """
    draw = random.Random(seed)
    rows: list[Row] = []
    for (task, most), subtasks in zip(wanted.items(), bigbench.load_tasks(list(wanted)), strict=True):
        examples = [
            each
            for name, body in subtasks.items()
            for each in (*bigbench.render_examples(name, body), *bigbench.render_choices(name, body))
        ]
        for example in draw.sample(examples, min(most, len(examples))):
            choices = example.get("answer_choices")
            texts = {"instruction": example["instruction"], "references": example["references"], "answer_choices": choices}
            rows.append({"dataset": task, "template": example["subtask"], **texts})
    return rows


def labelled_pairs(path: Path | None, count: int, seed: int) -> Pairs:
    """Return instructions, responses and labels of `count` rows drawn from all rows of `path` (or of BIG-bench).

    Every second row keeps its first reference (label 1); the others get one of another row of their dataset (label 0).
    """
    rows = read_rows(path)
    if count > len(rows):
        raise UsageError(f"{count} pairs are more than the {len(rows)} rows of {path or 'the BIG-bench tasks'}; request fewer pairs")
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["dataset"], []).append(row["references"][0])
    draw = random.Random(seed)
    drawn = draw.sample(rows, count)
    responses = [row["references"][0] if place % 2 else draw.choice(references[row["dataset"]]) for place, row in enumerate(drawn)]
    return [row["instruction"] for row in drawn], responses, [float(place % 2) for place in range(count)]


t0_pairs = labelled_pairs
"""The earlier name."""
