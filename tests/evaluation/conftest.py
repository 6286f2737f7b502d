"""Rows, scorers and published sets for the tests of evaluations."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import artifacts
from cluster.config import Config
from generation.schema import DATASET

TASKS = ("tense", "codenames", "mult_data_wrangling")


def candidate(response, label, decoding, logprob, tokens=4, source="sampled"):
    given = {"response": response, "label": label, "source": source, "model": None, "decoding": None, "tokens": None}
    sampled = {"model": "m", "decoding": decoding, "tokens": tokens} if source == "sampled" else {}
    return {**given, **sampled, "finish_reason": "stop" if sampled else None, "logprob": logprob if sampled else None}


def make_rows(per_task=12, tasks=TASKS, seed=0):
    """Return rows with a reference, a greedy candidate and eight sampled candidates of random quality each."""
    draw = random.Random(seed)
    rows = []
    for task in tasks:
        for index in range(per_task):
            names = ["greedy"] + ["sample"] * 4 + ["top-k"] * 4
            sampled = [
                candidate(f"answer {task} {index} {draw.randrange(12)}", round(draw.random() ** 2, 2), name, -10 * draw.random() - 1)
                for name in names
            ]
            by_text = {each["response"]: each["label"] for each in sampled}
            sampled = [{**each, "label": by_text[each["response"]]} for each in sampled]
            rows.append(
                {
                    "id": f"{task}-{index}",
                    "dataset": task,
                    "template": None,
                    "instruction": f"Question {index} about {task}?",
                    "references": ["right"],
                    "answer_choices": None,
                    "candidates": [candidate("right", 1.0, None, None, source="reference"), *sampled],
                }
            )
    return rows


class NoisyScorer:
    """A scorer whose scores are the labels plus noise, so that it is good but not perfect."""

    def __init__(self, rows, noise=0.2):
        draw = np.random.default_rng(1)
        self.known = {
            (row["instruction"], each["response"]): each["label"] + noise * draw.standard_normal()
            for row in rows
            for each in row["candidates"]
        }
        self.calls = []

    def score(self, instructions, responses):
        self.calls.append(list(zip(instructions, responses, strict=True)))
        return np.asarray([self.known[pair] for pair in self.calls[-1]], np.float32)


def publish_set(folder: Path, rows, config: Config) -> str:
    """Publish rows as the validation split of a regression set; return its URI."""
    uri = str(folder)
    shard = "data/validation/part-00000.parquet"
    (folder / shard).parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=DATASET), folder / shard, write_page_checksum=True)
    artifacts.publish(
        uri,
        {
            "kind": "dataset",
            "files": artifacts.checksums(uri, [shard]),
            "counts": {"validation": {"instructions": len(rows)}},
            "config": config.model_dump(mode="json"),
        },
    )
    return uri


@pytest.fixture
def config(tmp_path):
    return Config.model_validate({"workspace": str(tmp_path / "run"), "evaluation": {"resamples": 200, "examples": 6}})
