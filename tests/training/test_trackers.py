from __future__ import annotations

import sys

import pytest

from cluster.config import TrainingConfig
from cluster.errors import UsageError
from training import trackers

LINE = {"step": 10, "epoch": 0, "loss": 0.25, "learning_rate": 1e-4}


def test_figures_have_names_by_what_they_are_of():
    assert trackers.scalars(LINE) == {"train/loss": 0.25, "train/learning_rate": 1e-4}
    assert trackers.scalars({"step": 5, "epoch": 0, "validation": {"mse": 0.1, "spearman": None}}) == {"validation/mse": 0.1}


@pytest.mark.parametrize(
    ("setting", "module"), [({"tensorboard": "runs/tb"}, "torch.utils.tensorboard"), ({"mlflow": "http://127.0.0.1:1"}, "mlflow")]
)
def test_a_missing_package_is_named_before_anything_is_spent(setting: dict[str, str], module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"training\.\w+=.*: the package is not installed; pip install 'cappy-ray\[watch\]'"):
        trackers.Trackers(TrainingConfig(**setting), "run")


def test_a_watcher_that_fails_is_left_out_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]):
    seen = []

    def broken(line: trackers.Line) -> None:
        raise ConnectionError("the server is gone")

    watchers = trackers.Trackers(TrainingConfig(), "run")
    watchers._write = {"training.mlflow": broken, "training.tensorboard": seen.append}
    watchers.write(LINE)
    watchers.write(LINE)
    assert seen == [LINE, LINE]
    assert capsys.readouterr().err.count("training.mlflow: ConnectionError: the server is gone; the run goes on without it") == 1
