from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from cappy.display import show_adapted
from cluster import artifacts, storage
from cluster.config import AdaptConfig, Config, FilesSource, load, paths
from cluster.errors import CappyError, Stopped, UsageError
from evaluation.evaluate import score_rows_by_task
from generation import generate
from tests.generation.fixed_llm import FixedLLM
from tests.training.test_adapt_one import publish_tasks, published_scorer, settings, task_rows
from training import adapt, adapt_one
from training.adapt_one import Task
from training.adapted_index import read_published
from training.scorer import CHECKPOINTS, Scorer

NAMES = ["colors/old", "lonely", "sides"]


def test_folder_names_of_tasks_are_valid_and_distinct():
    names = ["tense", "a/b", "a b", "../x", "results.json", "_lease", "", "é"]
    folders = [adapt.folder_name(name) for name in names]
    assert folders[0] == "tense" and len(set(folders)) == len(names)
    assert all("/" not in folder and not folder.startswith((".", "_")) and folder != "results.json" for folder in folders)


@pytest.mark.parametrize(
    ("made", "now", "message"),
    [
        ("rows.jsonl", "rows.jsonl", ""),
        ("/here/rows.jsonl", "rows.jsonl", ""),
        ("rows.jsonl", "other.jsonl", "source.path"),
        ("/there/rows.jsonl", "rows.jsonl", "source.path"),
    ],
)
def test_a_set_of_another_source_is_reported_and_a_relative_path_is_not_another_source(
    made: str, now: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    lineage = generate.result_settings(Config(source=FilesSource(path=made)))
    given = Config(source=FilesSource(path=now))
    dataset = SimpleNamespace(uri="/sets/a", manifest={"lineage": lineage})
    adapt._log_differences((given, paths.absolute(given)), dataset)  # type: ignore[arg-type]
    assert capsys.readouterr().err == (
        f"dataset=/sets/a exists and is used; it was generated with other values of {message} than this config has\n" if message else ""
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_base_is_checked_before_any_task_starts(method: str, encoder: Path, tmp_path: Path):
    base = published_scorer(encoder, str(tmp_path / "scorer"))
    found = adapt._load_base(settings(tmp_path, encoder, base=base, method=method))
    assert (found.name, found.scorer, found.max_length) == (base, True, 32)
    if method == "lora":
        wrong = settings(tmp_path, encoder, base=base, method="lora", lora={"targets": ["nowhere"]})
        with pytest.raises(CappyError, match="nowhere"):
            adapt._load_base(wrong)


def test_only_files_of_adapt_are_deleted_and_none_if_one_folder_has_foreign_files(tmp_path: Path):
    tense, sides, colors = (Task(name, name, str(tmp_path / name), {}) for name in ("tense", "sides", "colors"))
    storage.write_json(f"{sides.uri}/results.json", {"state": "rejected", "identity": {}})
    for name in ("README.md", f"{CHECKPOINTS}/adapting"):  # the files of a lost run
        storage.write_bytes(f"{colors.uri}/{name}", b"")
    before = [storage.list_files(task.uri) for task in (sides, colors)]
    storage.write_bytes(f"{tense.uri}/thesis.txt", b"mine")
    with pytest.raises(UsageError, match=r"adapted_path=.*tense holds files that no `cappy adapt` wrote, e.g. thesis.txt"):
        adapt._delete_earlier_files([sides, colors, tense])
    artifacts.publish(tense.uri, {"kind": "scorer", "files": {}})
    with pytest.raises(CappyError, match="holds a scorer that `cappy adapt` did not write"):
        adapt._delete_earlier_files([sides, colors, tense])
    storage.write_json(f"{tense.uri}/{artifacts.MANIFEST}", {"kind": "scorer", "identity": {}, "summary": {}, "files": {}})
    with pytest.raises(UsageError, match=r"e.g. thesis.txt; nothing was deleted"):
        adapt._delete_earlier_files([sides, colors, tense])
    assert storage.exists(f"{tense.uri}/thesis.txt") and [storage.list_files(task.uri) for task in (sides, colors)] == before
    storage.delete(f"{tense.uri}/thesis.txt")
    adapt._delete_earlier_files([sides, colors, tense])
    assert not storage.list_files(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "theirs", "{}"])
def test_a_foreign_results_file_is_neither_read_nor_overwritten(content: str, tmp_path: Path):
    task = Task("tense", "tense", str(tmp_path), {})
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match=r"wrote, e\.g\. results\.json; nothing was deleted"):
        adapt._delete_earlier_files([task])
    with pytest.raises(UsageError, match=r"wrote, e\.g\. results\.json; nothing was deleted"):
        adapt._refuse_foreign_results(str(tmp_path))
    assert (tmp_path / "results.json").read_text() == content


