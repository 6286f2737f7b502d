"""What object storage does to whole objects when the wire is bad: the same bytes, or a clear refusal."""

import os

import pytest

from cluster import storage
from cluster.errors import CappyError
from tests.faults import KINDS, FaultyProxy


@pytest.mark.parametrize("kind", KINDS)
def test_objects_arrive_whole_or_are_asked_for_again(kind, bucket, monkeypatch):
    objects = {f"{bucket}/o/{number}": os.urandom(20_000) for number in range(12)}
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], (kind,), rate=0.3, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for uri, data in objects.items():
            storage.write_bytes(uri, data)
        assert {uri: storage.read_bytes(uri) for uri in objects} == objects
        assert proxy.spoiled[kind] >= 3


def test_a_file_goes_up_and_down_whole(bucket, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], KINDS, rate=0.3, seed=5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        entry = storage.upload_file(tmp_path / "file", f"{bucket}/file")
        for _ in range(5):
            assert storage.download_file(f"{bucket}/file", tmp_path / "copy") == entry["sha256"]
        assert sum(proxy.spoiled.values()) >= 2


@pytest.mark.parametrize("kind", ["unavailable", "reset", "lost_answer", "flipped_request"])
def test_of_many_writers_of_one_file_exactly_one_wins_on_a_bad_wire(kind, bucket, monkeypatch):
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], (kind,), rate=0.4, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for number in range(6):
            assert [storage.create_json(f"{bucket}/{number}.json", {"by": writer}) for writer in "ab"] == [True, False]
            assert storage.read_json(f"{bucket}/{number}.json")["by"] == "a"
        assert proxy.spoiled[kind] >= 3


def test_a_store_that_never_answers_is_named_and_so_is_the_object(bucket, monkeypatch):
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], ("unavailable",), rate=1.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(CappyError, match=rf"^{bucket}/o: the object store at {proxy.url} cannot be reached"):
            storage.read_bytes(f"{bucket}/o")
