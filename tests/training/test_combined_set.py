"""A set that `cappy combine` published is trained, adapted and evaluated like any other set."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import Config, load
from evaluation.evaluate import run_evaluate
from generation.combine import run_combine
from tests.generation.made_set import LABELS, publish
from tests.training.conftest import settings
from training import adapt, train

pytestmark = pytest.mark.slow

# The distinct pairs of a row: a mismatched reference and the samples, one of which repeats the reference.
DISTINCT = 1 + len(LABELS)


@pytest.fixture
def combined(tmp_path: Path, encoder: Path) -> Config:
    """Publish two sets and their combination; return a config that trains on it."""
    for name, first in (("one", 0), ("two", 1000)):
        publish(f"{tmp_path}/{name}", train=(12, 8), validation=(6,), first=first)
    run_combine([f"{tmp_path}/one", f"{tmp_path}/two"], f"{tmp_path}/dataset")
    return settings(str(tmp_path), encoder, epochs=1)


def test_training_adapting_and_evaluating_read_the_rows_of_all_sets(combined: Config, ray_here: None):
    trained = train.run_train(combined)
    assert trained["pairs"] == 2 * (12 + 8) * DISTINCT
    adapted = adapt.run_adapt(load(None, {**combined.model_dump(), "adapt": {"base": combined.scorer_uri, "pairs": 64, "folds": 2}}))
    assert {each["task"]: each["train_rows"] for each in adapted["tasks"]} == {"task 0": 20, "task 1": 20}
    assert run_evaluate(combined)["instructions"] == 12
