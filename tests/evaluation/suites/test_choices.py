"""Suites of answer choices and of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cappy.verbs import suite_config
from cluster import storage
from cluster.config import Config, load
from cluster.errors import CappyError, UsageError
from evaluation.suites import rivals, scores, suite_file
from evaluation.suites.choices import cap_examples
from evaluation.suites.run import run_suite
from generation.sources.row import Instruction
from tests.evaluation.test_likelihood import llm  # noqa: F401
from tests.training.conftest import encoder, one_thread  # noqa: F401
from tests.training.test_adapt_one import published_scorer


def instruction(dataset: str, template: str, number: int) -> Instruction:
    return Instruction(dataset, template, "validation", f"{template} {number}?", ("yes",), ("yes", "no"))


def test_the_cap_draws_whole_examples_by_seed():
    rows = [instruction(name, template, number) for name in ("a", "b") for number in range(20) for template in ("one", "two", "three")]
    kept = cap_examples(rows, 10, seed=1)
    numbers = {name: [row.instruction.split()[1] for row in kept if row.dataset == name] for name in ("a", "b")}
    for found in numbers.values():
        assert len(found) == 9
        assert all(found.count(number) == 3 for number in found)
    assert cap_examples(rows, 10, seed=1) == kept
    assert cap_examples(rows, 10, seed=2) != kept
    assert cap_examples(rows, None, seed=1) == rows


@pytest.fixture(scope="module")
def config(encoder: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:  # noqa: F811
    folder = tmp_path_factory.mktemp("choices")
    choices = ["a red fox", "the blue cat", "me"]
    rows: list[dict[str, Any]] = [
        {"task": task, "template": template, "instruction": f"say after me {text}", "answer_choices": choices, "label_index": index}
        for task in ("colors", "sides")
        for index, text in enumerate(["red fox", "blue cat", "me"] * 3)
        for index in [index % 3]
        for template in ("one", "two")
    ]
    (folder / "rows").mkdir()
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "label_index": 7}]), folder / "rows" / "all.parquet")
    return Config.model_validate(
        {
            "workspace": str(folder / "run"),
            "scorer_path": published_scorer(encoder, str(folder / "scorer")),
            "source": {"kind": "files", "path": str(folder / "rows")},
            "sampler": {"model": str(llm), "prompt": {"form": "raw"}, "engine": {"dtype": "float32"}},
            "evaluation": {"resamples": 100},
            "suite": {"kind": "choices", "rows": 8, "paper": {"colors": 50.0}},
        }
    )


def test_a_suite_of_choices_resumes_after_an_interruption_with_the_same_figures(config: Config, monkeypatch: pytest.MonkeyPatch):
    original, calls = scores.score_rows, []

    def stop_at_the_second_task(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scores, "score_rows", stop_at_the_second_task)
        with pytest.raises(KeyboardInterrupt):
            run_suite(config)
    summary = run_suite(config)
    table = pq.read_table(storage.join(config.evaluation_uri, "rows.parquet"))
    assert summary["skipped"] == {"unreadable": 1, "over_the_cap": 20}
    assert {task: entry["rows"] for task, entry in summary["per_task"].items()} == {"colors": 8, "sides": 8}
    assert list(summary["averages"]) == ["random", "likelihood_sum", "likelihood_mean", "likelihood_pmi", "scorer"]
    assert summary["averages"]["random"]["mean"] == pytest.approx(100 / 3)
    for row in table.to_pylist():
        best = max(row["candidates"], key=lambda each: each["scorer"])
        assert row["value_scorer"] == best["label"]
        by_mean = max(row["candidates"], key=lambda each: each["likelihood"] / each["tokens"])
        assert row["value_likelihood_mean"] == by_mean["label"]
    fresh = config.model_copy(update={"workspace": f"{config.workspace}-again"})
    again = run_suite(fresh)
    assert again["averages"] == summary["averages"] and again["gains"] == summary["gains"]
    page = storage.read_bytes(storage.join(config.evaluation_uri, "report.html")).decode()
    assert "Paper" in page


def test_questions_report_both_groups(config: Config):
    groups = {
        "same_type": [{"instruction": "say after me red", "right": "red", "wrong": ["blue", "green"]}] * 2,
        "other_type": [{"instruction": "say after me cat", "right": "cat", "wrong": ["now", "then"]}],
    }
    tree = config.model_dump(mode="json") | {"workspace": f"{config.workspace}-questions"}
    summary = run_suite(Config.model_validate(tree | {"suite": {"kind": "questions", "questions": groups, "likelihood": False}}))
    assert {task: entry["rows"] for task, entry in summary["per_task"].items()} == {"other_type": 1, "same_type": 2}


def test_a_source_without_choices_is_refused(config: Config, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "say", "references": ["red"]}) + "\n")
    tree = config.model_dump(mode="json") | {"workspace": str(tmp_path / "run"), "source": {"kind": "files", "path": str(tmp_path)}}
    with pytest.raises(CappyError, match="no rows with answer choices"):
        run_suite(Config.model_validate(tree))


@pytest.mark.parametrize("name", ["bigbench", "promptsource", "questions"])
def test_the_suites_of_the_package_load(name: str):
    suite = load(suite_file(name)).suite
    assert suite is not None
    assert sum(map(len, suite.questions.values())) == (20 if name == "questions" else 0)


def test_the_command_takes_a_suite_or_a_config(tmp_path: Path):
    found, overrides = suite_config(None, "promptsource", str(tmp_path), ["suite.rows=5"])
    assert load(found, overrides).source.model_dump()["path"] == str(tmp_path)
    assert load(found, overrides).suite.rows == 5  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="give one of them"):
        suite_config("demo", "bigbench", None, [])
    with pytest.raises(UsageError, match="is for a suite"):
        suite_config("demo", None, "rows", [])
    with pytest.raises(UsageError, match="bigbench, promptsource, questions"):
        suite_config(None, "unknown", None, [])


def test_rivals_and_further_scorers_are_compared_and_their_numbers_are_kept(
    config: Config,
    encoder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    names = ("gptscore", "flipped", "judge")
    suite = {**config.suite.model_dump(), "rivals": names, "scorers": (published_scorer(encoder, str(tmp_path / "other")),)}  # type: ignore[union-attr]
    changed = Config.model_validate({**config.model_dump(mode="json"), "suite": suite, "evaluation_path": str(tmp_path / "evaluation")})
    first = run_suite(changed)
    assert {*names, "scorer:other"} <= set(first["averages"]) and first["titles"]["judge"] == "LLM as judge"
    assert first["averages"]["scorer:other"] == first["averages"]["scorer"]  # the same weights
    steps = storage.read_json(storage.join(changed.workspace, "steps.json"))
    assert all(steps[f"rival {name}"]["tokens"] > 0 for name in names) and steps["scorer:other"]["pairs"] > 0

    def fail(*arguments: Any) -> Any:
        raise AssertionError("the LLM is loaded again")

    monkeypatch.setattr(rivals, "ChoiceLikelihood", fail)
    again = run_suite(changed, overwrite=True)
    assert again["averages"] == first["averages"]
