"""Files of version b5d7af8 open, resume and serve, and its public names still exist; see `fixtures/b5d7af8/README.md`."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from prometheus_client import generate_latest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from cappy.cli import app
from cappy.jobs import load_verb
from cluster import ports
from cluster.config import Config, load
from generation.dataset import RegressionSet
from generation.prometheus import GenerateMetrics
from serving.gateway import build_api
from serving.prometheus import Metrics as ServingMetrics
from tests.conftest import cappy
from tests.fixtures import names
from tests.generation.engines.openai_server import OpenAIServer
from tests.generation.fixed_llm import FixedLLM
from training.scorer import Scorer

OLD = Path(__file__).parent / "fixtures" / "b5d7af8"
RECORDED: dict[str, Any] = json.loads((OLD / "recorded.json").read_text())
SETTINGS: dict[str, Any] = json.loads((OLD / "settings.json").read_text())
SPLITS = ("train", "validation")
# Scores of one pair differ by rounding between CPUs.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a copy of the fixtures. Encoder and scorer load under their recorded hub names, also in child processes."""
    folder = tmp_path_factory.mktemp("old") / "b5d7af8"
    shutil.copytree(OLD, folder)
    hub = folder / "hub"
    names.write_hub(hub, "cappy-fixtures/encoder", folder / "encoder")
    names.write_hub(hub, "cappy-fixtures/scorer", folder / "scorer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
        for name, value in {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        yield folder


def command(*arguments: str) -> dict[str, Any]:
    """Run a command that needs no Ray in this process; return its `--json` output."""
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def process(*arguments: str) -> dict[str, Any]:
    """Run a command in a separate process with a separate Ray; return its `--json` output."""
    done = cappy(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of a set, read with pyarrow alone."""
    return [row for shard in sorted((folder / "data" / split).glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def lost(recorded: list[str], found: set[str]) -> list[str]:
    """Return the recorded names that no longer exist."""
    assert recorded
    return sorted(set(recorded) - found)


def assert_keeps(kind: str, folder: Path, result: dict[str, Any] | None = None, output: str | None = None) -> None:
    """Check that a manifest and the result of its verb have all recorded keys."""
    manifest = {**read(folder, "_MANIFEST.json"), "files": {}, "config": {}}
    assert not lost(RECORDED["manifests"][kind], names.keys(manifest))
    if output:
        assert not lost(RECORDED["outputs"][output], names.keys(result))


def assert_columns(kind: str, file: Path) -> None:
    """Check that a Parquet file has all recorded columns, with the recorded types."""
    schema = {field.name: str(field.type) for field in pq.read_schema(file)}
    assert RECORDED["schemas"][kind].items() <= schema.items()


# The set.


def test_a_set_opens_with_the_rows_it_has(old: Path):
    opened = RegressionSet(str(old / "dataset"))
    for split in SPLITS:
        expected = rows(old / "dataset", split)
        assert len(expected) == opened.rows(split) > 0
        assert [row for table in opened.batches(split) for row in table.to_pylist()] == expected
        assert list(opened.to_pandas(split)["id"]) == [row["id"] for row in expected]
        assert sum(len(pairs) for pairs in opened.pairs(split)) > len(expected)


@pytest.mark.parametrize("kind", ["dataset", "scorer", "evaluation", "adapted/a"])
def test_inspect_verifies_every_published_folder(old: Path, kind: str):
    found = command("inspect", str(old / kind))
    assert found["verified"] and found["problems"] == []
    assert found["summary"] == read(old / kind, "_MANIFEST.json")["summary"]
    assert not lost(RECORDED["outputs"][f"inspect {kind}"], names.keys(found))


def test_an_interrupted_generate_resumes_and_ends_with_the_labels_of_an_unbroken_run(old: Path, tmp_path: Path, ray_here: None):
    done = {row for unit in (old / "begun/_staging/units").iterdir() for row in pq.read_table(unit)["id"].to_pylist()}
    log = tmp_path / "sampled.log"
    config = load(str(old / "config.yaml"), [f"dataset={old}/begun"])
    summary = load_verb("generate")(config, load=functools.partial(FixedLLM, log=str(log)))
    sampled = {line.split()[0] for line in log.read_text().splitlines()}
    assert done and sampled and not sampled & done
    for split in SPLITS:
        assert rows(old / "begun", split) == rows(old / "dataset", split)
    assert_keeps("dataset", old / "begun", summary, "generate")
    assert_columns("dataset", next((old / "begun/data/train").iterdir()))
    assert (old / "begun/dead_letters.jsonl").read_text() == (old / "dataset/dead_letters.jsonl").read_text()


def test_annotate_reads_a_set_and_gives_the_labels_it_gave(old: Path, tmp_path: Path, ray_here: None):
    summary = load_verb("annotate")(load(None, ["generate.label.metric=chrf"]), src=str(old / "dataset"), dst=str(tmp_path / "chrf"))
    for split in SPLITS:
        labels = [[each["label"] for each in row["candidates"]] for row in rows(tmp_path / "chrf", split)]
        assert labels == RECORDED["chrf"][split]
    assert_keeps("chrf", tmp_path / "chrf", summary, "annotate")


def test_copies_and_exported_pairs_keep_their_keys_and_columns(old: Path, tmp_path: Path):
    pushed = command("push", str(old / "scorer"), str(tmp_path / "pushed"))
    pulled = command("pull", str(old / "scorer"), str(tmp_path / "pulled"))
    pairs = command("push", str(old / "dataset"), str(tmp_path / "pairs"), "--pairs")
    for name, output in {"push": pushed, "pull": pulled, "push --pairs": pairs}.items():
        assert not lost(RECORDED["outputs"][name], names.keys(output))
    assert not lost(RECORDED["outputs"]["inspect pairs"], names.keys(command("inspect", str(tmp_path / "pairs"))))
    assert_keeps("pairs", tmp_path / "pairs")
    assert_columns("pairs", next((tmp_path / "pairs/data/train").rglob("*.parquet")))


# Scorers, adapters, checkpoints.


@pytest.mark.parametrize("name", ["scorer", "adapted/a", "adapted/b"])
def test_a_scorer_and_adapters_to_it_give_the_scores_they_gave(old: Path, name: str):
    instructions, responses = map(list, zip(*RECORDED["pairs"], strict=True))
    scores = Scorer.load(str(old / name)).score(instructions, responses)
    assert np.ptp(scores) > 100 * TOLERANCE
    np.testing.assert_allclose(scores, RECORDED["scores"][name], atol=TOLERANCE, rtol=0)


@pytest.mark.full
@pytest.mark.slow
def test_an_interrupted_train_resumes_and_ends_with_the_weights_of_an_unbroken_run(old: Path):
    (file,) = (old / "stopped/_checkpoints").glob("*/*/metrics.jsonl")
    before = file.read_text().splitlines()
    summary = process("train", str(old / "config.yaml"), "--set", f"workspace={old}", "--set", f"scorer_path={old}/stopped")
    # The lines hold measured speeds, so a run that starts again writes different ones.
    assert before and (old / "stopped/metrics.jsonl").read_text().splitlines()[: len(before)] == before
    expected = load_file(old / "scorer/model.safetensors")
    found = load_file(old / "stopped/model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
    assert not (old / "stopped/_checkpoints").exists()
    assert_keeps("scorer", old / "stopped", summary, "train")


@pytest.mark.slow
def test_finished_tasks_are_not_adapted_again_and_new_ones_keep_their_keys(old: Path, tmp_path: Path):
    settings = ("adapt", str(old / "config.yaml"), "--set", f"workspace={old}")
    before = [(old / "adapted" / task / "_MANIFEST.json").read_bytes() for task in "ab"]
    again = process(*settings)
    assert [(old / "adapted" / task / "_MANIFEST.json").read_bytes() for task in "ab"] == before
    assert [(task["task"], task["state"]) for task in again["tasks"]] == [("a", "published"), ("b", "published")]
    assert not lost(RECORDED["outputs"]["adapt"], names.keys(again))
    process(*settings, "--set", f"adapted_path={tmp_path}", "--set", "adapt.tasks=[a]")
    assert_keeps("adapted/a", tmp_path / "a")
    for name, value in load_file(old / "adapted/a/adapter_model.safetensors").items():
        np.testing.assert_allclose(load_file(tmp_path / "a/adapter_model.safetensors")[name], value, atol=1e-4, err_msg=name)


# Evaluations.


def test_an_evaluation_of_the_old_scorer_on_the_old_set_has_the_old_figures(old: Path, tmp_path: Path):
    summary = command("evaluate", str(old / "config.yaml"), "--set", f"workspace={old}", "--set", f"evaluation_path={tmp_path}/new")
    before, after = (read(folder, "results.json") for folder in (old / "evaluation", tmp_path / "new"))
    assert [method for method in after["methods"] if method in before["methods"]] == before["methods"]
    expected, found = (names.leaves({**each, "made": {}, "methods": []}) for each in (before, after))
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, abs=TOLERANCE) if isinstance(value, float) else value), key
    assert not lost(sorted(names.keys(read(old / "evaluation", "results.json"))), names.keys(read(tmp_path / "new", "results.json")))
    assert_keeps("evaluation", tmp_path / "new", summary, "evaluate")
    assert_columns("evaluation", tmp_path / "new/rows.parquet")


def test_evaluate_finds_the_adapters_of_each_task(old: Path, tmp_path: Path):
    paths = [f"workspace={old}", f"evaluation_path={tmp_path}/new", "evaluation.adapted=true"]
    command("evaluate", str(old / "config.yaml"), *(word for path in paths for word in ("--set", path)))
    assert read(tmp_path / "new", "results.json")["made"]["adapted"] == [f"{old}/adapted/a", f"{old}/adapted/b"]


# Serving.


def exported(old: Path, **changes: Any) -> dict[str, Any]:
    """Return the exported Serve config with the paths of this machine; `changes` are settings of the engine."""
    tree: dict[str, Any] = yaml.safe_load((old / "serve.yaml").read_text())
    args = tree["applications"][0]["args"]
    args["workspace"] = str(old)
    args["sampler"]["engine"] |= changes
    return tree


def test_an_exported_serve_config_builds_the_graph_with_the_scorer_of_each_task(old: Path):
    (application,) = exported(old)["applications"]
    module, name = application["import_path"].split(":")
    built = getattr(importlib.import_module(module), name)(application["args"])
    gateway = built._bound_deployment
    bound = {each._bound_deployment.name: each._bound_deployment for each in gateway.init_args if hasattr(each, "_bound_deployment")}
    assert {gateway.name, *bound} == {"Gateway", "LLM", "Scorer"} == {each["name"] for each in application["deployments"]}
    assert {"a": f"{old}/adapted/a", "b": f"{old}/adapted/b"} in bound["Scorer"].init_args


@pytest.mark.full
@pytest.mark.slow
def test_serve_runs_an_exported_config_and_answers_with_the_scorer_of_each_task(old: Path, tmp_path: Path, no_ray: None):
    llm = OpenAIServer()
    port = ports.free_port()
    tree = exported(old, base_url=llm.url)
    tree["http_options"]["port"] = port
    # The first answer waits until the scorer is loaded, which takes more than 30 s on a busy machine.
    tree["applications"][0]["args"]["serving"]["scorer_timeout_s"] = 300.0
    tree["applications"][0]["args"]["serving"]["timeout_s"] = 400.0
    tree["http_options"]["request_timeout_s"] = 410.0
    file, log = tmp_path / "serve.yaml", tmp_path / "serve.log"
    file.write_text(yaml.safe_dump(tree))
    with log.open("w") as output:
        root = str(Path(__file__).parent.parent)
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", "--app-dir", root, str(file)], stdout=output, stderr=output
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=420) as http:
            while not _answers(http):
                assert server.poll() is None, log.read_text()[-3000:]
            assert {each["id"] for each in http.get("/v1/models").json()["data"]} >= {"cappy", "cappy+a", "cappy+b", "cappy-llm", "a", "b"}
            question = {"messages": [{"role": "user", "content": "say number 3"}], "cappy": {"candidates": 4, "return_candidates": True}}
            for model in ("cappy", "cappy+a"):
                answer = http.post("/v1/chat/completions", json={"model": model, **question})
                assert answer.status_code == 200, answer.text
                candidates = answer.json()["cappy"]["candidates"]
                best = max(candidates, key=lambda each: each["score"])
                assert len(candidates) == 4 and answer.json()["choices"][0]["message"]["content"] == best["response"]
    finally:
        server.terminate()
        server.wait()
        llm.close()


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/v1/models").status_code == 200
    except httpx.TransportError:
        return False


# Names.


@pytest.mark.parametrize("variant", SETTINGS)
def test_every_setting_has_its_name_its_default_and_its_values(variant: str):
    overrides, tree, keys = (SETTINGS[variant][name] for name in ("set", "tree", "keys"))
    found = names.leaves(load(None, overrides).model_dump(mode="json"))
    expected = names.leaves(tree)
    assert expected and {key: found.get(key, "no such setting") for key in expected} == expected
    for key in keys:
        again = load(None, [*overrides, f"{key}={json.dumps(expected[key])}"])
        assert names.leaves(again.model_dump(mode="json")) == found, key
    for choice in SETTINGS[variant]["choices"]:
        load(None, [*overrides, choice])


@pytest.mark.parametrize("variant", SETTINGS)
def test_a_file_with_every_setting_loads(variant: str, tmp_path: Path):
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(SETTINGS[variant]["tree"]))
    found = names.leaves(load(str(tmp_path / "all.yaml")).model_dump(mode="json"))
    assert names.leaves(SETTINGS[variant]["tree"]).items() <= found.items()


@pytest.mark.parametrize("file", sorted((OLD / "configs").iterdir()), ids=lambda file: file.stem)
def test_a_shipped_config_file_loads(file: Path):
    found = names.leaves(load(str(file)).model_dump(mode="json"))
    assert names.leaves(yaml.safe_load(file.read_text())).items() <= found.items()


@pytest.mark.parametrize("name", RECORDED["commands"])
def test_every_command_has_its_flags(name: str):
    assert not lost(RECORDED["commands"][name], set(names.commands(typer.main.get_command(app))[name]))


def test_every_metric_has_its_name():
    found = {*names.metric_names(ServingMetrics().text()), *names.metric_names(generate_latest(GenerateMetrics().registry))}
    assert not lost(RECORDED["metrics"], found)


def test_every_route_has_its_fields():
    api = build_api(Config(), None)  # type: ignore[arg-type]  # no request is made
    assert not lost(RECORDED["http"], set(names.http_fields(api.openapi())))


def test_commands_beside_the_verbs_keep_the_keys_of_their_json(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(old)  # the config has the relative path `rows.jsonl`
    found = {
        "plan": command("plan", "config.yaml"),
        "serve --new-key": command("serve", "--new-key", "a"),
        "serve --export": command("serve", "serve_from.yaml", "--export", str(tmp_path / "serve.yaml")),
        "doctor": json.loads(cappy("doctor", "--no-models", "--json").stdout.splitlines()[-1]),
    }
    for name, output in found.items():
        assert not lost(RECORDED["outputs"][name], names.keys(output)), name


def test_an_error_keeps_the_keys_of_its_json(tmp_path: Path):
    done = cappy("inspect", str(tmp_path / "nowhere"), "--json")
    assert done.returncode == 1
    assert not lost(RECORDED["outputs"]["an error"], names.keys(json.loads(done.stdout.splitlines()[-1])))
