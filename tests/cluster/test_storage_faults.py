"""Whole objects on a faulty network: they arrive unchanged, or the call raises a clear error."""

import os

import pytest

from cluster import folder_writer, s3, storage
from cluster.errors import CappyError
from generation.sources import files
from tests.faults import KINDS, FaultyProxy


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_transfers_of_objects_are_repeated(kind, bucket, monkeypatch):
    objects = {f"{bucket}/o/{number}": os.urandom(20_000) for number in range(12)}
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], (kind,), rate=0.3, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for uri, data in objects.items():
            storage.write_bytes(uri, data)
        assert {uri: storage.read_bytes(uri) for uri in objects} == objects
        assert proxy.spoiled[kind] >= 3


def test_a_file_is_uploaded_and_downloaded_complete(bucket, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], KINDS, rate=0.3, seed=5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        entry = storage.upload_file(tmp_path / "file", f"{bucket}/file")
        for _ in range(5):
            assert storage.download_file(f"{bucket}/file", tmp_path / "copy") == entry["sha256"]
        assert sum(proxy.spoiled.values()) >= 2


@pytest.mark.parametrize("kind", ["unavailable", "reset", "lost_answer", "truncated"])
def test_listing_and_deleting_are_repeated(kind, bucket, monkeypatch):
    names = [f"d/{number:02d}" for number in range(6)]
    for name in [*names, "d2"]:
        storage.write_bytes(f"{bucket}/o/{name}", b"x")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], (kind,), rate=0.4, seed=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for _ in range(4):
            assert list(storage.list_files(f"{bucket}/o")) == [*names, "d2"]
            assert storage.exists(f"{bucket}/o/d") and storage.exists(f"{bucket}/o/d2") and not storage.exists(f"{bucket}/o/d/0")
        storage.delete(f"{bucket}/o/d")
        assert list(storage.list_files(f"{bucket}/o")) == ["d2"] and not storage.exists(f"{bucket}/o/d")
        assert proxy.spoiled[kind] >= 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "rows.json"])
def test_a_source_from_another_tool_is_read_complete_on_a_faulty_network(name, bucket, monkeypatch, tmp_path):
    import boto3
    import pandas

    rows = pandas.DataFrame({"instruction": [f"say {number}" for number in range(200)], "reference": ["x"] * 200})
    {
        "rows.jsonl": lambda path: rows.to_json(path, orient="records", lines=True),
        "rows.json": lambda path: rows.to_json(path, orient="records"),
        "rows.csv": lambda path: rows.to_csv(path, index=False),
        "rows.parquet": rows.to_parquet,
    }[name](tmp_path / name)
    boto3.client("s3", region_name="us-east-1").upload_file(tmp_path / name, bucket.removeprefix("s3://"), name)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], ("truncated", "flipped_answer"), rate=0.5, seed=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for _ in range(4):
            assert [row for _, row in files.read_rows(f"{bucket}/{name}")] == rows.to_dict("records")
        assert sum(proxy.spoiled.values()) >= 2


@pytest.mark.parametrize("kind", ["unavailable", "reset", "lost_answer", "flipped_request"])
def test_exactly_one_of_many_writers_succeeds_on_a_faulty_network(kind, bucket, monkeypatch):
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], (kind,), rate=0.4, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for number in range(6):
            assert [storage.create_json(f"{bucket}/{number}.json", {"by": writer}) for writer in "ab"] == [True, False]
            assert storage.read_json(f"{bucket}/{number}.json")["by"] == "a"
        assert proxy.spoiled[kind] >= 3


def test_the_error_for_a_store_without_answers_names_store_and_object(bucket, monkeypatch):
    monkeypatch.setattr(s3, "_ATTEMPTS", 2)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], ("unavailable",), rate=1.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(CappyError, match=rf"^{bucket}/o: the object store at {proxy.url} cannot be reached"):
            storage.read_bytes(f"{bucket}/o")


@pytest.mark.parametrize("kind", ["unavailable", "reset", "lost_answer", "flipped_request"])
def test_a_conditional_write_succeeds_once_on_a_faulty_network(kind, bucket, monkeypatch, tmp_path):
    folder = folder_writer.FolderWriter(bucket, lambda: None)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], (kind,), rate=0.3, seed=6) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for size in (20_000, 20_000, 18 << 20, 18 << 20):
            (tmp_path / "file").write_bytes(os.urandom(size))
            entry = folder.upload_file(tmp_path / "file", "f")
            assert entry["sha256"] == storage.sha256(f"{bucket}/f")
        assert proxy.spoiled[kind] >= 3
