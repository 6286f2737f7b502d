"""The training benchmark for one device: its settings, its lengths, and a run with torch and transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import training_step
from cluster.config import TrainingConfig

# Packages that a machine with only torch and transformers may lack.
ABSENT = (
    *("accelerate", "boto3", "datasets", "fastapi", "httpx", "matplotlib", "numba", "pandas", "peft", "prometheus_client", "psutil"),
    *("pyarrow", "pydantic", "ray", "rich", "scipy", "sklearn", "tenacity", "urllib3"),
)


def test_its_settings_equal_the_defaults():
    shipped = TrainingConfig()
    found = {**{name: getattr(shipped, name) for name in training_step.SETTINGS}, "objective": shipped.objective.model_dump()}
    assert {**found, "objective": {**found["objective"], "grouped": shipped.objective.grouped}} == training_step.SETTINGS


def test_lengths_follow_the_table():
    lengths = training_step.lengths_of(4096)
    assert len(lengths) == 4096 and (np.diff(lengths) >= 0).all()
    quantiles = np.quantile(lengths, np.linspace(0, 1, len(training_step.LENGTHS)))
    assert np.abs(quantiles - training_step.LENGTHS).max() <= 2


def test_it_runs_with_only_torch_and_transformers():
    hidden = f"import runpy, sys; sys.modules |= dict.fromkeys({ABSENT!r}); sys.argv[0] = 'training_step'"
    script = f"{hidden}; runpy.run_module('benchmarks.training_step', run_name='__main__')"
    options = ["--device=cpu", "--model=minilm", "--dtype=float32", "--steps=2", "--turns=1", "--batch-size=2", "--json=-"]
    ran = subprocess.run([sys.executable, "-c", script, *options], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    table, result = ran.stdout.splitlines()[:-1], json.loads(ran.stdout.splitlines()[-1])
    sides = result["sides"]
    assert [line[:18].strip() for line in table[2:8]] == list(sides)
    assert all(side["pairs"] == 4 and side["pairs_per_second"] > 0 and side["mfu"] is side["memory_gib"] is None for side in sides.values())
    assert sides["padded to 512"]["tokens"] == sides["dynamic padding"]["tokens"]
    assert sides["padded to 512"]["padding_share"] == round(1 - sides["padded to 512"]["tokens"] / (4 * 512), 4)
    assert sides["padded to 512"]["padding_share"] > sides["dynamic padding"]["padding_share"] > sides["ours"]["padding_share"]
    assert [side["attention_dropout"] for side in sides.values()] == [0.1, 0.1, 0.0, 0.1, 0.0, 0.0]
    assert [side["hidden_dropout"] for side in sides.values()] == [0.1, 0.1, 0.1, 0.1, 0.0, 0.0]
    assert [side["frozen_layers"] for side in sides.values()] == [0, 0, 0, 0, 0, 3]
