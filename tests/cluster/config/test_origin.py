import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from cappy.cli import app
from cluster import config
from cluster.config import origin as config_origin

FILE = """\
workspace: runs/x
training: {epochs: 3,
           batch_size: 64}
sampler:
  decodings:
    - {name: greedy, n: 1, temperature: 0}
    - name: warm
      n: 4
serving:
  llm_replicas: 2
"""


def origins(tmp_path, *overrides, text=FILE):
    """The origin of each value of a config file, with the file's folder cut off."""
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return {key: origin.replace(f"{tmp_path}/", "") for key, origin in config_origin.show(path, overrides)[1].items()}


def test_each_value_has_the_line_that_gives_it_or_default(tmp_path):
    found = origins(tmp_path)
    assert found["workspace"] == "my.yaml:1"
    assert (found["training.epochs"], found["training.batch_size"]) == ("my.yaml:2", "my.yaml:3")
    assert (found["sampler.decodings.0.n"], found["sampler.decodings.1.n"]) == ("my.yaml:6", "my.yaml:8")
    assert found["sampler.decodings.1.top_p"] == found["training.window"] == "default"


def test_a_plain_value_for_a_section_is_the_origin_of_all_of_it(tmp_path):
    assert origins(tmp_path)["serving.llm_replicas.max"] == "my.yaml:10"
    assert origins(tmp_path, "serving.scorer_replicas=3")["serving.scorer_replicas.min"] == "--set"


def test_set_replaces_the_origin_of_all_below_it(tmp_path):
    found = origins(tmp_path, "training={epochs: 5}", "sampler.decodings.1.n=2", "evaluation.resamples=100")
    assert (found["training.epochs"], found["training.batch_size"]) == ("--set", "default")
    assert (found["sampler.decodings.1.n"], found["sampler.decodings.1.name"]) == ("--set", "my.yaml:7")
    assert found["evaluation.resamples"] == "--set"


def test_anchors_and_merged_keys_have_the_line_they_are_written_in(tmp_path):
    text = (
        "sampler:\n  decodings:\n    - &base\n      name: a\n      n: 4\n    - <<: *base\n      name: b\n"
        "training: {workers: &count 1}\nadapt:\n  concurrency: *count\n"
    )
    found = origins(tmp_path, text=text)
    assert (found["sampler.decodings.1.n"], found["sampler.decodings.1.name"]) == ("my.yaml:5", "my.yaml:7")
    assert found["adapt.concurrency"] == "my.yaml:10"


def test_without_a_file_all_is_default():
    assert set(config_origin.show(None)[1].values()) == {"default"}


@pytest.mark.parametrize("name", [None, "demo", "cappy-minilm", "t0"])
def test_the_yaml_loads_to_the_same_config_and_every_value_has_an_origin(name, tmp_path):
    tree, origin = config_origin.show(name, ["training.epochs=2"])
    text = config_origin.to_yaml(tree, origin)
    (tmp_path / "shown.yaml").write_text(text)
    assert config.load(tmp_path / "shown.yaml") == config.load(name, ["training.epochs=2"])
    assert sorted(re.findall(r"  # (\S+)$", text, re.M)) == sorted(origin.values())


@pytest.mark.parametrize("value", ["two\nlines", "a: b # c", "- x", "'\"", "", "null", "1e5", "%", "ünï ☃ 🎉", " padded ", "\t", "x" * 500])
def test_any_text_survives_as_yaml(value, tmp_path):
    (tmp_path / "in.yaml").write_text(json.dumps({"sampler": {"prompt": {"system": value}}}, ensure_ascii=False))
    tree, origin = config_origin.show(tmp_path / "in.yaml")
    assert yaml.safe_load(config_origin.to_yaml(tree, origin))["sampler"]["prompt"]["system"] == value


def test_secrets_are_redacted_in_text_and_json(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        f"serving: {{api_keys: [{{name: team, sha256: {'ab' * 32}}}]}}\n"
        "training: {mlflow: 'https://me:hunter2@mlflow.example.org/?token=hunter3&run=1'}\n"
    )
    shown = CliRunner().invoke(app, ["config", "show", str(path)])
    as_json = CliRunner().invoke(app, ["config", "show", str(path), "--json"])
    assert shown.exit_code == as_json.exit_code == 0
    for text in (shown.stdout, as_json.stdout):
        assert "hunter" not in text and "abab" not in text and "mlflow.example.org" in text and "team" in text
    assert json.loads(as_json.stdout)["config"]["training"]["mlflow"] == (
        "https://<redacted>@mlflow.example.org/?token=<redacted>&run=<redacted>"
    )


def test_json_has_the_tree_and_the_origin_of_each_value():
    result = json.loads(CliRunner().invoke(app, ["config", "show", "demo", "--set", "training.epochs=2", "--json"]).stdout)
    assert result["config"]["training"]["epochs"] == 2
    assert result["origins"]["training.epochs"] == "--set"
    assert set(result["origins"]) == {".".join(keys) for keys, _ in config_origin.leaves(result["config"])}
