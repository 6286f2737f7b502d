"""`cappy run`: the steps that run, the outputs that are kept and redone, and the state after an interruption. The verbs are stand-ins."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cappy import pipeline, pipeline_plan
from cappy.cli import app
from cappy.pipeline import run_pipeline
from cappy.pipeline_file import read_pipeline
from cluster import runtime, storage
from cluster.errors import CappyError, Stopped, UsageError
from tests.cappy.made_outputs import Killed, Recorder, snapshot

STEPS = ("generate", "train", "evaluate", "answer", "dpo")
TEXT = """
settings:
  workspace: {workspace}
  source: {{kind: files, path: {rows}}}
steps:
  - evaluate
  - {{verb: export, name: dpo, options: {{as: dpo, margin: 0.2}}}}
  - answer
  - train
  - generate
"""


class Folder:
    """A folder with a pipeline file whose steps are in reverse order."""

    def __init__(self, path: Path) -> None:
        self.path, self.workspace = path, path / "work"
        (path / "rows.jsonl").write_text("")
        self.file = path / "pipeline.yaml"
        self.file.write_text(TEXT.format(workspace=self.workspace, rows=path / "rows.jsonl"))

    def run(self, *settings: str, recorder: Recorder | None = None, **options: Any) -> list[str]:
        """Run the pipeline; return the names of the steps that ran."""
        used = recorder or Recorder()
        run_pipeline(read_pipeline(self.file, settings), run=used, **options)
        return used.ran

    def states(self, *settings: str) -> dict[str, str]:
        result = run_pipeline(read_pipeline(self.file, settings), dry_run=True)
        return {step["name"]: step["state"] for step in result["steps"]}

    def versions(self) -> dict[str, str]:
        return {path.parent.name: storage.read_json(str(path))["writer"] for path in self.workspace.glob("*/_MANIFEST.json")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(pipeline, "estimate", lambda planned: None)
    return Folder(tmp_path)


@pytest.fixture
def made(folder: Folder) -> Folder:
    folder.run()
    return folder


def test_the_steps_run_in_the_order_of_their_data_and_are_kept_afterwards(folder):
    ran = folder.run()
    assert sorted(ran) == sorted(STEPS)
    assert ran.index("generate") < min(map(ran.index, ("dpo", "train")))
    assert ran.index("train") < min(map(ran.index, ("evaluate", "answer")))
    versions = folder.versions()
    assert folder.run() == [] and folder.versions() == versions
    assert set(folder.states().values()) == {"kept"}


def test_relative_paths_and_paths_below_an_output_give_the_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
settings: {workspace: work}
steps:
  - verb: generate
    name: second
    settings: {dataset: work/second, source: {kind: files, path: 'work/answers/data/*/*.parquet'}}
  - evaluate
  - answer
  - {verb: train, settings: {scorer: {encoder: work/other}}}
  - {verb: train, name: other, settings: {scorer_path: work/other}}
  - generate
"""
    Path("pipeline.yaml").write_text(text)
    steps = read_pipeline("pipeline.yaml")
    needs = pipeline_plan.find_needs(steps)
    assert needs["second"] == {"source.path": "answer"} and needs["answer"] == {"scorer": "train"}
    assert needs["train"] == {"dataset": "generate", "scorer.encoder": "other"}
    order = [step.name for step in pipeline_plan.order_steps(steps, needs)]
    assert order == ["generate", "other", "train", "evaluate", "answer", "second"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[train, {verb: train, name: again}]", "the steps train and again write to"),
        ("[{verb: train, settings: {dataset: nothere}}]", "step train: dataset=.*nothere is not published, and no step writes it"),
        ("[{verb: generate, after: [train]}, train]", "the steps generate, train need each other"),
        (
            "[{verb: generate, settings: {generate: {reuse: [work/dataset]}}}]",
            r"step generate reads generate\.reuse\.0=.*, which it",
        ),
    ],
)
def test_steps_that_do_not_fit_together_are_an_error(steps, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text(f"settings: {{workspace: work}}\nsteps: {steps}")
    with pytest.raises(UsageError, match=message):
        run_pipeline(read_pipeline("pipeline.yaml"), run=Recorder())


def test_a_dry_run_writes_nothing(folder):
    before = snapshot(folder.path)
    assert folder.states() == dict.fromkeys(STEPS, "new")
    assert snapshot(folder.path) == before
    folder.run()
    before = snapshot(folder.path)
    assert folder.states("training.epochs=7")["train"] == "changed"
    assert snapshot(folder.path) == before


@pytest.mark.parametrize(
    ("change", "step", "redone"),
    [
        ("generate.mismatched=0", "generate", STEPS),
        ("training.epochs=7", "train", ("train", "evaluate", "answer")),
        ("evaluation.resamples=100", "evaluate", ("evaluate",)),
        ("answer.min_score=0.5", "answer", ("answer",)),
        ("training.workers=2", None, ()),
        ("sampler.replicas=3", None, ()),
    ],
)
def test_a_changed_setting_redoes_its_step_and_those_after_it_only_with_permission(made, change, step, redone):
    before, versions = snapshot(made.workspace), made.versions()
    if redone:
        with pytest.raises(UsageError) as error:
            made.run(change)
        message = str(error.value)
        assert all(name in message for name in (change.split("=")[0], *redone))
        assert f"--redo {step}" in message and "Nothing was changed" in message
        assert snapshot(made.workspace) == before
    assert sorted(made.run(change, redo=[step] if step else [])) == sorted(redone)
    outputs = {"generate": "dataset", "train": "scorer", "evaluate": "evaluation", "answer": "answers", "dpo": "dpo"}
    changed = {name for name, folder in outputs.items() if made.versions()[folder] != versions[folder]}
    assert changed == set(redone)
    assert made.run(change) == []


def test_permission_for_a_step_does_not_cover_changed_settings_of_the_steps_after_it(made):
    with pytest.raises(UsageError, match=r"1 step\(s\) would delete .* evaluate \(evaluation.resamples: 2000 -> 100\).* --redo evaluate"):
        made.run("evaluation.resamples=100", redo=["generate"])
    with pytest.raises(UsageError, match=r"evaluation\.resamples"):
        made.run("evaluation.resamples=100", "training.epochs=7", redo=["train"])


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_ends_at_a_step_is_completed_by_the_same_command(folder, step, moment):
    first = Recorder(**{moment: step})
    with pytest.raises(Killed):
        folder.run(recorder=first)
    second = folder.run()
    finished = first.ran if moment == "after" else first.ran[:-1]
    assert sorted([*finished, *second]) == sorted(STEPS) and not {*finished} & {*second}
    assert folder.run() == []


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["train", "evaluate", "answer"])
def test_a_redo_that_ends_at_a_step_is_completed_by_the_same_command(made, step, moment):
    first = Recorder(**{moment: step})
    with pytest.raises(Killed):
        made.run("training.epochs=7", redo=["train"], recorder=first)
    second = made.run("training.epochs=7", redo=["train"])
    finished = first.ran if moment == "after" else first.ran[:-1]
    assert sorted([*finished, *second]) == ["answer", "evaluate", "train"]
    assert made.run("training.epochs=7") == []