def test_the_first_line_of_a_run_has_the_pairs_of_the_cross_validation():
    settings = AdaptConfig(pairs=100, epochs=2, folds=3)
    assert adapt.describe_work(settings, 4) == (
        "adapting 4 task(s): 200 pairs each, and 3 trainings for cross-validation, 400 pairs more (adapt.folds=3)"
    )
    assert adapt.describe_work(AdaptConfig(pairs=100, folds=0), 1) == "adapting 1 task(s): 100 pairs each"


def test_lora_without_a_base_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"method=lora with base=null: adapters need a base that all tasks share; set adapt\.base"):
        load(None, ["adapt.method=lora", "adapt.base=null"])


def test_a_task_that_an_earlier_version_adapted_from_the_plain_encoder_is_finished(tmp_path: Path, capsys):
    before = {"seed": 7, "adapt": {"base": None, "pairs": 9}, "base": {"name": "minilm-l6", "scorer": False}, "task": "tense"}
    now = {**before, "adapt": {"base": "cappy-minilm", "pairs": 9}, "base": {"name": "cappy-minilm", "scorer": True}}
    outcome: Any = {"task": "tense", "state": "published", "identity": before}
    task = Task("tense", "tense", str(tmp_path), now)
    assert adapt._has_earlier_default_base(outcome, task)
    assert "tense was adapted from minilm-l6 by an earlier version and is kept" in capsys.readouterr().err
    for other in ({**now, "seed": 8}, {**now, "base": {"name": "my/scorer", "scorer": True}}):
        assert not adapt._has_earlier_default_base(outcome, Task("tense", "tense", str(tmp_path), other))


