"""Every example runs in a copy of the folder, as a user runs it, and publishes its results."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from generation.dataset import RegressionSet

# A single example takes minutes, and more on a busy machine.
pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("capitals", "past_tense")


def run(folder: Path, *command: str) -> str:
    """Run a Python program in `folder` with this repository's packages; return its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if not name.startswith("OPENAI_")}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def published(folder: Path) -> bool:
    return (folder / "_MANIFEST.json").is_file()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of `examples/`, as the root of a clone has it."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.fixture(scope="module")
def own_jsonl(clone: Path) -> str:
    """The output of the first example; its set and scorer are in `clone`."""
    return run(clone, "examples/own_jsonl.py")


def test_own_jsonl_publishes_a_set_a_scorer_and_a_report(clone: Path, own_jsonl: str):
    runs = clone / "runs/examples"
    opened = RegressionSet(str(runs / "dataset"))
    assert opened.rows("train") + opened.rows("validation") == 48
    assert set(opened.to_pandas("validation")["dataset"]) == set(TASKS)
    assert published(runs / "scorer") and (runs / "evaluation/report.html").is_file()
    averages = {method: float(figure) for method, figure in re.findall(r"(\w+) +Rouge-L +([\d.]+)", own_jsonl)}
    assert {"greedy", "sample", "scorer", "oracle"} <= averages.keys() and max(averages.values()) == averages["oracle"] > 0


def test_score_and_rerank_ranks_every_candidate(clone: Path, own_jsonl: str):
    output = run(clone, "examples/score_and_rerank.py")
    ranked = [(float(score), text) for score, text in re.findall(r"^ +(-?\d\.\d{3}) (.+)$", output, re.MULTILINE)]
    assert len(ranked) == 4 and ranked == sorted(ranked, key=lambda each: -each[0])
    assert f"best     {ranked[0][1]!r}" in output and "kept     2 of 4 pairs" in output


def test_answer_prompts_answers_each_prompt_with_the_scorer_of_the_package(clone: Path):
    output = run(clone, "examples/answer_prompts.py")
    assert "answered 8 prompts from 40 candidates" in output
    assert len(re.findall(r"^ +-?\d\.\d{3} \d ", output, re.MULTILINE)) == 8
    manifest = json.loads((clone / "runs/examples/answering/answers/_MANIFEST.json").read_text())
    assert manifest["scorer"]["uri"] == "cappy-minilm"


def test_filter_pairs_keeps_the_best_response_of_each_instruction(clone: Path):
    output = run(clone, "examples/filter_pairs.py")
    assert "scored   96 pairs, kept 48" in output and "export   48 rows" in output
    assert published(clone / "runs/examples/best") and published(clone / "runs/examples/sft")


def test_adapt_and_serve_answers_with_a_scorer_of_the_task(clone: Path, own_jsonl: str):
    output = run(clone, "examples/adapt_and_serve.py")
    for task in TASKS:
        assert f"adapted  {task}: published" in output and f"'cappy+{task}'" in output
        assert published(clone / "runs/examples/adapted" / task)
    assert re.search(r"^answer   cappy: '", output, re.MULTILINE) and re.search(r"^answer   cappy\+capitals: '", output, re.MULTILINE)


def test_closed_llm_samples_through_the_api_and_publishes_no_key(clone: Path):
    output = run(clone, "examples/closed_llm.py")
    runs = clone / "runs/examples-closed"
    manifest = json.loads((runs / "dataset/_MANIFEST.json").read_text())
    assert manifest["config"]["sampler"]["engine"]["api_key_env"] == "OPENAI_API_KEY"
    cost = re.search(r"240 sampled responses for \$(\d\.\d{4})", output)
    assert cost and 0 < float(cost[1]) < 1
    assert published(runs / "scorer") and re.search(r"^best     '.*' with score", output, re.MULTILINE)


def test_verify_labels_labels_with_the_function_in_the_workers_of_ray(clone: Path):
    output = run(clone, "examples/verify_labels.py")
    manifest = json.loads((clone / "runs/examples-verified/dataset/_MANIFEST.json").read_text())
    assert manifest["metric"] == {"name": "verify_labels:arithmetic", "mode": None, "version": "1"}
    assert manifest["summary"]["dead_letters"] == 0
    found = re.search(r"^verified (\d+) of (\d+) sampled responses are right\nequal    (\d+) of them", output, re.MULTILINE)
    right, sampled, equal = map(int, found.groups()) if found else (0, 0, 0)
    assert sampled > 0 and equal <= right <= sampled
    examples = RegressionSet(str(clone / "runs/examples-verified/dataset")).to_pandas("train")
    for row in examples.itertuples():
        correct = row.references[0]
        for each in row.candidates:
            if each["source"] == "sampled":
                numbers = re.findall(r"-?\d+", each["response"])
                assert each["label"] == float(bool(numbers) and numbers[-1].lstrip("0") == correct.lstrip("0")), each


def test_batch_on_cluster_scores_every_pair_of_the_set_that_its_job_made(clone: Path, own_jsonl: str):
    output = run(clone, "examples/batch_on_cluster.py")
    runs = clone / "runs/examples-cluster"
    scored = pd.read_parquet(runs / "scored")
    candidates = RegressionSet(str(runs / "dataset")).to_pandas("train")["candidates"]
    assert len(scored) == sum(map(len, candidates)) > 0 and scored["score"].notna().all() and scored["score"].nunique() > 1
    assert f"{len(scored)} pairs" in output


def test_the_code_cells_of_the_notebook_run_in_order(clone: Path):
    notebook = json.loads((clone / "examples/quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    (clone / "cells.py").write_text("\n\n".join(cells))
    # Jupyter runs a notebook in its own folder.
    output = run(clone / "examples", "../cells.py")
    assert published(clone / "runs/quickstart/dataset") and published(clone / "runs/quickstart/scorer")
    assert "Choice(" in output