def test_an_output_that_is_published_again_by_hand_redoes_its_readers(made):
    step = next(step for step in read_pipeline(made.file) if step.name == "train")
    Recorder()(step, True)
    assert made.states() == {"generate": "kept", "train": "kept", "evaluate": "redo", "answer": "redo", "dpo": "kept"}
    with pytest.raises(UsageError, match=r"evaluate \(because of train\).*--redo train"):
        made.run()
    assert sorted(made.run(redo=["train"])) == ["answer", "evaluate"]


def test_an_output_that_was_deleted_is_made_again_and_the_outputs_made_from_it_need_permission(made):
    storage.delete(f"{made.workspace}/scorer")
    with pytest.raises(UsageError, match=r"2 step\(s\) would delete .*--redo train"):
        made.run()
    assert sorted(made.run(redo=["train"])) == ["answer", "evaluate", "train"]


def test_work_of_an_unfinished_run_with_other_settings_is_not_deleted_without_permission(folder):
    steps = {step.name: step for step in read_pipeline(folder.file)}
    from generation.generate import result_settings

    staging = f"{folder.workspace}/dataset/_staging"
    storage.write_json(f"{staging}/run.json", {"fingerprint": "", "settings": result_settings(steps["generate"].config)})
    assert folder.states()["generate"] == "new"  # it has no work yet
    storage.write_json(f"{staging}/prepared.json", {})
    assert folder.states()["generate"] == "resumed"
    assert folder.states("seed=5")["generate"] == "changed"
    with pytest.raises(UsageError, match=r"generate \(seed: 20261121 -> 5\)"):
        folder.run("seed=5")