@pytest.fixture(scope="module")
def adapted(encoder: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> tuple[Config, dict[str, Any]]:
    """Return the config and the result of a run with three tasks. One of them has no train rows."""
    workspace = tmp_path_factory.mktemp("run")
    train = [*task_rows("colors/old", 40, 1), *task_rows("sides", 30, 3, choices=True)]
    validation = [*task_rows("colors/old", 30, 4), *task_rows("lonely", 5, 2), *task_rows("sides", 40, 5, choices=True)]
    config = settings(workspace, encoder, base=published_scorer(encoder, str(workspace / "scorer")))
    publish_tasks(config.dataset_uri, train, validation)
    return config, adapt.run_adapt(config)


@pytest.mark.slow
def test_a_failed_task_does_not_stop_the_others(adapted: tuple[Config, dict[str, Any]]):
    config, result = adapted
    assert [(task["task"], task["state"]) for task in result["tasks"]] == list(
        zip(NAMES, ["published", "failed", "published"], strict=True)
    )
    assert "no train rows of lonely" in result["tasks"][1]["error"]
    assert (result["published"], result["rejected"], result["failed"]) == (2, 0, 1)
    measured = [task["figures"] for task in result["tasks"] if "figures" in task]
    assert result["averages"]["after"] == np.mean([each["after"] for each in measured])
    # A task of answer choices has no fitted selection, so its scorer alone is used.
    used = [each["after"] if each["fitted"] is None else each["fitted"] for each in measured]
    assert result["averages"]["after the gate"] == np.mean(used) and None in [each["fitted"] for each in measured]
    recorded = storage.read_json(f"{config.adapted_uri}/results.json")
    assert recorded.pop("identity")["tasks"] == config.adapt.tasks
    assert recorded == json.loads(json.dumps(result))
    for task in (result["tasks"][0], result["tasks"][2]):
        Scorer.load(task["uri"])


@pytest.mark.slow
def test_the_same_command_does_not_repeat_a_finished_task(adapted: tuple[Config, dict[str, Any]], capfd: pytest.CaptureFixture[str]):
    config, result = adapted
    manifest = artifacts.read_manifest(result["tasks"][0]["uri"], "scorer", "adapt")
    # The marker of a run that stopped between publishing and cleanup.
    storage.write_bytes(f"{result['tasks'][0]['uri']}/{CHECKPOINTS}/adapting", b"")
    again = adapt.run_adapt(config)
    assert not storage.list_files(f"{result['tasks'][0]['uri']}/{CHECKPOINTS}")
    assert "2 of 3 tasks are finished; resuming with the others" in capfd.readouterr().err
    assert {**again, "seconds": 0} == {**json.loads(json.dumps(result)), "seconds": 0}
    assert artifacts.read_manifest(result["tasks"][0]["uri"], "scorer", "adapt") == manifest
    only = config.adapt.model_copy(update={"tasks": ("sides",), "concurrency": 1})
    assert [task["task"] for task in adapt.run_adapt(config.model_copy(update={"adapt": only}))["tasks"]] == ["sides"]
    assert len(adapt.run_adapt(config)["tasks"]) == 3


@pytest.mark.slow
def test_other_settings_are_refused_without_overwrite(adapted: tuple[Config, dict[str, Any]]):
    config, _ = adapted
    other = config.adapt.model_copy(update={"pairs": 600, "tasks": ("sides",)})
    changed = config.model_copy(update={"adapt": other})
    with pytest.raises(UsageError, match=r"sides was adapted with other settings \(adapt\.pairs: 2400 -> 600\)"):
        adapt.run_adapt(changed)
    elsewhere = changed.model_copy(update={"adapted_path": str(Path(config.workspace) / "elsewhere")})
    assert adapt.run_adapt(elsewhere)["tasks"][0]["steps"] == 38
    back = elsewhere.model_copy(update={"adapt": config.adapt.model_copy(update={"tasks": ("sides",)})})
    assert adapt.run_adapt(back, overwrite=True)["tasks"][0]["steps"] == 150
    typo = config.model_copy(update={"adapt": config.adapt.model_copy(update={"tasks": ("side",)})})
    with pytest.raises(UsageError, match=r"has no 'side'; did you mean 'sides'"):
        adapt.run_adapt(typo)


@pytest.mark.slow
def test_evaluate_scores_each_task_with_its_own_scorer(adapted: tuple[Config, dict[str, Any]]):
    config, result = adapted
    scorers = {each.dataset: each.uri for each in read_published(config.adapted_uri, "evaluation.adapted")}
    assert scorers == {task["task"]: task["uri"] for task in result["tasks"] if task["uri"]}
    rows = [*task_rows("sides", 2, 7), *task_rows("lonely", 2, 8), *task_rows("colors/old", 2, 9), *task_rows("sides", 1, 10)]
    scored, selections = score_rows_by_task(rows, scorers, config)
    assert selections["fitted"] == [Scorer.load(scorers.get(row["dataset"], config.scorer_uri)).selection for row in rows]
    # No row of "sides" has samples, and no scorer of "lonely" was published.
    assert selections["fitted"][4] is not None and selections["fitted"][0] is None and selections["fitted"][2] is None
    assert [row["id"] for row in scored] == [row["id"] for row in rows]
    for row in scored:
        own = Scorer.load(scorers.get(row["dataset"], config.scorer_uri))
        expected = own.score([row["instruction"]] * 3, [each["response"] for each in row["candidates"]])
        assert np.allclose([each["score"] for each in row["candidates"]], expected, atol=1e-5)


@pytest.mark.slow
def test_the_table_shows_the_scorer_to_use_and_the_errors(adapted: tuple[Config, dict[str, Any]]):
    _, result = adapted
    rejected = {**result["tasks"][0], "task": "worse", "state": "rejected", "uri": None, "use": "the-base"}
    sink = io.StringIO()
    show_adapted({**result, "tasks": [*result["tasks"], rejected]}, Console(file=sink, width=80))
    shown = sink.getvalue()
    assert "lonely: no train rows of lonely" in shown
    assert "not better than the base, not published; use the-base: worse" in shown
    assert f"{result['averages']['after']:.1f}" in shown and "2 of 4 tasks published" in shown


def _adapting() -> list[psutil.Process]:
    """Return the processes of this Ray that run a task, by their process title."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [each] * ("ray::adapt" in " ".join(each.cmdline()))
    return found


def _ended(config: Config, name: str) -> bool:
    return storage.exists(f"{config.adapted_uri}/{name}/{artifacts.MANIFEST}")


def _meanwhile(config: Config, names: list[str], killed: list[int]) -> None:
    """Kill the worker of the first task, and send SIGTERM to this process once the task is finished after its restart."""
    deadline = time.monotonic() + 540
    while time.monotonic() < deadline and not killed:
        for process in _adapting():
            with suppress(psutil.NoSuchProcess):
                process.kill()
                killed.append(process.pid)
        time.sleep(0.02)
    while time.monotonic() < deadline:
        if _ended(config, names[0]):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_and_a_stopped_run_do_not_change_the_result_in_object_storage(
    encoder: Path, bucket: str, tmp_path: Path, ray_here: None, capfd: pytest.CaptureFixture[str]
):
    names = ["add", "buy", "cut"]
    rows = [{"dataset": name, "instruction": f"{name} {n} now", "references": [f"number {n % 7}"]} for name in names for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = published_scorer(encoder, str(tmp_path / "scorer"))
    storage.upload_folder(Path(base), f"{bucket}/scorer")
    config = settings(Path("unused"), encoder, base=f"{bucket}/scorer", pairs=2400, gate=False, concurrency=1).model_copy(
        update={"workspace": f"{bucket}/run", "source": FilesSource(path=str(tmp_path / "rows.jsonl"))}
    )
    killed: list[int] = []
    assert threading.current_thread() is threading.main_thread()  # Python handles signals there
    threading.Thread(target=_meanwhile, args=(config, names, killed), daemon=True).start()
    # 0 if the signal arrives after the publication and before the driver reads the outcome.
    with pytest.raises(Stopped, match=r"stopped on SIGTERM; [012] of 3 tasks are finished; run the same command again to resume"):
        adapt.run_adapt(config, load=FixedLLM)
    assert len(killed) == 1 and not _adapting()
    done = {name: storage.read_json(f"{config.adapted_uri}/{name}/{artifacts.MANIFEST}") for name in names if _ended(config, name)}
    assert 1 <= len(done) < 3
    result = adapt.run_adapt(config, load=FixedLLM)
    assert f"{len(done)} of 3 tasks are finished; resuming with the others" in capfd.readouterr().err
    assert [(task["task"], task["state"]) for task in result["tasks"]] == [(name, "published") for name in names]
    for task in result["tasks"]:
        manifest = artifacts.read_manifest(task["uri"], "scorer", "adapt")
        assert manifest == done.get(task["task"], manifest) and artifacts.verify(task["uri"], manifest) == []
        assert set(storage.list_files(task["uri"])) == {*manifest["files"], artifacts.MANIFEST}
    apart = {"seconds", "pairs_per_second", "uri", "use"}
    for task in (result["tasks"][0], result["tasks"][-1]):  # the task of the killed worker, and a task of the second command
        here = Task(task["task"], task["dataset"], str(tmp_path / task["task"]), {})
        untouched = adapt_one.adapt_task(config, here, adapt._load_base(config))
        assert {name: value for name, value in task.items() if name not in apart} == {
            name: value for name, value in json.loads(json.dumps(untouched)).items() if name not in {*apart, "identity"}
        }
