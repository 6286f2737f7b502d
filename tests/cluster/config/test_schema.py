import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from cappy.cli import app
from cluster.config import CONFIG_FOLDER, Config, schema

SHIPPED = sorted(CONFIG_FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(schema.schema())
    return jsonschema.Draft202012Validator(schema.schema())


def test_the_committed_schema_is_that_of_the_code():
    committed = (CONFIG_FOLDER / "schema.json").read_text()
    assert committed == schema.text(), "run `cappy config schema > cappy/configs/schema.json`"
    assert CliRunner().invoke(app, ["config", "schema"]).stdout == committed


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_names_the_schema_beside_it_and_satisfies_it(path, validator):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).samefile(CONFIG_FOLDER / "schema.json")
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "serving: {llm_replicas: 2, scorer_replicas: {min: 0, max: 2}}",
        "sampler: {engine: {max_model_len: 512}}",
        "sampler: {engine: {kind: endpoint, base_url: 'http://x/v1'}}",
        "sampler: {engine: {kind: transformers}}",
        "source: {kind: files, path: x.jsonl}",
        "source: {kind: mixture, parts: [{source: {kind: files, path: x}}]}",
        "training: {patience: null}",
        "training: {epoch: 1}",
        "training: {epochs: 0}",
        "training: {parallel: tp}",
        "sampler: {engine: {base_url: 'http://x/v1'}}",
        "sampler: {engine: {kind: endpoint, max_num_seqs: 1}}",
        "source: {path: x.jsonl}",
        "source: {kind: mixture, parts: []}",
        "serving: {llm_replicas: 0}",
        "serving: {api_keys: [{name: team}]}",
        "nothing: 1",
    ],
)
def test_the_schema_accepts_the_same_files_as_the_config(text, validator):
    tree = yaml.safe_load(text)
    try:
        Config.model_validate(tree)
        accepted = True
    except ValidationError:
        accepted = False
    assert validator.is_valid(tree) == accepted


def test_docs_ranges_and_defaults_reach_the_editor():
    settings = schema.schema()["$defs"]["TrainingConfig"]["properties"]
    assert settings["batch_size"]["description"] == "Pairs per optimizer step, summed over all workers."
    assert (settings["batch_size"]["minimum"], settings["batch_size"]["default"]) == (1, 32)


def test_the_schema_is_one_that_editors_find_from_a_relative_path():
    assert json.loads((Path(CONFIG_FOLDER) / "schema.json").read_text())["$schema"].startswith("https://json-schema.org/")
