import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import storage
from cluster.errors import CappyError, UsageError

both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


@both
def test_of_many_racing_writers_exactly_one_creates(place):
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        return storage.create_json(f"{place}/m.json", {"number": number})

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert storage.read_json(f"{place}/m.json")["number"] == won.index(True)


@both
def test_a_folder_without_a_manifest_is_refused(place):
    storage.write_bytes(f"{place}/data/part.parquet", b"x")
    with pytest.raises(CappyError, match=r"has no _MANIFEST.json: the run writing it did not finish; run `cappy generate`"):
        storage.read_manifest(place, "dataset", "generate")


@both
def test_a_published_folder_is_read_verified_and_taken_back(place):
    storage.write_bytes(f"{place}/a/b.bin", b"hello")
    manifest = {"kind": "scorer", "files": storage.checksums(place, ["a/b.bin"])}
    storage.publish(place, manifest)
    assert storage.read_manifest(place, "scorer", "train")["files"]["a/b.bin"]["bytes"] == 5
    assert storage.verify(place, manifest) == []
    with pytest.raises(UsageError, match="already holds a finished run; choose another"):
        storage.refuse_published(place, "scorer_path", "train")
    with pytest.raises(CappyError, match="published by another run"):
        storage.publish(place, manifest)
    with pytest.raises(CappyError, match="holds a scorer, not a dataset"):
        storage.read_manifest(place, "dataset", "generate")
    storage.withdraw(place)
    assert storage.list_files(place) == {}


@both
def test_damage_is_found(place):
    for name in ("same", "gone", "longer", "flipped"):
        storage.write_bytes(f"{place}/{name}", b"hello")
    manifest = {"files": storage.checksums(place, ["same", "gone", "longer", "flipped"])}
    storage.delete(f"{place}/gone")
    storage.write_bytes(f"{place}/longer", b"hello!")
    storage.write_bytes(f"{place}/flipped", b"hallo")
    assert [problem.split()[0] for problem in storage.verify(place, manifest)] == ["gone", "longer", "flipped"]


@both
def test_globs_match_alike_on_disk_and_in_object_storage(place):
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
def test_a_folder_goes_up_and_down_unchanged(place, tmp_path):
    (tmp_path / "up" / "x").mkdir(parents=True)
    (tmp_path / "up" / "x" / "f.gz").write_bytes(b"not really gzip")
    storage.upload_folder(tmp_path / "up", place)
    storage.download_folder(place, tmp_path / "down")
    assert (tmp_path / "down" / "x" / "f.gz").read_bytes() == b"not really gzip"


def test_a_missing_bucket_is_named(bucket):
    with pytest.raises(CappyError, match=r"dataset=s3://no-such-bucket-here/x: bucket 'no-such-bucket-here' does not exist"):
        storage.check("s3://no-such-bucket-here/x", "dataset")


def test_wrong_credentials_are_told_without_being_shown(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-that-must-not-show")
    monkeypatch.setenv("AWS_REGION", "eu-other-1")  # a new region makes a new client
    with pytest.raises(CappyError, match="refused the credentials; check AWS_ACCESS_KEY_ID") as caught:
        storage.check(f"{bucket}/x", "workspace")
    assert "s3cr3t" not in str(caught.value)


def test_an_unreachable_store_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(CappyError, match=r"workspace=s3://b/x: the object store at http://127.0.0.1:9 cannot be reached"):
        storage.check("s3://b/x", "workspace")


def test_other_schemes_are_refused():
    with pytest.raises(UsageError, match="only local paths and s3:// are known"):
        storage.check("gs://bucket/x", "dataset")


class Takeover:
    """A `check` that passes once and, right after it, lets the next run write; then it raises, as a lost lease does."""

    def __init__(self, write):
        self.write, self.passed = write, False

    def __call__(self):
        if self.passed:
            raise CappyError("lease lost")
        self.passed = True
        self.write()


SIZES = pytest.mark.parametrize("size", [5, 20 << 20], ids=["small", "in parts"])


@both
@SIZES
@pytest.mark.parametrize("before", [None, b"of an earlier run"], ids=["new", "replaced"])
def test_a_file_that_the_next_run_wrote_after_the_check_is_not_replaced(place, size, before, tmp_path):
    if before:
        storage.write_bytes(f"{place}/f", before)
    (tmp_path / "mine").write_bytes(bytes(size))
    late = storage.FolderWriter(place, Takeover(lambda: storage.write_bytes(f"{place}/f", b"the winner's")))
    with pytest.raises(CappyError, match="lease lost"):
        late.upload_file(tmp_path / "mine", "f")
    assert storage.read_bytes(f"{place}/f") == b"the winner's"
    assert list(storage.list_files(place)) == ["f"]


@both
@SIZES
def test_files_are_created_and_replaced_by_who_holds_the_lease(place, size, tmp_path):
    folder = storage.FolderWriter(place, lambda: None)
    for content in (bytes(size), b"\1" * size, b"\1" * size):
        (tmp_path / "mine").write_bytes(content)
        entry = folder.upload_file(tmp_path / "mine", "a/f")
        assert storage.verify(place, {"files": {"a/f": entry}}) == []
        assert storage.read_bytes(f"{place}/a/f") == content
    assert list(storage.list_files(place)) == ["a/f"]
    assert folder.write_json("j", {"a": 1}) == storage.checksums(place, ["j"])["j"]
    (tmp_path / "place2").mkdir()
    (tmp_path / "place2" / "mine").write_bytes(content)
    storage.FolderWriter(str(tmp_path / "place2")).upload_file(tmp_path / "place2" / "mine", "f", move=True)
    assert list(storage.list_files(str(tmp_path / "place2"))) == ["f"]


@both
def test_without_a_lease_nothing_is_written_beside_a_manifest_of_another_run(place):
    folder = storage.FolderWriter(place)
    folder.write_bytes("f", b"mine")
    storage.publish(place, {"kind": "evaluation", "files": {}})
    with pytest.raises(CappyError, match="was published by another run meanwhile"):
        folder.write_bytes("f", b"mine again")
    assert storage.read_bytes(f"{place}/f") == b"mine"
