"""The checks of `benchmarks/gpu.sh`, on CPU and small, and the script on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks
from tests.benchmarks.test_training_step import ABSENT

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--model", "minilm"]


def test_training_in_bfloat16_follows_float32(capsys):
    assert gpu_checks.run_check(["training", *SMALL, "--steps", "1", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["losses"]["bfloat16"]) == 1 and 0 <= result["max_difference"] <= gpu_checks.MAX_LOSS_DIFFERENCE


def test_training_fails_when_the_losses_differ(capsys, monkeypatch):
    losses = {"float32": [0.5, 0.4], "bfloat16": [0.5, 0.6]}
    monkeypatch.setattr(gpu_checks, "_losses", lambda _, dtype: losses[dtype])
    assert gpu_checks.run_check(["training", *SMALL]) == 1
    assert "differ from float32 losses by 50.0%" in capsys.readouterr().err


def test_training_fails_when_a_loss_is_not_finite(capsys, monkeypatch):
    monkeypatch.setattr(gpu_checks, "_losses", lambda *_: [float("nan")])
    assert gpu_checks.run_check(["training", *SMALL]) == 1
    assert "a loss is not finite" in capsys.readouterr().err


def test_scores_in_bfloat16_follow_float32(capsys):
    assert gpu_checks.run_check(["scoring", *SMALL, "--pairs", "8", "--steps", "1", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pairs"] == 8 and result["pairs_per_second"] > 0 and result["max_difference"] <= gpu_checks.MAX_SCORE_DIFFERENCE


def test_training_and_scoring_need_only_torch_and_transformers():
    hidden = f"import runpy, sys; sys.modules |= dict.fromkeys({ABSENT!r}); sys.argv[0] = 'gpu_checks'"
    script = f"{hidden}; runpy.run_module('benchmarks.gpu_checks', run_name='__main__')"
    command = [sys.executable, "-c", script, "scoring", *SMALL, "--pairs", "2", "--steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM takes the GPU of this machine")
def test_the_engine_check_passes_on_cpu():
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "engine", "--device", "cpu", "--prompts", "2", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["candidates"] == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_script_refuses_a_machine_without_a_gpu(tmp_path):
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2 and "finds no NVIDIA GPU" in done.stderr and not (tmp_path / "out").exists()
