"""Sets with other splits: the same rows and samples, and no mismatched reference from a validation row."""

from __future__ import annotations

import pytest

from cluster import artifacts, storage
from cluster.errors import UsageError
from generation.dataset import RegressionSet
from generation.resplit import publish_resplit
from tests.generation import made_set


@pytest.fixture
def source(tmp_path):
    uri = str(tmp_path / "set")
    made_set.publish(uri, train=(9, 6), validation=(5,))
    return RegressionSet(uri)


def rows_of(dataset, split):
    return [row for table in dataset.batches(split) for row in table.to_pylist()]


def halves(source):
    ids = [row["id"] for split in ("train", "validation") for row in rows_of(source, split)]
    return {row_id: index % 2 == 0 for index, row_id in enumerate(ids)}


def samples(row):
    return [each for each in row["candidates"] if each["source"] == "sampled"]


def test_each_row_keeps_its_samples_and_gets_its_new_split(source, tmp_path):
    validation = halves(source)
    publish_resplit(source, str(tmp_path / "new"), "workspace", validation, {"fold": 0})
    new = RegressionSet(str(tmp_path / "new"))
    before = {row["id"]: row for split in ("train", "validation") for row in rows_of(source, split)}
    after = {split: rows_of(new, split) for split in ("train", "validation")}
    assert {row["id"]: split == "validation" for split, rows in after.items() for row in rows} == validation
    for row in [*after["train"], *after["validation"]]:
        assert samples(row) == samples(before[row["id"]])
    assert artifacts.verify(new.uri, new.manifest) == []


def test_no_train_row_has_a_reference_of_a_validation_row_as_mismatched(source, tmp_path):
    publish_resplit(source, str(tmp_path / "new"), "workspace", halves(source), {"fold": 0})
    new = RegressionSet(str(tmp_path / "new"))
    held_out = {text for row in rows_of(new, "validation") for text in row["references"]}
    mismatched = [each["response"] for row in rows_of(new, "train") for each in row["candidates"] if each["source"] == "mismatched"]
    assert mismatched
    assert not held_out & set(mismatched)


def test_a_finished_set_is_kept_and_a_set_of_another_split_is_replaced(source, tmp_path):
    uri = str(tmp_path / "new")
    validation = halves(source)
    publish_resplit(source, uri, "workspace", validation, {"fold": 0})
    writer = RegressionSet(uri).manifest["writer"]
    publish_resplit(source, uri, "workspace", validation, {"fold": 0})
    assert RegressionSet(uri).manifest["writer"] == writer
    publish_resplit(source, uri, "workspace", {row_id: not value for row_id, value in validation.items()}, {"fold": 1})
    assert RegressionSet(uri).manifest["writer"] != writer


def test_an_interrupted_run_is_completed_and_foreign_files_are_refused(source, tmp_path, monkeypatch):
    uri = str(tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "publish_folder", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish_resplit(source, uri, "workspace", halves(source), {"fold": 0})
    publish_resplit(source, uri, "workspace", halves(source), {"fold": 0})
    assert not storage.exists(f"{uri}/_staging")
    assert artifacts.verify(uri, RegressionSet(uri).manifest) == []
    storage.write_bytes(f"{tmp_path}/other/README.md", b"mine")
    with pytest.raises(UsageError, match="holds files that no"):
        publish_resplit(source, str(tmp_path / "other"), "workspace", halves(source), {"fold": 0})
