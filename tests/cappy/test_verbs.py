"""The verbs as functions: they run the verbs of the command line, with settings as a mapping."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import cappy
from cappy.cli import app
from cluster.errors import CappyError, UsageError
from tests.generation.made_set import publish


def test_plan_counts_the_rows_and_takes_settings(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say a", "references": ["a"]}\n')
    settings = {"source": {"kind": "files", "path": f"{tmp_path}/rows.jsonl"}, "plan.gpus": [3]}
    result = cappy.plan(settings=settings)
    assert result["totals"]["instructions"] == 1 and list(result["compute"]["wall_hours"]) == ["3"]


def test_a_set_is_pushed_exported_pulled_and_inspected(tmp_path, monkeypatch):
    manifest = publish(f"{tmp_path}/set")
    assert cappy.push(f"{tmp_path}/set", f"{tmp_path}/copy")["files"] == len(manifest["files"])
    assert cappy.push(f"{tmp_path}/set", f"{tmp_path}/pairs", pairs=True)["kind"] == "pairs"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cappy.pull(f"{tmp_path}/copy")["uri"] == f"{tmp_path}/here/copy"
    found = cappy.inspect(f"{tmp_path}/here/copy", samples=1)
    assert found["problems"] == [] and len(found["samples"]) == 1
    (tmp_path / "here/copy/config.yaml").write_text("changed")
    assert cappy.inspect("copy")["problems"][0].startswith("config.yaml")


def test_export_passes_its_options_and_the_command_prints_the_counts(tmp_path):
    publish(f"{tmp_path}/set")
    options = {"by": "label", "per_instruction": 2, "margin": 0.96, "sources": ["sampled", "reference"], "messages": True, "system": "s"}
    result = cappy.export(f"{tmp_path}/set", f"{tmp_path}/dpo", "dpo", **options)
    assert result["rows"] == 13 and result["left_out"]["other_sources"] == 13  # of two pairs, one has a smaller margin
    assert cappy.inspect(f"{tmp_path}/dpo")["summary"]["rows"] == 13
    arguments = [
        "export",
        f"{tmp_path}/set",
        f"{tmp_path}/dpo",
        "--as",
        "dpo",
        "--by",
        "label",
        "--per-instruction",
        "2",
        "--margin",
        "0.96",
    ]
    arguments += ["--source", "sampled", "--source", "reference", "--messages", "--system", "s"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert "(already there): 13 rows (train 10, validation 3)" in " ".join(again.output.split())
    assert "left out: 13 candidates of sources that the export does not use" in again.output
    assert cappy.export(f"{tmp_path}/set", f"{tmp_path}/kto", "kto", threshold=0.55)["rows"] == 13 * 5
    assert cappy.push(f"{tmp_path}/dpo", f"{tmp_path}/copy")["kind"] == "export"


def test_annotate_names_its_source_and_checks_the_settings(tmp_path):
    with pytest.raises(CappyError, match=f"{tmp_path}/set is not there"):
        cappy.annotate(f"{tmp_path}/set", f"{tmp_path}/new", settings={"generate.label.metric": "chrf"})
    with pytest.raises(UsageError, match=r"generate\.label\.metric='bleu'"):
        cappy.annotate(f"{tmp_path}/set", f"{tmp_path}/new", settings={"generate.label.metric": "bleu"})


def test_extend_names_its_source_and_checks_the_settings(tmp_path):
    with pytest.raises(CappyError, match=f"{tmp_path}/set is not there"):
        cappy.extend(f"{tmp_path}/set", f"{tmp_path}/new", settings={"sampler.model": "other/llm"})
    publish(f"{tmp_path}/set")
    with pytest.raises(UsageError, match=r"unknown key sampler\.modle; did you mean 'model'"):
        cappy.extend(f"{tmp_path}/set", f"{tmp_path}/new", settings={"sampler.modle": "other/llm"})
    done = CliRunner().invoke(app, ["extend", f"{tmp_path}/set", f"{tmp_path}/set/new", "--set", "sampler.model=other/llm"])
    assert isinstance(done.exception, UsageError) and "choose a separate folder for DST" in str(done.exception)
    with pytest.raises(UsageError, match="--address=here: give the cluster's dashboard"):
        cappy.extend(f"{tmp_path}/set", f"{tmp_path}/new", address="here")


@pytest.mark.parametrize(("verb", "missing"), [("train", "dataset"), ("evaluate", "dataset"), ("serve", "none")])
def test_a_verb_without_its_input_is_an_error_that_names_it(verb, missing, tmp_path):
    with pytest.raises(CappyError, match=f"{tmp_path}/{missing}"):
        getattr(cappy, verb)(settings={"workspace": str(tmp_path), "scorer_path": f"{tmp_path}/none"})


@pytest.mark.parametrize("verb", ["generate", "train", "adapt", "evaluate", "serve"])
def test_an_address_without_a_scheme_is_refused(verb):
    with pytest.raises(UsageError, match="--address=here: give the cluster's dashboard"):
        getattr(cappy, verb)(address="here")


def test_pull_to_another_store_is_refused():
    with pytest.raises(UsageError, match="DST=s3://b/x is not on this machine"):
        cappy.pull("s3://a/x", "s3://b/x")