def test_an_output_that_another_run_replaced_meanwhile_is_not_deleted(made):
    class Meanwhile(Recorder):
        def __call__(self, step, overwrite):
            if step.name == "train":
                other = next(each for each in read_pipeline(made.file) if each.name == "evaluate")
                Recorder()(other, True)
            return super().__call__(step, overwrite)

    with pytest.raises(CappyError, match=r"step evaluate .* was published again since the start of this run, and was not deleted"):
        made.run("training.epochs=7", redo=["train"], recorder=Meanwhile())


def test_a_failure_and_a_stop_name_the_step_and_keep_their_exit_code(folder):
    def fail(step, overwrite):
        raise Stopped("stopped on SIGTERM; 3 of 9 are saved") if step.name == "train" else UsageError("no rows")

    steps = read_pipeline(folder.file)
    with pytest.raises(UsageError, match=r"step generate \(1 of 5\): no rows"):
        run_pipeline(steps, run=fail)
    with pytest.raises(Killed):
        folder.run(recorder=Recorder(after="generate"))
    with pytest.raises(Stopped, match=r"step train \(2 of 5\): stopped on SIGTERM; 3 of 9 are saved"):
        run_pipeline(sorted(steps, key=lambda step: step.name == "dpo"), run=fail)


def test_a_sigterm_at_the_end_of_a_step_ends_the_pipeline_and_not_the_next_one_in_this_process(folder):
    class Terminated(Recorder):
        def __call__(self, step, overwrite):
            with runtime.on_sigterm("finishing", lambda: None):
                os.kill(os.getpid(), signal.SIGTERM)
                return super().__call__(step, overwrite)

    first = Terminated()
    with pytest.raises(Stopped, match=r"stopped on SIGTERM after step generate \(1 of 5\)"):
        folder.run(recorder=first)
    assert sorted([*first.ran, *folder.run()]) == sorted(STEPS)


def test_the_command_prints_the_steps_and_its_error_has_the_flag(made):
    kept = CliRunner().invoke(app, ["run", str(made.file), "--json"])
    assert kept.exit_code == 0, kept.output
    result = json.loads(kept.stdout.splitlines()[-1])
    assert [step["state"] for step in result["steps"]] == ["kept"] * 5 and result["minutes"] < 10
    plan = CliRunner().invoke(app, ["run", str(made.file), "--dry-run", "--set", "training.epochs=7"])
    assert re.search(r"training\.epochs: \d+ -> 7", plan.stdout)
    assert "because of train" in plan.stdout and "nothing was changed" in plan.stdout
    refused = CliRunner().invoke(app, ["run", str(made.file), "--set", "training.epochs=7"])
    assert isinstance(refused.exception, UsageError) and f"cappy run {made.file} --redo train" in str(refused.exception)
    with pytest.raises(UsageError, match="--redo=trian: no such step; the steps are generate,"):
        made.run(redo=["trian"])
