from __future__ import annotations

import datasets
import pandas
import pyarrow.parquet as pq
import pytest

from cluster import artifacts, copying, lease, storage
from cluster.errors import CappyError
from generation import export_pairs
from generation.dataset import RegressionSet
from tests.cluster.test_copying import SHARD, endpoints, flip
from tests.generation.made_set import LABELS, publish

__all__ = ["endpoints"]  # a fixture
both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


def test_each_candidate_is_a_row_with_its_origin(endpoints):
    source, destination = endpoints
    manifest = publish(source)
    export_pairs.export_pairs(source, destination)
    made = storage.read_json(f"{destination}/_MANIFEST.json")
    assert made["kind"] == "pairs" and made["counts"] == manifest["counts"] and artifacts.verify(destination, made) == []
    fs, path = storage.filesystem(f"{destination}/data/train")
    frame = pq.read_table(path, filesystem=fs).to_pandas()
    assert ", ".join(frame) == "instruction, response, label, source, dataset, template, id, model, decoding, logprob, tokens"
    rows = RegressionSet(source).to_pandas()
    expected = [
        (row.instruction, each["response"], each["label"], each["source"], row.dataset, row.id, each["decoding"], each["tokens"])
        for row in rows.itertuples()
        for each in row.candidates
    ]
    named = ["instruction", "response", "label", "source", "dataset", "id", "decoding", "tokens"]
    assert [tuple(None if value != value else value for value in row) for row in frame[named].itertuples(index=False)] == expected
    assert sorted(frame[frame.source == "sampled"].label.unique()) == sorted(LABELS) and len(frame) == 70
    with pytest.raises(CappyError, match=r"holds pairs, not a dataset"):
        RegressionSet(destination)
    assert export_pairs.export_pairs(source, destination)["copied_files"] == 0


def test_pairs_of_a_damaged_set_are_not_published(tmp_path):
    publish(f"{tmp_path}/a")
    flip(f"{tmp_path}/a/{SHARD}", 100)
    with pytest.raises(CappyError, match=rf"{SHARD} does not match its SHA-256"):
        export_pairs.export_pairs(f"{tmp_path}/a", f"{tmp_path}/b")
    assert not (tmp_path / "b" / "_MANIFEST.json").exists()


def test_the_memory_of_writing_pairs_does_not_grow_with_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(export_pairs, "_ROW_GROUP_BYTES", 200_000)
    publish(f"{tmp_path}/a", train=(5000,))
    export_pairs.export_pairs(f"{tmp_path}/a", f"{tmp_path}/b")
    parquet = pq.ParquetFile(tmp_path / "b/data/train/part-00000.parquet")
    sizes = [parquet.metadata.row_group(index).num_rows for index in range(parquet.num_row_groups)]
    assert sum(sizes) == 35_000 and max(sizes) <= 2 * 256 * 7


@pytest.mark.parametrize("pairs", [False, True], ids=["set", "pairs"])
def test_hugging_face_and_pandas_open_pushed_and_pulled_data(pairs, tmp_path, bucket):
    publish(f"{tmp_path}/a")
    (export_pairs.export_pairs if pairs else copying.copy_folder)(f"{tmp_path}/a", f"{bucket}/a")
    copying.copy_folder(f"{bucket}/a", f"{tmp_path}/b")
    glob = {split: f"{tmp_path}/b/data/{split}/part-*.parquet" for split in ("train", "validation")}
    opened = datasets.load_dataset("parquet", data_files=glob, cache_dir=str(tmp_path / "cache"))
    frame = pandas.read_parquet(f"{tmp_path}/b/data/train")
    assert opened["train"]["id"] == list(frame["id"]) and len(frame) == (70 if pairs else 10)
    fs, path = storage.filesystem(f"{bucket}/a/data/train")
    assert pandas.read_parquet(path, filesystem=fs).equals(frame)


@pytest.mark.parametrize("push", [export_pairs.export_pairs, copying.copy_folder], ids=["pairs", "set"])
@both
def test_a_second_push_to_one_destination_is_refused(push, place, tmp_path, monkeypatch):
    source, destination = f"{tmp_path}/source", place
    publish(source)
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    with lease.hold(f"{destination}/_lease", "DST"), pytest.raises(CappyError, match=rf"DST={destination}: a run on .* is working there"):
        push(source, destination)
    assert {name.split("/")[0] for name in storage.list_files(destination)} == {"_lease"}
    push(source, destination)
    manifest = artifacts.read_any_manifest(destination, "DST")
    assert set(storage.list_files(destination)) == {*manifest["files"], "_MANIFEST.json"}  # and no lease


@pytest.mark.parametrize("push", [export_pairs.export_pairs, copying.copy_folder], ids=["pairs", "set"])
@both
def test_a_push_that_lost_its_lease_leaves_the_files_of_the_winner(push, place, tmp_path, monkeypatch):
    source, destination = f"{tmp_path}/source", place
    publish(source)
    publish(f"{source}2", train=(2, 2))
    files = {}
    real = copying.CopySession.each

    def paused(session, work, names, threads):
        """After the first copies the process is paused, and another run takes the lease and publishes another set."""
        yield from real(session, work, names, threads)
        if not files:
            files["_"] = b""
            for name in storage.list_files(destination):
                storage.delete(f"{destination}/{name}")
            push(f"{source}2", destination)
            files.update({name: storage.read_bytes(f"{destination}/{name}") for name in storage.list_files(destination)})

    monkeypatch.setattr(copying.CopySession, "each", paused)
    with pytest.raises(CappyError, match=r"lease lost|published by another run meanwhile"):
        push(source, destination)
    assert {"_": b""} | {name: storage.read_bytes(f"{destination}/{name}") for name in storage.list_files(destination)} == files


@pytest.mark.parametrize("push", [export_pairs.export_pairs, copying.copy_folder], ids=["pairs", "set"])
def test_temporary_files_of_a_killed_copy_are_removed(push, tmp_path):
    publish(f"{tmp_path}/a")
    for name in (SHARD, "README.md", "_MANIFEST.json", "_lease/000001.json"):
        folder, _, file = name.rpartition("/")
        storage.write_bytes(f"{tmp_path}/b/{folder}/.{file}.{'0' * 32}", b"cut")
    push(f"{tmp_path}/a", f"{tmp_path}/b")
    manifest = artifacts.read_any_manifest(f"{tmp_path}/b", "DST")
    assert set(storage.list_files(f"{tmp_path}/b")) == {*manifest["files"], "_MANIFEST.json"}
