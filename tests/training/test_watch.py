from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.config import ScorerConfig, TrainingConfig
from cluster.errors import UsageError
from training import watch
from training.scorer import new_model

LINE = {"step": 10, "epoch": 0, "loss": 0.25, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_very_model_or_unknown(name: str, tera: float | None):
    assert watch.peak(name) == (tera and tera * 1e12)


def test_there_is_no_peak_on_cpu():
    assert watch.peak_of(torch.device("cpu")) is None


def test_the_operations_are_those_torch_counts(encoder: Path):
    model = new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(), seed=1)
    ids = torch.ones((3, 40), dtype=torch.long)
    with FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(input_ids=ids).logits.sum().backward()
    # The pooler and the head see one token of each pair, which so small a model feels.
    assert watch.Flops(model)(3 * 40, 3 * 40**2) == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_figures_have_names_by_what_they_are_of():
    assert watch.scalars(LINE) == {"train/loss": 0.25, "train/learning_rate": 1e-4}
    assert watch.scalars({"step": 5, "epoch": 0, "validation": {"mse": 0.1, "spearman": None}}) == {"validation/mse": 0.1}


@pytest.mark.parametrize(
    ("setting", "module"), [({"tensorboard": "runs/tb"}, "torch.utils.tensorboard"), ({"mlflow": "http://127.0.0.1:1"}, "mlflow")]
)
def test_a_missing_package_is_named_before_anything_is_spent(setting: dict[str, str], module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"training\.\w+=.*: the package is not installed; pip install 'cappy-ray\[watch\]'"):
        watch.Watchers(TrainingConfig(**setting), "run")


def test_a_watcher_that_fails_is_left_out_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]):
    seen = []

    def broken(line: watch.Line) -> None:
        raise ConnectionError("the server is gone")

    watchers = watch.Watchers(TrainingConfig(), "run")
    watchers._write = {"training.mlflow": broken, "training.tensorboard": seen.append}
    watchers.write(LINE)
    watchers.write(LINE)
    assert seen == [LINE, LINE]
    assert capsys.readouterr().err.count("training.mlflow: ConnectionError: the server is gone; the run goes on without it") == 1
