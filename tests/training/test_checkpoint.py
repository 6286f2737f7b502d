from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster import artifacts, storage
from cluster.errors import CappyError
from training import checkpoint
from training.checkpoint import Checkpoint, CheckpointWriter


def state(step: int, value: float | None = None) -> Checkpoint:
    """Return a checkpoint whose tensors contain its step."""
    filled = torch.full((3, 2), float(step if value is None else value))
    return Checkpoint(
        step, {"weight": filled}, {"exp_avg/weight": filled + 1, "step/weight": torch.tensor(float(step))}, {"seen": step}, ["{}"]
    )


def steps(folder: str) -> list[int]:
    return sorted(int(name.split("/")[0].split("-")[0]) for name in storage.list_files(folder) if name.endswith(artifacts.MANIFEST))


@pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
def test_the_newest_checkpoints_are_kept_and_read_back(place: str):
    folder = place
    writer = CheckpointWriter(folder, kept=2, successor=f"{folder}/next")
    for step in (0, 5, 10):
        writer.save(state(step))
    writer.finish()
    assert steps(folder) == [5, 10] and checkpoint.last_step(folder) == 10
    read = checkpoint.read_newest(folder, pytest.fail)
    assert read is not None and (read.step, read.trainer_state, read.lines) == (10, {"seen": 10}, ["{}"])
    assert torch.equal(read.weights["weight"], torch.full((3, 2), 10.0)) and read.moments["step/weight"] == 10
    assert {Path(name).suffix for name in storage.list_files(folder)} == {".safetensors", ".json", ".jsonl"}


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "no manifest", "half a manifest", "other state"])
def test_a_damaged_or_incomplete_checkpoint_is_skipped_with_a_warning(harm: str, tmp_path: Path):
    folder = str(tmp_path / "run")
    writer = CheckpointWriter(folder, kept=2, successor=f"{folder}/next")
    for step in (5, 10):
        writer.save(state(step))
    writer.finish()
    (newest,) = (tmp_path / "run").glob("00000010-*")
    file, manifest = newest / "weights-000.safetensors", newest / artifacts.MANIFEST
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "truncate":
        file.write_bytes(content[:-4])
    elif harm == "remove":
        file.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:40])
    else:
        (newest / "state.json").write_text('{"step": 10, "books": {"seen": 11}}')
    warnings: list[str] = []
    read = checkpoint.read_newest(folder, warnings.append)
    assert read is not None and read.step == 5
    assert len(warnings) == 1 and newest.name in warnings[0] and "checkpoint skipped" in warnings[0]
    # The run resumes from 5 and writes 10 again. The damaged checkpoint is deleted.
    CheckpointWriter(folder, kept=2, successor=f"{folder}/next")._write(state(10, 7))
    again = checkpoint.read_newest(folder, pytest.fail)
    assert again is not None and again.weights["weight"][0, 0] == 7 and steps(folder) == [5, 10] and not newest.exists()


def test_an_unreachable_store_is_not_reported_as_a_damaged_checkpoint(bucket: str, monkeypatch: pytest.MonkeyPatch):
    CheckpointWriter(f"{bucket}/run", kept=1, successor=f"{bucket}/next")._write(state(5))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CappyError, match=r"cannot be reached|refused the credentials"):
        checkpoint.read_newest(f"{bucket}/run", pytest.fail)


def test_the_error_of_a_write_is_raised_by_the_next_write(tmp_path: Path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(str(tmp_path / "file"), kept=1, successor=str(tmp_path / "next"))
    writer.save(state(1))
    with pytest.raises(CappyError, match=r"weights-000\.safetensors cannot be written \(Not a directory\)"):
        writer.save(state(2))


def test_a_worker_without_its_driver_writes_nothing_after_another_run_took_over(tmp_path: Path):
    writer = CheckpointWriter(str(tmp_path / "run"), kept=1, successor=str(tmp_path / "next"))
    writer.save(state(1))
    writer.finish()
    (tmp_path / "next").touch()
    writer.save(state(2))
    with pytest.raises(CappyError, match="lease lost: another run took over"):
        writer.finish()
    assert steps(str(tmp_path / "run")) == [1]


def test_a_captured_checkpoint_does_not_change_with_later_steps():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer_state = {"seen": [1]}
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    taken = checkpoint.capture(model, optimizer, 1, trainer_state, [])
    before = model.weight.detach().clone()
    optimizer.step()
    trainer_state["seen"].append(2)
    assert taken is not None and taken.trainer_state == {"seen": [1]}
    assert torch.equal(taken.weights["weight"], before) and not torch.equal(model.weight, before)


def test_tied_weights_are_stored_once_and_weights_of_another_model_are_refused():
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    taken = checkpoint.capture(tied, torch.optim.AdamW(tied.parameters()), 3, {}, [])
    assert taken is not None and len(taken.weights) == 3
    with torch.no_grad():
        tied[0].weight.zero_()
    checkpoint.restore(taken, tied)
    assert torch.equal(tied[1].weight, taken.weights["0.weight"])
    with pytest.raises(CappyError, match=r"the checkpoint of step 3 belongs to another model \(.*\); train again with --overwrite"):
        checkpoint.restore(taken, torch.nn.Linear(3, 3))


def test_large_checkpoints_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 100)
    whole = Checkpoint(1, {str(n): torch.full((10,), float(n)) for n in range(7)}, {}, {}, [])
    checkpoint.write(str(tmp_path), whole)
    assert len(list(tmp_path.glob("weights-*"))) == 4
    read = checkpoint.read(str(tmp_path))
    assert all(torch.equal(read.weights[name], value) for name, value in whole.weights.items())
