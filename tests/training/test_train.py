from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from cluster import artifacts, lease, storage
from cluster.config import Config, load
from cluster.errors import CappyError, Stopped, UsageError
from tests.training.conftest import publish, rows, settings
from training import checkpoint, train
from training.scorer import CHECKPOINTS, Scorer

pytestmark = pytest.mark.slow

# Small steps of 4 pairs, so that a kill falls between checkpoints. Enough epochs that a SIGTERM arrives before the end: it takes up to
# a second to reach the worker on a busy machine.
EPOCHS, STEPS = 18, 53
RUN = """
import sys

from cluster.config import load
from training import train
if __name__ == "__main__":
    train.run_train(load(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def trained(encoder: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> tuple[Config, dict[str, Any]]:
    """Return the config and the summary of a finished run without interruptions."""
    workspace = tmp_path_factory.mktemp("run")
    publish(str(workspace / "dataset"), 70, 20)
    steps = {"batch_size": 4, "checkpoint_every": 20}
    config = settings(str(workspace), encoder, epochs=EPOCHS, learning_rate=2e-3, best_by="selection", **steps)
    return config, train.run_train(config)


def weights(scorer_uri: str) -> dict[str, np.ndarray]:
    return load_file(Path(scorer_uri, "model.safetensors"))


def test_a_run_publishes_a_trained_scorer(trained: tuple[Config, dict[str, Any]]):
    config, summary = trained
    manifest = artifacts.read_manifest(config.scorer_uri, "scorer", "train")
    assert manifest["summary"] == summary == json.loads(json.dumps(summary))
    assert artifacts.verify(config.scorer_uri, manifest) == []
    assert summary["pairs"] == 210 and summary["epochs"] == EPOCHS and summary["steps"] == EPOCHS * STEPS
    assert summary["train_mse"] < 0.12 and summary["validation"]["mse"] < 0.12
    assert summary["validation"]["spearman"] > 0.5
    files = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "config.yaml",
        "metrics.jsonl",
        "README.md",
        "loss.svg",
        "calibration.svg",
    }
    assert files <= set(manifest["files"])
    assert not storage.exists(storage.join(config.scorer_uri, CHECKPOINTS))
    assert load(Path(config.scorer_uri, "config.yaml")).scorer == config.scorer


def test_a_selection_is_fitted_on_held_out_instructions(encoder: Path, tmp_path: Path, ray_here: None):
    publish(str(tmp_path / "dataset"), 70, 5)
    config = settings(str(tmp_path), encoder, epochs=1, selection_share=0.4)
    summary = train.run_train(config)
    assert 0 < summary["pairs"] < 210 and 8 <= summary["selection"]["rows"] <= 70 - summary["pairs"] / 3
    manifest = artifacts.read_manifest(config.scorer_uri, "scorer", "train")
    assert "selection.json" in manifest["files"] and artifacts.verify(config.scorer_uri, manifest) == []
    selection = Scorer.load(config.scorer_uri).selection
    assert (
        selection.made["share"] == 0.4
        and dict(zip(selection.variants[0].signals, selection.variants[0].weights, strict=True)) == (summary["selection"]["weights"])
    )
    assert "selection.json" in Path(config.scorer_uri, "README.md").read_text()


def test_the_published_scorer_loads_and_its_scores_have_the_validation_mse(trained: tuple[Config, dict[str, Any]]):
    config, summary = trained
    plain = AutoModelForSequenceClassification.from_pretrained(config.scorer_uri)
    assert (plain.config.num_labels, plain.config.problem_type) == (1, "regression")
    scorer = Scorer.load(config.scorer_uri)
    assert scorer.max_length == config.scorer.max_length
    pairs = [(row["instruction"], each["response"], each["label"]) for row in rows(20, seed=2) for each in row["candidates"]]
    scores = scorer.score([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert np.mean((scores - [pair[2] for pair in pairs]) ** 2) == pytest.approx(summary["validation"]["mse"], abs=1e-5)


def test_the_best_validated_weights_are_published_with_their_metrics(trained: tuple[Config, dict[str, Any]]):
    config, summary = trained
    lines = [json.loads(line) for line in Path(config.scorer_uri, "metrics.jsonl").read_text().splitlines()]
    selection = {line["step"]: line["validation"]["selection"] for line in lines if "validation" in line}
    assert summary["best"]["metric"] == "selection"
    assert summary["best"]["step"] == max(selection, key=lambda step: (selection[step], -step))
    assert summary["validation"]["selection"] == summary["best"]["value"] == max(selection.values())
    assert summary["validation"]["random"] < summary["validation"]["selection"] <= summary["validation"]["oracle"]
    assert sum(group["count"] for group in summary["calibration"]) == summary["validation"]["pairs"]
    # All candidates of this set have the same log-probability, so the best weight is 0.
    assert summary["blend"]["logprob_weight"] == Scorer.load(config.scorer_uri).logprob_weight == 0.0
    assert f"step {summary['best']['step']}" in Path(config.scorer_uri, "README.md").read_text()


def test_a_run_without_improvement_stops_early(encoder: Path, tmp_path: Path, ray_here: None):
    publish(str(tmp_path / "dataset"), 70, 20)
    slow = {"learning_rate": 1e-12, "validate_every": 2, "patience": 2, "best_by": "selection", "blend_rows": 0}
    summary = train.run_train(settings(str(tmp_path), encoder, epochs=EPOCHS, **slow))
    assert summary["steps"] == 6 and summary["best"]["step"] == 2 and summary["blend"] is None
    assert Scorer.load(str(tmp_path / "scorer")).logprob_weight is None


def test_best_by_is_refused_without_validation_rows(encoder: Path, tmp_path: Path):
    publish(str(tmp_path / "dataset"), 4, 0)
    with pytest.raises(UsageError, match=r"training\.best_by=mse needs validation rows"):
        train.run_train(settings(str(tmp_path), encoder, best_by="mse", patience=2))


def test_the_log_has_every_step_once_and_finite_gradient_norms(trained: tuple[Config, dict[str, Any]]):
    config, summary = trained
    lines = [json.loads(line) for line in Path(config.scorer_uri, "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == summary["steps"]
    assert all(0 < line["gradient_norm"] < 100 for line in lines if "loss" in line)
    assert [line["epoch"] for line in lines if "validation" in line] == list(range(EPOCHS))


def test_a_finished_scorer_is_replaced_with_overwrite_only_and_foreign_files_never(trained: tuple[Config, dict[str, Any]], tmp_path: Path):
    config, _ = trained
    with pytest.raises(UsageError, match="already holds a finished run"):
        train.run_train(config)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"no `cappy train` wrote, e.g. thesis.txt"):
        train.run_train(config.model_copy(update={"scorer_path": str(tmp_path)}), overwrite=True)
    with pytest.raises(CappyError, match="holds a dataset, not a scorer"):
        train.run_train(config.model_copy(update={"scorer_path": config.dataset_uri}), overwrite=True)
    (tmp_path / "thesis.txt").rename(tmp_path / "README.md")
    with pytest.raises(UsageError, match=r"no `cappy train` wrote, e.g. README.md; nothing was deleted"):
        train.run_train(config.model_copy(update={"scorer_path": str(tmp_path)}))
    for name in ("thesis.txt", f"{CHECKPOINTS}/thesis.txt"):
        mine = tmp_path / "copy"
        storage.download_folder(config.scorer_uri, mine)
        storage.write_bytes(f"{mine}/{name}", b"theirs")
        before = storage.list_files(str(mine))
        with pytest.raises(UsageError, match=rf"no `cappy train` wrote, e.g. {name}; nothing was deleted"):
            train.run_train(config.model_copy(update={"scorer_path": str(mine)}), overwrite=True)
        assert storage.list_files(str(mine)) == before
        storage.delete(str(mine))
    (tmp_path / "README.md").rename(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").exists() and storage.exists(storage.join(config.dataset_uri, artifacts.MANIFEST))


def test_an_unfinished_set_and_an_unknown_encoder_are_refused_before_training(encoder: Path, tmp_path: Path):
    publish(str(tmp_path / "dataset"), 4, 2)
    with pytest.raises(UsageError, match=r"scorer\.encoder=\./nowhere: no such folder"):
        train.run_train(Config.model_validate({"workspace": str(tmp_path), "scorer": {"encoder": "./nowhere"}}))
    storage.delete(str(tmp_path / "dataset" / artifacts.MANIFEST))
    with pytest.raises(CappyError, match="the run writing it did not finish"):
        train.run_train(settings(str(tmp_path), encoder))


def test_an_error_of_a_worker_is_raised_by_the_driver_in_one_line(encoder: Path, tmp_path: Path, ray_here: None):
    publish(str(tmp_path / "dataset"), 70, 20)
    with pytest.raises(CappyError, match=r"^the loss is (nan|inf) near step \d+; lower training.learning_rate \(now 1e\+30\)$"):
        train.run_train(settings(str(tmp_path), encoder, learning_rate=1e30, clip_norm=1e30))
    with pytest.raises(CappyError, match="the run writing it did not finish"):
        Scorer.load(str(tmp_path / "scorer"))


def test_two_workers_train_from_and_to_object_storage(encoder: Path, bucket: str, ray_here: None):
    publish(f"{bucket}/run/dataset", 70, 20)
    config = settings(f"{bucket}/run", encoder, epochs=6, learning_rate=5e-3, workers=2)
    summary = train.run_train(config)
    assert summary["steps"] == 6 * 14 and summary["train_mse"] < 0.12
    assert summary["validation"]["pairs"] == 60
    manifest = artifacts.read_manifest(config.scorer_uri, "scorer", "train")
    assert artifacts.verify(config.scorer_uri, manifest) == []
    assert set(storage.list_files(config.scorer_uri)) == {*manifest["files"], artifacts.MANIFEST}
    assert Scorer.load(config.scorer_uri).score(["say after me red fox"], ["a red fox"])[0] > 0.4


@pytest.mark.full
def test_a_run_that_lost_worker_driver_and_checkpoint_ends_bit_equal(
    trained: tuple[Config, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    untouched, whole = trained
    config = untouched.model_copy(update={"scorer_path": str(tmp_path / "scorer")})
    process = launch(config, tmp_path)
    wait_for_step(process, config, 20)
    _worker_of(process).kill()
    wait_for(process, config, lambda: "resuming from step" in (tmp_path / "log").read_text())
    wait_for_step(process, config, last_step(config) + 20)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in reversed(family):  # the driver first: its workers run for some seconds longer
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family, 30)
    newest = max(Path(config.scorer_uri, CHECKPOINTS).glob(f"*/{last_step(config):08d}-*"))
    (newest / "state.json").write_text("{}")
    assert threading.current_thread() is threading.main_thread()  # Python handles signals there
    at = last_step(config)
    threading.Thread(target=_terminate_me_after, args=(config, at + 20)).start()
    with pytest.raises(Stopped) as stopped:
        train.run_train(config)
    assert f"{newest}: state.json does not match its SHA-256" in capfd.readouterr().err
    assert f"stopped on SIGTERM after step {last_step(config)} of {whole['steps']}, which is saved" in str(stopped.value)
    resumed = train.run_train(config)
    assert whole["train_mse"] == resumed["train_mse"]
    left, right = weights(untouched.scorer_uri), weights(config.scorer_uri)
    assert all(np.array_equal(left[name], right[name]) for name in left)


def launch(config: Config, folder: Path, environment: Mapping[str, str] | None = None, script: str = RUN) -> subprocess.Popen[str]:
    """Run `cappy train` in a new process, with its own Ray unless `environment` names one. Standard error goes to `folder/log`."""
    (folder / "run.py").write_text(script)
    (folder / "run.yaml").write_text(config.to_yaml())
    return subprocess.Popen(
        [sys.executable, str(folder / "run.py"), str(folder / "run.yaml")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("a"),
        text=True,
    )


def _run_folder(config: Config) -> str:
    names = {name.split("/")[0] for name in storage.list_files(storage.join(config.scorer_uri, CHECKPOINTS))} - {"_lease"}
    return storage.join(config.scorer_uri, CHECKPOINTS, min(names, default="none"))


def last_step(config: Config) -> int:
    return checkpoint.last_step(_run_folder(config))


def wait_for_step(process: subprocess.Popen[str], config: Config, step: int) -> None:
    wait_for(process, config, lambda: last_step(config) >= step)


def wait_for(process: subprocess.Popen[str], config: Config, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 540
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, Path(config.scorer_uri).with_name("log").read_text()
        time.sleep(0.05)


def _terminate_me_after(config: Config, step: int) -> None:
    deadline = time.monotonic() + 540
    while last_step(config) < step and time.monotonic() < deadline:
        time.sleep(0.05)
    if last_step(config) >= step:
        os.kill(os.getpid(), signal.SIGTERM)


def _worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    """Return the process of the only worker of a driver."""
    (found,) = [each for each in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(each.cmdline())]
    return found


STOPPED_RUN = """
import os
import signal
import sys

