"""`cappy compare`: paired differences of two published evaluations."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cappy.display_suites import show_compare
from cluster import storage
from cluster.errors import CappyError, UsageError
from evaluation.compare import run_compare
from evaluation.evaluate import run_evaluate
from tests.evaluation.conftest import TASKS, NoisyScorer, make_rows, publish_set


@pytest.fixture
def evaluations(config, tmp_path):
    """Return the URIs of two evaluations of one set: with a noisy scorer, and with a perfect scorer."""
    rows = make_rows()
    publish_set(Path(config.dataset_uri), rows, config)
    uris = []
    for name, noise in (("noisy", 0.6), ("perfect", 0.0)):
        uris.append(str(tmp_path / name))
        run_evaluate(config.model_copy(update={"evaluation_path": uris[-1]}), load=lambda _, noise=noise: NoisyScorer(rows, noise))
    return uris


def test_the_better_scorer_is_ahead_and_the_baselines_are_equal(evaluations):
    found = run_compare(*evaluations, resamples=200)
    assert (found["rows"], found["tasks"], found["only_first"], found["only_second"], found["other_candidates"]) == (36, 3, 0, 0, 0)
    assert found["methods"]["greedy"]["difference"] == {"mean": 0, "low": 0, "high": 0, "low_tasks": 0, "high_tasks": 0}
    scorer = found["methods"]["scorer"]
    assert scorer["difference"]["low"] > 0
    assert scorer["difference"]["mean"] == pytest.approx(scorer["second"] - scorer["first"])
    assert scorer["outcomes"]["losses"] == 0
    assert set(scorer["per_task"]) == set(TASKS)
    back = run_compare(*evaluations[::-1], resamples=200, methods=("scorer",))
    assert list(back["methods"]) == ["scorer"]
    assert back["methods"]["scorer"]["difference"]["mean"] == pytest.approx(-scorer["difference"]["mean"])
    console = Console(file=io.StringIO(), width=100)
    show_compare(found, console)
    assert "36 common rows" in console.file.getvalue()


def test_unknown_methods_other_rows_and_damaged_evaluations_are_refused(evaluations, config, tmp_path):
    with pytest.raises(UsageError, match="--method fits: not in both evaluations; they share: greedy, "):
        run_compare(*evaluations, methods=("fits",))
    rows = [{**row, "id": f"other {row['id']}"} for row in make_rows()]
    publish_set(tmp_path / "other" / "dataset", rows, config)
    other = config.model_copy(update={"dataset": str(tmp_path / "other" / "dataset"), "evaluation_path": str(tmp_path / "other" / "e")})
    run_evaluate(other, load=lambda _: NoisyScorer(rows))
    with pytest.raises(UsageError, match="no row in common"):
        run_compare(evaluations[0], other.evaluation_uri)
    with pytest.raises(CappyError, match="holds a dataset"):
        run_compare(evaluations[0], other.dataset_uri)
    storage.write_bytes(f"{evaluations[1]}/rows.parquet", b"changed")
    with pytest.raises(CappyError, match=r"rows\.parquet does not match the manifest"):
        run_compare(*evaluations)
