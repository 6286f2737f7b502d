from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster import storage
from cluster.config import Config, load
from cluster.errors import CappyError, UsageError
from evaluation.run import score_by_task
from evaluation.table import print_adapted
from tests.training.test_adapt import publish_tasks, published_scorer, settings, task_rows
from training import adapt_tasks
from training.adapt import Task
from training.adapted import published
from training.scorer import Scorer

NAMES = ["colors/old", "lonely", "sides"]


def test_folders_of_tasks_are_plain_and_differ():
    names = ["tense", "a/b", "a b", "../x", "results.json", "_lease", "", "é"]
    folders = [adapt_tasks.folder_name(name) for name in names]
    assert folders[0] == "tense" and len(set(folders)) == len(names)
    assert all("/" not in folder and not folder.startswith((".", "_")) and folder != "results.json" for folder in folders)


def test_only_what_adapt_wrote_is_cleared(tmp_path: Path):
    (tmp_path / "tense").mkdir()
    (tmp_path / "tense/thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds files that no `cappy adapt` wrote, e.g. thesis.txt"):
        adapt_tasks._clear(Task("tense", "tense", str(tmp_path / "tense"), {}))
    storage.publish(str(tmp_path / "tense"), {"kind": "scorer", "files": {}})
    with pytest.raises(CappyError, match="holds a scorer that `cappy adapt` did not write"):
        adapt_tasks._clear(Task("tense", "tense", str(tmp_path / "tense"), {}))
    assert (tmp_path / "tense/thesis.txt").exists()


def test_lora_without_a_base_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"method=lora needs a base whose weights the tasks share; give adapt\.base"):
        load(None, ["adapt.method=lora"])


def test_an_objective_that_compares_candidates_is_refused():
    with pytest.raises(UsageError, match=r"training\.objective compares an instruction's candidates"):
        adapt_tasks.run(load(None, ["training.objective.pairwise=1"]))


@pytest.fixture(scope="module")
def adapted(encoder: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> tuple[Config, dict[str, Any]]:
    """Three tasks adapted in one run, one of which has no validation rows."""
    workspace = tmp_path_factory.mktemp("run")
    train = [*task_rows("colors/old", 40, 1), *task_rows("lonely", 5, 2), *task_rows("sides", 30, 3, choices=True)]
    validation = [*task_rows("colors/old", 30, 4), *task_rows("sides", 40, 5, choices=True)]
    config = settings(workspace, encoder, base=published_scorer(encoder, str(workspace / "scorer")))
    publish_tasks(config.dataset_uri, train, validation)
    return config, adapt_tasks.run(config)


@pytest.mark.slow
def test_a_task_that_fails_leaves_the_others_alone(adapted: tuple[Config, dict[str, Any]]):
    config, result = adapted
    assert [(task["task"], task["state"]) for task in result["tasks"]] == list(
        zip(NAMES, ["published", "failed", "published"], strict=True)
    )
    assert "no validation rows of lonely" in result["tasks"][1]["error"]
    assert (result["published"], result["rejected"], result["failed"]) == (2, 0, 1)
    measured = [task["figures"] for task in result["tasks"] if "figures" in task]
    assert result["averages"]["after"] == result["averages"]["after the gate"] == np.mean([each["after"] for each in measured])
    assert storage.read_json(f"{config.adapted_uri}/results.json") == json.loads(json.dumps(result))
    for task in (result["tasks"][0], result["tasks"][2]):
        Scorer.load(task["uri"])


@pytest.mark.slow
def test_the_same_command_does_not_do_a_finished_task_again(adapted: tuple[Config, dict[str, Any]], capfd: pytest.CaptureFixture[str]):
    config, result = adapted
    manifest = storage.read_manifest(result["tasks"][0]["uri"], "scorer", "adapt")
    again = adapt_tasks.run(config)
    assert "2 of 3 tasks are done already" in capfd.readouterr().err
    assert {**again, "seconds": 0} == {**json.loads(json.dumps(result)), "seconds": 0}
    assert storage.read_manifest(result["tasks"][0]["uri"], "scorer", "adapt") == manifest
    only = config.adapt.model_copy(update={"tasks": ("sides",), "concurrency": 1})
    assert [task["task"] for task in adapt_tasks.run(config.model_copy(update={"adapt": only}))["tasks"]] == ["sides"]
    assert len(adapt_tasks.run(config)["tasks"]) == 3


@pytest.mark.slow
def test_other_settings_are_refused_and_taken_with_overwrite(adapted: tuple[Config, dict[str, Any]]):
    config, _ = adapted
    other = config.adapt.model_copy(update={"pairs": 600, "tasks": ("sides",)})
    changed = config.model_copy(update={"adapt": other})
    with pytest.raises(UsageError, match=r"sides was adapted with other settings \(adapt\.pairs: 2400 -> 600\)"):
        adapt_tasks.run(changed)
    elsewhere = changed.model_copy(update={"adapted_path": str(Path(config.workspace) / "elsewhere")})
    assert adapt_tasks.run(elsewhere)["tasks"][0]["steps"] == 38
    back = elsewhere.model_copy(update={"adapt": config.adapt.model_copy(update={"tasks": ("sides",)})})
    assert adapt_tasks.run(back, overwrite=True)["tasks"][0]["steps"] == 150
    typo = config.model_copy(update={"adapt": config.adapt.model_copy(update={"tasks": ("side",)})})
    with pytest.raises(UsageError, match=r"has no 'side'; did you mean 'sides'"):
        adapt_tasks.run(typo)


@pytest.mark.slow
def test_evaluate_scores_each_task_with_its_own_scorer(adapted: tuple[Config, dict[str, Any]]):
    config, result = adapted
    scorers = {each.dataset: each.uri for each in published(config.adapted_uri, "evaluation.adapted")}
    assert scorers == {task["task"]: task["uri"] for task in result["tasks"] if task["uri"]}
    rows = [*task_rows("sides", 2, 7), *task_rows("lonely", 2, 8), *task_rows("colors/old", 2, 9), *task_rows("sides", 1, 10)]
    scored = score_by_task(rows, scorers, config)
    assert [row["id"] for row in scored] == [row["id"] for row in rows]
    for row in scored:
        own = Scorer.load(scorers.get(row["dataset"], config.scorer_uri))
        expected = own.score([row["instruction"]] * 3, [each["response"] for each in row["candidates"]])
        assert np.allclose([each["score"] for each in row["candidates"]], expected, atol=1e-5)
    with pytest.raises(CappyError, match=r"evaluation\.adapted=true: there is no .*nowhere/results\.json; run `cappy adapt` first"):
        published("nowhere", "evaluation.adapted")


@pytest.mark.slow
def test_the_table_says_what_to_use_and_what_went_wrong(adapted: tuple[Config, dict[str, Any]]):
    _, result = adapted
    rejected = {**result["tasks"][0], "task": "worse", "state": "rejected", "uri": None, "use": "the-base"}
    sink = io.StringIO()
    print_adapted({**result, "tasks": [*result["tasks"], rejected]}, Console(file=sink, width=80))
    shown = sink.getvalue()
    assert "lonely: no validation rows of lonely" in shown
    assert "not better than the base, not published; use the-base: worse" in shown
    assert f"{result['averages']['after']:.1f}" in shown and "2 of 4 tasks published" in shown
