"""Pipeline files: the configs of the steps, their places, and the errors of invalid files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from cappy.cli import app
from cappy.pipeline_file import PIPELINES, read_pipeline, schema
from cappy.pipeline_verbs import Step
from cluster.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def write(tmp_path, text):
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    return str(file)


def test_a_step_has_the_common_config_then_the_common_settings_then_its_own_then_the_changes_of_the_command(tmp_path):
    (tmp_path / "other.yaml").write_text("seed: 7\ntraining: {epochs: 9, batch_size: 64}\n")
    text = f"""
config: demo
settings: {{workspace: runs/p, training: {{batch_size: 16}}}}
steps:
  - generate
  - verb: train
    settings: {{training: {{epochs: 5}}}}
  - verb: train
    name: longer
    config: {tmp_path}/other.yaml
    settings: {{scorer_path: runs/longer}}
  - verb: evaluate
    settings: {{source: {{kind: files, path: rows.jsonl}}}}
"""
    steps = {step.name: step for step in read_pipeline(write(tmp_path, text), ["seed=5"])}
    assert list(steps) == ["generate", "train", "longer", "evaluate"]
    assert {step.config.workspace for step in steps.values()} == {"runs/p"} and {step.config.seed for step in steps.values()} == {5}
    training = {name: (step.config.training.epochs, step.config.training.batch_size) for name, step in steps.items()}
    assert training == {"generate": (4, 16), "train": (5, 16), "longer": (9, 16), "evaluate": (4, 16)}
    assert steps["longer"].config.scorer_uri == "runs/longer" and steps["evaluate"].config.source.path == "rows.jsonl"
    assert steps["generate"].config.source.kind == "bigbench"


def test_annotate_and_export_read_a_step_a_path_or_the_set_and_write_below_the_workspace(tmp_path):
    text = """
settings: {workspace: /w}
steps:
  - verb: export
    options: {as: dpo, margin: 0.2}
  - {verb: export, name: best, src: answer, dst: /elsewhere, options: {as: sft}}
  - {verb: annotate, src: /sets/a}
  - answer
"""
    steps = {step.name: step for step in read_pipeline(write(tmp_path, text))}
    places = {name: (step.src, step.dst) for name, step in steps.items() if step.dst}
    assert places == {"export": ("/w/dataset", "/w/export"), "best": ("/w/answers", "/elsewhere"), "annotate": ("/sets/a", "/w/annotate")}
    sent = Step.from_json(json.loads(json.dumps(steps["export"].to_json())))
    assert (sent.src, sent.dst, sent.options, sent.uri) == ("/w/dataset", "/w/export", {"as": "dpo", "margin": 0.2}, "/w/export")
    assert sent.config.workspace == "/w"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []", "steps: "),
        ("config: demo", "steps: it is missing"),
        ("steps: [trian]", "steps.0.verb='trian': no such verb; did you mean 'train'?"),
        ("steps: [serve]", "no such verb; use one of generate, annotate"),
        ("steps: [train, train]", "two steps are named train; give one of them another `name`"),
        ("steps: [{verb: train, training: {epochs: 1}}]", "unknown key steps.0.training; settings of a config belong below `settings`"),
        ("steps: [train]\nsetings: {}", "unknown key setings; did you mean 'settings'?"),
        ("steps: [{verb: train, settings: {training: {epoch: 1}}}]", "pipeline.yaml, step train: unknown key training.epoch; did you mean"),
        ("settings: {seed: x}\nsteps: [train]", "pipeline.yaml, step train: seed='x'"),
        ("config: nothere\nsteps: [train]", "config file nothere does not exist"),
        ("steps: [{verb: train, src: a}]", "src=a is for annotate, score, export; train takes its paths from its config"),
        ("steps: [{verb: train, options: {as: sft}}]", "`options` is for export; put the settings of train in `settings`"),
        (
            "steps: [{verb: export, options: {as: sft, margn: 1}}]",
            "step export: options.margn: no such option; the options are as,",
        ),
        ("steps: [export]", "step export: options.as: it is missing"),
        ("steps: [{verb: export, options: {as: sft, margin: 1}}]", "--margin=1 is for dpo"),
        ("steps: [{verb: train, after: [evaluate]}]", "step train: after=evaluate: no such other step; the steps are train"),
        ("steps: [evaluate]\nconfig: SUITE", "step evaluate: a suite"),
        ("- train", "pipeline.yaml holds a list"),
    ],
)
def test_an_invalid_file_is_one_line_that_names_the_key_and_the_fix(text, message, tmp_path):
    text = text.replace("SUITE", str(ROOT / "evaluation/suites/bigbench.yaml"))
    with pytest.raises(UsageError) as error:
        read_pipeline(write(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_lists_the_shipped_pipelines():
    with pytest.raises(UsageError, match="pipeline file nothere does not exist; give a path or one of: demo"):
        read_pipeline("nothere")


@pytest.mark.parametrize("file", [*sorted(PIPELINES.glob("*.yaml")), ROOT / "examples/pipeline.yaml"], ids=lambda file: file.stem)
def test_a_shipped_pipeline_loads_and_satisfies_the_schema(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert read_pipeline(file)
    printed = json.loads(CliRunner().invoke(app, ["config", "schema", "--pipeline"]).stdout)
    assert printed == schema()
    jsonschema.Draft202012Validator.check_schema(printed)
    assert list(jsonschema.Draft202012Validator(printed).iter_errors(yaml.safe_load(file.read_text()))) == []


def test_the_pipelines_of_the_guide_load(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/guides/pipeline.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        assert read_pipeline(write(tmp_path, block.replace("my.yaml", "demo")))


@pytest.mark.parametrize("text", ["steps: [serve]", "steps: [{verb: train, settings: {training: {epoch: 1}}}]", "steps: [train]\nseed: 1"])
def test_the_schema_rejects_invalid_files(text):
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(yaml.safe_load(text)))
