"""The parts of `make demo` that need neither a model nor a server. The whole demo takes 15 minutes and is run by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from cappy import demo
from cluster import storage
from cluster.errors import CappyError


class Frames:
    """The rows of a regression set, by split."""

    def __init__(self, train: pd.DataFrame, validation: pd.DataFrame) -> None:
        self._splits = {"train": train, "validation": validation}

    def to_pandas(self, split: str) -> pd.DataFrame:
        return self._splits[split]


def rows(count: int, dataset: str, template: str) -> pd.DataFrame:
    texts = [f"{dataset} {template} {number}" for number in range(count)]
    return pd.DataFrame(
        {"dataset": dataset, "template": template, "instruction": texts, "references": [[f"answer of {text}"] for text in texts]}
    )


def test_the_question_is_a_validation_row_after_train_rows_of_its_template():
    train = pd.concat([rows(2, "other", "a"), rows(5, demo.QUESTION_TASK, "b"), rows(5, demo.QUESTION_TASK, "a")])
    validation = pd.concat([rows(2, "other", "a"), rows(2, demo.QUESTION_TASK, "a")])
    turns, row = demo.question(Frames(train, validation))  # type: ignore[arg-type]
    assert row["instruction"] == f"{demo.QUESTION_TASK} a 0"
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * demo.SHOTS + ["user"]
    assert turns[0]["content"] == f"{demo.QUESTION_TASK} a 0" and turns[1]["content"] == f"answer of {demo.QUESTION_TASK} a 0"
    assert turns[-1]["content"] == row["instruction"]


def test_a_server_that_stops_during_its_start_is_an_error_with_its_last_line(tmp_path: Path):
    log = tmp_path / "serve.log"
    log.write_text("first\nerror: port 80 is in use\n")
    with subprocess.Popen([sys.executable, "-c", ""]) as server:
        server.wait()
        with pytest.raises(CappyError, match="port 80 is in use"):
            demo._wait_until_ready("http://127.0.0.1:1", server, log)


@pytest.mark.parametrize("published", [True, False])
def test_the_question_goes_to_the_adapted_scorer_of_its_task_if_it_was_published(published: bool, tmp_path: Path):
    tasks = [{"task": demo.QUESTION_TASK, "dataset": demo.QUESTION_TASK, "uri": str(tmp_path / demo.QUESTION_TASK) if published else None}]
    storage.write_json(str(tmp_path / "adapted" / "results.json"), {"tasks": tasks})
    assert demo._model(demo.Config(workspace=str(tmp_path))) == (f"cappy+{demo.QUESTION_TASK}" if published else "cappy")


def test_the_demo_stops_with_the_exit_code_of_the_step_that_failed(monkeypatch: pytest.MonkeyPatch):
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "_cappy", lambda *words: ran.append(words) or 3)
    assert demo.main() == 3 and ran == [("run", demo.CONFIG)]
