"""The records of `cappy adapt` and `cappy score` in a pipeline: their published results and interrupted runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from cappy import pipeline_plan
from cappy.pipeline import run_pipeline
from cappy.pipeline_file import read_pipeline
from cappy.pipeline_verbs import Step
from cluster import artifacts, storage, versions
from cluster.config import load
from cluster.config.paths import absolute
from cluster.errors import UsageError
from serving import score
from tests.serving.number_scorer import load_number_scorer
from training import adapt
from training.adapt_one import Base


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    artifacts.publish_folder(f"{tmp_path}/dataset", "dataset", files={}, summary={}, config={}, lineage={})
    return {"workspace": str(tmp_path), "scorer.encoder": "minilm-l6"}


def publish_tasks(settings: dict[str, object], *tasks: str, finish: bool = True, failed: int = 0) -> None:
    """Write the folders of adapted tasks and, with `finish`, the results of the run, with the identity that `adapt` gives them."""
    config = absolute(load(None, settings))
    base = Base(config.adapt.base or config.scorer.encoder, False, "0" * 64, None, 256)
    shared = {**adapt.result_settings(config), "dataset": versions.version(config.dataset_uri), "base": asdict(base)}
    for task in tasks:
        storage.delete(f"{config.adapted_uri}/{task}")
        artifacts.publish_folder(
            f"{config.adapted_uri}/{task}", "scorer", files={}, summary={}, config=config, identity={**shared, "task": task}
        )
    if finish:
        results = {"published": len(tasks), "failed": failed, "identity": {**shared, "tasks": config.adapt.tasks}}
        storage.write_json(f"{config.adapted_uri}/results.json", results)


def plan(settings: dict[str, object], **changes: object) -> pipeline_plan.Planned:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return pipeline_plan.plan_steps([Step("adapt", "adapt", load(None, settings | changed))])[0]


def test_finished_tasks_are_kept_and_other_settings_need_permission(settings):
    assert plan(settings).state == "new"
    publish_tasks(settings, "a", "b")
    assert plan(settings).state == plan(settings, adapt__concurrency=3).state == "kept"
    changed = plan(settings, adapt__pairs=8)
    assert (changed.state, changed.reasons, changed.replaces) == ("changed", ("adapt.pairs: 2048 -> 8",), True)


def test_more_tasks_and_failed_tasks_run_without_deleting_the_finished_ones(settings):
    publish_tasks(settings, "a", failed=1)
    assert (plan(settings).state, plan(settings).replaces) == ("resumed", False)
    publish_tasks({**settings, "adapt.tasks": ["a"]}, "a")
    assert plan(settings, adapt__tasks=["a"]).state == "kept"
    more = plan(settings, adapt__tasks=["a", "b"])
    assert (more.state, more.replaces) == ("resumed", False)


def test_an_interrupted_redo_resumes_and_does_not_delete_its_new_tasks(settings):
    publish_tasks(settings, "a", "b")
    new = {**settings, "adapt.pairs": 8}
    publish_tasks(new, "a", finish=False)
    assert plan(new).replaces  # task b has the earlier settings
    storage.delete(f"{settings['workspace']}/adapted/b")
    assert (plan(new).state, plan(new).replaces) == ("resumed", False)
    # With the earlier settings again, the results are those of a run whose tasks are no longer there.
    assert plan(settings).state == "changed"


def test_another_version_of_the_set_is_a_changed_input(settings):
    publish_tasks(settings, "a")
    storage.delete(f"{settings['workspace']}/dataset")
    artifacts.publish_folder(f"{settings['workspace']}/dataset", "dataset", files={}, summary={}, config={}, lineage={})
    assert (plan(settings).state, plan(settings).reasons) == ("changed", ("another version of dataset",))


def publish_pairs(uri: str) -> None:
    rows = "".join(f'{{"instruction": "say {n}", "response": "it {n}"}}\n' for n in range(4))
    entry = storage.write_bytes(f"{uri}/data/pairs.jsonl", rows.encode())
    artifacts.publish_folder(uri, "pairs", files={"data/pairs.jsonl": entry}, summary={}, config={})


def test_scores_are_kept_until_a_filter_or_the_source_changes_and_an_unfinished_run_takes_other_filters(tmp_path, ray_here):
    pairs = f"{tmp_path}/pairs"
    publish_pairs(pairs)
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"settings: {{workspace: {tmp_path}/work}}\nsteps: [{{verb: score, src: {pairs}, settings: {{score: {{scorers: 1}}}}}}]"
    )

    def run(*settings: str) -> dict[str, object]:
        result = run_pipeline(
            read_pipeline(file, settings),
            run=lambda step, overwrite: score.run_score(
                step.config, src=step.src, dst=step.dst, overwrite=overwrite, load_scorer=load_number_scorer
            ),
        )
        return result["steps"][0]  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match=r"step score \(1 of 1\): --keep-above=1000 drops all 4 pairs"):
        run("score.keep_above=1000")
    assert run()["state"] == "resumed"
    assert run()["state"] == run("score.scorers=2")["state"] == "kept"
    with pytest.raises(UsageError, match=r"score \(filters\.top_per_instruction: null -> 1\)"):
        run("score.top_per_instruction=1")
    storage.delete(pairs)
    publish_pairs(pairs)
    with pytest.raises(UsageError, match=r"score \(another version of src\)"):
        run()