from cluster.config import load
from cluster.errors import CappyError
from training import train

publish = train._publish

def stopped(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP)
    return publish(*arguments)

if __name__ == "__main__":
    train._publish = stopped
    try:
        train.run_train(load(sys.argv[1]))
    except CappyError as error:
        sys.exit(str(error))
"""


@pytest.mark.full
def test_a_run_that_lost_its_lease_does_not_touch_the_scorer_of_the_next_run(
    encoder: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
):
    publish(str(tmp_path / "dataset"), 20, 5)
    config = settings(str(tmp_path), encoder, epochs=1)
    process = launch(config, tmp_path, script=STOPPED_RUN)
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # stopped after training and before publishing
        assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, (tmp_path / "log").read_text()

        def wait_one_second(uri: str, setting: str, wait: Callable[[str, str], None] = lease._wait_until_ended) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lease, "TIMEOUT_S", 1.0)
                wait(uri, setting)

        monkeypatch.setattr(lease, "_wait_until_ended", wait_one_second)
        train.run_train(config.model_copy(update={"training": config.training.model_copy(update={"checkpoints_kept": 3})}))
        before = artifacts.read_manifest(config.scorer_uri, "scorer", "train")
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 1
    finally:
        process.kill()
    assert artifacts.verify(config.scorer_uri, before) == []
    assert artifacts.read_manifest(config.scorer_uri, "scorer", "train") == before
    assert set(storage.list_files(config.scorer_uri)) == {*before["files"], artifacts.MANIFEST}
    logged = (tmp_path / "log").read_text().splitlines()[-1]
    assert logged.startswith(f"scorer_path={config.scorer_uri}: lease lost: another run took over")
