from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster import storage
from cluster.config import TrainingConfig, load
from cluster.errors import CappyError, UsageError
from training.best_checkpoint import BestWeights


def weights(value: float) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"w": torch.full((2,), value)}


def best(folder: Path, **training: object) -> BestWeights:
    return BestWeights(str(folder), TrainingConfig.model_validate(training), writes=True)


def test_a_resumed_run_has_the_best_weights_as_of_its_checkpoint(tmp_path: Path):
    run = best(tmp_path, best_by="selection", patience=2)
    for step, selection in ((10, 0.3), (20, 0.5), (30, 0.4)):
        run.add({"selection": selection, "mse": 0.1}, step, weights(step))
        if step == 10:
            early = run.record
    assert run.record["step"] == 20 and run.record["stale"] == 1 and not run.patience_is_exhausted()
    assert run.weights()["w"].tolist() == [20, 20]
    run.add({"selection": 0.5, "mse": 0.0}, 40, weights(40))
    assert run.patience_is_exhausted() and run.record["step"] == 20  # an equal value is not better
    resumed = best(tmp_path, best_by="selection")
    resumed.record = early
    assert resumed.weights()["w"].tolist() == [10, 10]


def test_files_that_no_kept_checkpoint_refers_to_are_deleted(tmp_path: Path):
    run = best(tmp_path, checkpoints_kept=1, best_by="mse")
    for step in range(1, 6):
        run.add({"selection": None, "mse": 1 / step}, step, weights(step))
    assert sorted(storage.list_files(run.folder)) == ["00000004.safetensors", "00000005.safetensors"]


def test_a_damaged_file_is_refused_and_best_by_last_needs_no_file(tmp_path: Path):
    run = best(tmp_path, best_by="mse")
    run.add({"selection": None, "mse": 0.1}, 7, weights(7))
    storage.write_bytes(storage.join(run.folder, "00000007.safetensors"), b"else")
    with pytest.raises(CappyError, match=r"00000007.safetensors, the best weights of the run, is lost or damaged"):
        run.weights()
    last = best(tmp_path / "last", best_by="last")
    assert not last.add({"mse": 0.1}, 1, weights(1)) and last.weights() is None and not last.patience_is_exhausted()


def test_a_metric_that_the_rows_do_not_give_is_refused(tmp_path: Path):
    with pytest.raises(CappyError, match=r"training\.best_by=accuracy: .* choose last or one of mse"):
        best(tmp_path, best_by="accuracy").add({"pairs": 3, "mse": 0.1, "accuracy": None}, 1, weights(1))
    with pytest.raises(UsageError, match="patience=2 needs a metric"):
        load(None, ["training.patience=2", "training.best_by=last"])
