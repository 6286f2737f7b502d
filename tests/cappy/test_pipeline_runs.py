"""`cappy run` with the real verbs, a synthetic LLM and a tiny random encoder: kept outputs, and a driver that is killed at each step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from cappy.pipeline import run_pipeline
from cappy.pipeline_file import read_pipeline
from cluster import storage
from cluster.errors import UsageError
from generation.dataset import RegressionSet
from tests.cappy.pipeline_driver import run_step
from tests.training.conftest import encoder, one_thread  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.full]
ROOT = Path(__file__).resolve().parents[2]
TEXT = """
settings:
  workspace: {folder}/work
  source: {{kind: files, path: {folder}/rows.jsonl, validation_fraction: 0.3}}
  sampler: {{decodings: [{{name: greedy, temperature: 0}}, {{name: sample, n: 3}}]}}
  generate: {{unit_rows: 4}}
  scorer: {{encoder: {encoder}, max_length: 32, dtype: float32}}
  training: {{epochs: 1, batch_size: 8, window: 32, checkpoint_every: 2}}
  evaluation: {{resamples: 100}}
  adapt: {{by: all, pairs: 16, batch_size: 8, folds: 0, gate: false, validation_rows: 4}}
steps:
  - generate
  - train
  - evaluate
  - {adapt}
  - answer
  - {{verb: export, name: sft, src: answer, options: {{as: sft}}}}
"""
STEPS = ("generate", "train", "evaluate", "answer", "sft")


def write(folder: Path, encoder: Path, adapt: bool = False) -> Path:  # noqa: F811
    rows = [{"instruction": f"say {n}", "references": [f"number {n}"], "dataset": "numbers"} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TEXT.format(folder=folder, encoder=encoder, adapt="adapt" if adapt else "")
    (folder / "pipeline.yaml").write_text(text.replace("  - \n", ""))
    return folder / "pipeline.yaml"


def run(file: Path, *settings: str, redo: tuple[str, ...] = ()) -> dict[str, str]:
    """Run a pipeline in this process; return the state of each step."""
    result = run_pipeline(read_pipeline(file, settings), redo=redo, run=run_step)
    return {step["name"]: step["state"] for step in result["steps"]}


def test_the_outputs_of_all_verbs_are_kept_until_a_setting_changes(tmp_path, encoder, ray_here):  # noqa: F811
    file = write(tmp_path, encoder, adapt=True)
    assert set(run(file).values()) == {"new"}
    kept = run(file)
    assert set(kept.values()) == {"kept"} and len(kept) == 6
    changed = ("evaluation.examples=3",)
    with pytest.raises(UsageError, match=r"evaluate \(evaluation\.examples: 24 -> 3\)"):
        run(file, *changed)
    assert run(file, *changed, redo=("evaluate",)) == {**kept, "evaluate": "changed"}
    plan = run_pipeline(read_pipeline(file, [*changed, "adapt.pairs=8"]), dry_run=True)["steps"]
    assert {step["name"]: step["reasons"] for step in plan if step["reasons"]} == {"adapt": ["adapt.pairs: 16 -> 8"]}


def drive(file: Path, victim: str = "none", *changes: str) -> int:
    """Run a pipeline in a separate process that is killed in the middle of a step; return its exit code."""
    command = [sys.executable, "-m", "tests.cappy.pipeline_driver", str(file), victim, "middle", *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, start_new_session=True, stdin=subprocess.DEVNULL).returncode


def read_outputs(workspace: Path) -> dict[str, Any]:
    """Return the content of all outputs, without times and paths."""
    opened = RegressionSet(f"{workspace}/dataset")
    results = storage.read_json(f"{workspace}/evaluation/results.json")
    tables = {name: sorted((workspace / name / "data").rglob("*.parquet")) for name in ("answers", "sft")}
    return {
        "dataset": repr({split: opened.to_pandas(split).to_dict("records") for split in ("train", "validation")}),
        "scorer": {name: values.tobytes() for name, values in load_file(workspace / "scorer/model.safetensors").items()},
        "evaluation": {name: results[name] for name in ("methods", "per_task", "gain")},
        **{name: [row for path in paths for row in pq.read_table(path).to_pylist()] for name, paths in tables.items()},
    }


def versions(workspace: Path) -> dict[str, str]:
    return {path.parent.name: storage.read_json(str(path))["writer"] for path in workspace.glob("*/_MANIFEST.json")}


@pytest.mark.timeout(3600)
def test_a_driver_that_is_killed_at_each_step_ends_with_the_same_outputs_and_a_change_redoes_only_its_dependents(
    tmp_path,
    encoder,  # noqa: F811
):
    folders = [tmp_path / name for name in ("unbroken", "killed")]
    for folder in folders:
        folder.mkdir()
    unbroken, killed = (write(folder, encoder) for folder in folders)
    assert drive(unbroken) == 0
    finished: dict[str, str] = {}
    for step in STEPS:
        assert drive(killed, step) == -9
        now = versions(folders[1] / "work")
        assert finished.items() <= now.items()  # no finished step ran again
        finished = now
    assert drive(killed) == 0
    first = read_outputs(folders[0] / "work")
    assert read_outputs(folders[1] / "work") == first

    change = ("training.epochs=2", "--redo=train")
    assert drive(killed, "none", "training.epochs=2") == 2
    assert versions(folders[1] / "work").items() >= finished.items()
    before = versions(folders[1] / "work")
    for step in ("train", "evaluate", "answer", "sft"):
        assert drive(killed, step, *change) == -9
    assert drive(killed, "none", *change) == 0
    after = versions(folders[1] / "work")
    assert {name for name in before if before[name] == after[name]} == {"dataset"}
    assert drive(unbroken, "none", *change) == 0
    assert read_outputs(folders[1] / "work") == read_outputs(folders[0] / "work") != first
