from __future__ import annotations

from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import CappyError
from training.adapted_index import AdaptedScorer, read_published


def write_results(folder: Path, *tasks: dict[str, str | None]) -> str:
    storage.write_json(f"{folder}/results.json", {"tasks": list(tasks)})
    return str(folder)


def test_published_scorers_are_listed_below_the_folder_that_is_read(tmp_path: Path):
    # The URIs are those of the run; the folder was copied since.
    published = {"task": "sides", "dataset": "sides", "uri": "s3://bucket/adapted/sides"}
    all_rows = {"task": "all", "dataset": None, "uri": "s3://bucket/adapted/all"}
    rejected = {"task": "worse", "dataset": "worse", "uri": None}
    uri = write_results(tmp_path / "copy", published, rejected, all_rows)
    assert read_published(uri, "serving.adapted") == [
        AdaptedScorer("sides", "sides", f"{uri}/sides"),
        AdaptedScorer("all", None, f"{uri}/all"),
    ]


def test_an_index_with_a_path_outside_its_folder_is_refused(tmp_path: Path):
    uri = write_results(tmp_path / "adapted", {"task": "a", "dataset": "a", "uri": "s3://b/adapted/.."})
    with pytest.raises(CappyError, match=r"results\.json names the file '\.\.', which is not within the folder"):
        read_published(uri, "evaluation.adapted")


def test_a_folder_without_results_is_refused_with_the_setting(tmp_path: Path):
    with pytest.raises(CappyError, match=r"evaluation\.adapted=true: there is no .*nowhere/results\.json; run `cappy adapt` first"):
        read_published(str(tmp_path / "nowhere"), "evaluation.adapted")
