"""The exported Serve config file: its content, and the Serve application that it builds."""

import json

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import Config, load
from cluster.errors import UsageError
from serving import app, serve_config
from tests.conftest import cappy


def deployments(application):
    """Return the options and the arguments of each deployment of an application, by name."""
    gateway = application._bound_deployment
    bound = {"Gateway": gateway, **{each._bound_deployment.name: each._bound_deployment for each in gateway.init_args[2:]}}
    return {
        name: (each._deployment_config.model_dump(), each.init_args if name != "Gateway" else each.init_args[0])
        for name, each in bound.items()
    }


SETTINGS = (
    "workspace=s3://bucket/run",
    "serving.llm_replicas={min: 0, max: 4, target: 6, down_after_s: 60}",
    "serving.scorer_replicas={max: 3}",
    "serving.gateway_replicas=2",
    "serving.llm_gpus=1",
)


def test_the_file_has_the_schema_of_serve_and_builds_the_application_of_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    file = tmp_path / "serve.yaml"
    config = load(None, SETTINGS)
    assert serve_config.export_serve_config(config, str(file)) == {"uri": str(file)}
    text = file.read_text()
    assert "very-secret" not in text
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = schema.applications
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8000)
    assert application.import_path == "serving.app:application" and application.runtime_env["env_vars"]["AWS_ENDPOINT_URL"]
    assert [each.name for each in application.deployments] == ["Gateway", "LLM", "Scorer"]
    assert deployments(app.application(application.args)) == deployments(app.build_application(config))


def test_replica_settings_become_options_of_serve():
    built = deployments(app.build_application(load(None, SETTINGS)))
    llm, scorer, gateway = (built[name][0] for name in ("LLM", "Scorer", "Gateway"))
    assert gateway["num_replicas"] == 2 and gateway["autoscaling_config"] is None
    scaling = llm["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (0, 1, 4)
    assert (scaling["target_ongoing_requests"], scaling["downscale_delay_s"], scaling["upscale_delay_s"]) == (6, 60, 10)
    assert (scorer["autoscaling_config"]["min_replicas"], scorer["autoscaling_config"]["max_replicas"]) == (1, 3)
    plain = deployments(app.build_application(Config()))
    assert {plain[name][0]["num_replicas"] for name in plain} == {1}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("serving.llm_replicas=0", "serving.llm_replicas.max=0: Input should be greater than or equal to 1"),
        ("serving.llm_replicas={min: 3, max: 2}", "min=3 is above max=2"),
        ("serving.scorer_replicas={min: 3}", "serving.scorer_replicas.max"),
        ("serving.gateway_replicas={min: 0, max: 2}", "gateway_replicas.min=0: no gateway would accept"),
    ],
)
def test_impossible_numbers_of_replicas_are_refused(setting, message):
    with pytest.raises(UsageError) as caught:
        load(None, [setting])
    assert message in str(caught.value)


def test_an_endpoint_has_one_replica():
    endpoint = "sampler={model: m, engine: {kind: endpoint, base_url: 'http://h/v1'}}"
    with pytest.raises(UsageError, match=r"serving\.llm_replicas=2 would each have separate rate limits"):
        load(None, [endpoint, "serving.llm_replicas=2"])


def test_the_command_writes_the_file_and_a_server_without_keys_is_refused(tmp_path):
    done = cappy("serve", "demo", "--export", str(tmp_path / "a.yaml"), "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == {"uri": str(tmp_path / "a.yaml")}
    assert "every machine of the cluster must have it" in done.stderr
    with pytest.raises(UsageError, match=r"serving\.api_keys is empty"):
        serve_config.export_serve_config(load(None, ["serving.host=0.0.0.0"]), str(tmp_path / "b.yaml"))
    assert not (tmp_path / "b.yaml").exists()
