from __future__ import annotations

import sys

import pytest

from cluster.config import TrainingConfig
from cluster.errors import UsageError
from training import trackers
from training.records import MetricsLine

LINE = {"step": 10, "epoch": 0, "loss": 0.25, "gradient_norm": 1.5, "learning_rate": 1e-4}


def test_scalars_are_named_by_their_section():
    assert trackers.scalars(LINE) == {"train/loss": 0.25, "train/gradient_norm": 1.5, "train/learning_rate": 1e-4}
    assert trackers.scalars({"step": 5, "epoch": 0, "validation": {"mse": 0.1, "spearman": None}}) == {"validation/mse": 0.1}


@pytest.mark.parametrize(
    ("setting", "module"), [({"tensorboard": "runs/tb"}, "torch.utils.tensorboard"), ({"mlflow": "http://127.0.0.1:1"}, "mlflow")]
)
def test_a_missing_package_is_reported_before_training(setting: dict[str, str], module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"training\.\w+=.*: the package is not installed; pip install 'cappy-ray\[watch\]'"):
        trackers.Trackers(TrainingConfig(**setting), "run")


def test_a_tracker_that_fails_is_switched_off_and_training_continues(capsys: pytest.CaptureFixture[str]):
    seen = []

    def broken(line: MetricsLine) -> None:
        raise ConnectionError("the server is down")

    active = trackers.Trackers(TrainingConfig(), "run")
    active._write = {"training.mlflow": broken, "training.tensorboard": seen.append}
    active.write(LINE)
    active.write(LINE)
    assert seen == [LINE, LINE]
    assert capsys.readouterr().err.count("training.mlflow: ConnectionError: the server is down; training continues without it") == 1
