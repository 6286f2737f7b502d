"""Files and object storage behind one URI."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import storage
from cluster.errors import CappyError, UsageError
from tests.faults import KeyStore

both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


@both
def test_exactly_one_of_many_concurrent_writers_creates_a_file(place):
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        return storage.create_json(f"{place}/m.json", {"number": number})

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert storage.read_json(f"{place}/m.json")["number"] == won.index(True)


@both
def test_globs_match_the_same_files_on_disk_and_in_object_storage(place):
    for name in ("a.jsonl", "b.jsonl", "c.txt", "deep/d.jsonl"):
        storage.write_bytes(f"{place}/{name}", b"{}")

    def found(pattern):
        return [uri.removeprefix(f"{place}/") for uri in storage.glob(f"{place}/{pattern}")]

    assert found("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found("**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/d.jsonl"]
    assert found("?.txt") == ["c.txt"]
    assert found("a.jsonl") == ["a.jsonl"]
    assert storage.glob(place) == [f"{place}/{name}" for name in ("a.jsonl", "b.jsonl", "c.txt", "deep/d.jsonl")]


@both
def test_a_folder_is_uploaded_and_downloaded_unchanged(place, tmp_path):
    (tmp_path / "up" / "x").mkdir(parents=True)
    (tmp_path / "up" / "x" / "f.gz").write_bytes(b"not really gzip")
    storage.upload_folder(tmp_path / "up", place)
    storage.download_folder(place, tmp_path / "down")
    assert (tmp_path / "down" / "x" / "f.gz").read_bytes() == b"not really gzip"


def test_a_missing_bucket_is_named(bucket):
    with pytest.raises(CappyError, match=r"dataset=s3://no-such-bucket-here/x: bucket 'no-such-bucket-here' does not exist"):
        storage.check_uri("s3://no-such-bucket-here/x", "dataset")


def test_an_error_about_wrong_credentials_does_not_print_them(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-that-must-not-show")
    monkeypatch.setenv("AWS_REGION", "eu-other-1")  # a new region makes a new client
    with pytest.raises(CappyError, match="refused the credentials; check AWS_ACCESS_KEY_ID") as caught:
        storage.check_uri(f"{bucket}/x", "workspace")
    assert "s3cr3t" not in str(caught.value)


def test_an_unreachable_store_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(CappyError, match=r"workspace=s3://b/x: the object store at http://127.0.0.1:9 cannot be reached"):
        storage.check_uri("s3://b/x", "workspace")


def test_other_schemes_are_refused():
    with pytest.raises(UsageError, match="unsupported scheme; use a local path or s3://"):
        storage.check_uri("gs://bucket/x", "dataset")


@pytest.mark.parametrize("key", ["m//absolute", "m/../../x", "m/a/../../x", "m/./x", "m/a\\b", "m/a\0b", "m/.."])
def test_keys_that_lead_out_of_the_folder_are_refused_before_anything_is_copied(key, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    folder = tmp_path / "a" / "b"
    key = key.replace("/absolute", f"{tmp_path}/outside")
    with KeyStore({key.replace("//", "/"): b"theirs", "m/a.json": b"{}", key: b"theirs"}) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        assert storage.list_files("s3://x/m").keys() >= {"a.json", key.removeprefix("m/")}
        with pytest.raises(CappyError, match=r"s3://x/m names the file .* not within the folder") as caught:
            storage.download_folder("s3://x/m", folder)
    assert repr(key.removeprefix("m/")) in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
