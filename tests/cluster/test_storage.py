import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import artifacts, folder_writer, storage
from cluster.errors import CappyError, UsageError
from tests.faults import KeyStore

OWNED = artifacts.OwnedFiles("scorer", "train", (r"_work/\d+\.json",), r"_work/1\.json", (r"README\.md", r"data/part-\d\.bin"))
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
        artifacts.read_manifest(place, "dataset", "generate")


@both
def test_a_published_folder_is_read_verified_and_taken_back(place):
    storage.write_bytes(f"{place}/a/b.bin", b"hello")
    manifest = {"kind": "scorer", "files": artifacts.checksums(place, ["a/b.bin"])}
    artifacts.publish(place, manifest)
    assert artifacts.read_manifest(place, "scorer", "train")["files"]["a/b.bin"]["bytes"] == 5
    assert artifacts.verify(place, manifest) == []
    with pytest.raises(UsageError, match="already holds a finished run; choose another"):
        artifacts.refuse_published(place, "scorer_path", "train")
    with pytest.raises(CappyError, match="published by another run"):
        artifacts.publish(place, manifest)
    with pytest.raises(CappyError, match="holds a scorer, not a dataset"):
        artifacts.read_manifest(place, "dataset", "generate")
    artifacts.withdraw(place, "scorer_path", OWNED)
    assert storage.list_files(place) == {}


@both
def test_damage_is_found(place):
    for name in ("same", "gone", "longer", "flipped"):
        storage.write_bytes(f"{place}/{name}", b"hello")
    manifest = {"files": artifacts.checksums(place, ["same", "gone", "longer", "flipped"])}
    storage.delete(f"{place}/gone")
    storage.write_bytes(f"{place}/longer", b"hello!")
    storage.write_bytes(f"{place}/flipped", b"hallo")
    assert [problem.split()[0] for problem in artifacts.verify(place, manifest)] == ["gone", "longer", "flipped"]


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
        storage.check_uri("s3://no-such-bucket-here/x", "dataset")


def test_wrong_credentials_are_told_without_being_shown(bucket, monkeypatch):
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
    with pytest.raises(UsageError, match="only local paths and s3:// are known"):
        storage.check_uri("gs://bucket/x", "dataset")


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
    late = folder_writer.FolderWriter(place, Takeover(lambda: storage.write_bytes(f"{place}/f", b"the winner's")))
    with pytest.raises(CappyError, match="lease lost"):
        late.upload_file(tmp_path / "mine", "f")
    assert storage.read_bytes(f"{place}/f") == b"the winner's"
    assert list(storage.list_files(place)) == ["f"]


@both
@SIZES
def test_files_are_created_and_replaced_by_who_holds_the_lease(place, size, tmp_path):
    folder = folder_writer.FolderWriter(place, lambda: None)
    for content in (bytes(size), b"\1" * size, b"\1" * size):
        (tmp_path / "mine").write_bytes(content)
        entry = folder.upload_file(tmp_path / "mine", "a/f")
        assert artifacts.verify(place, {"files": {"a/f": entry}}) == []
        assert storage.read_bytes(f"{place}/a/f") == content
    assert list(storage.list_files(place)) == ["a/f"]
    assert folder.write_json("j", {"a": 1}) == artifacts.checksums(place, ["j"])["j"]
    (tmp_path / "place2").mkdir()
    (tmp_path / "place2" / "mine").write_bytes(content)
    folder_writer.FolderWriter(str(tmp_path / "place2")).upload_file(tmp_path / "place2" / "mine", "f", move=True)
    assert list(storage.list_files(str(tmp_path / "place2"))) == ["f"]


@both
def test_without_a_lease_nothing_is_written_beside_a_manifest_of_another_run(place):
    folder = folder_writer.FolderWriter(place)
    folder.write_bytes("f", b"mine")
    artifacts.publish(place, {"kind": "evaluation", "files": {}})
    with pytest.raises(CappyError, match="was published by another run meanwhile"):
        folder.write_bytes("f", b"mine again")
    assert storage.read_bytes(f"{place}/f") == b"mine"


def publish(place, *names):
    for name in names:
        storage.write_bytes(f"{place}/{name}", b"ours")
    artifacts.publish(place, {"kind": "scorer", "files": artifacts.checksums(place, names)})


def refused(place, example, **settings):
    """Assert that nothing is deleted because of the file `example`."""
    before = storage.list_files(place)
    told = (
        rf"scorer_path={place} holds files that no `cappy train` wrote, e\.g\. {re.escape(example)}.*: choose another scorer_path, or move"
    )
    with pytest.raises(UsageError, match=told) as caught:
        artifacts.withdraw(place, "scorer_path", OWNED, **settings)
    assert "\n" not in str(caught.value)
    assert storage.list_files(place) == before


@both
@pytest.mark.parametrize("name", ["thesis.txt", "data/mine.bin", "data/deep/part-1.bin", "_work/thesis.txt", ".thesis.txt", "a\nb.txt"])
def test_a_folder_with_anothers_file_is_not_emptied(place, name):
    publish(place, "README.md", "data/part-0.bin", "_work/1.json")
    storage.write_bytes(f"{place}/{name}", b"theirs")
    refused(place, repr(name) if "\n" in name else name)


@both
def test_a_folder_without_a_manifest_is_not_emptied_of_files_with_common_names(place):
    storage.write_bytes(f"{place}/README.md", b"theirs")
    refused(place, "README.md")
    with pytest.raises(UsageError, match=r"e\.g\. README\.md"):
        artifacts.refuse_foreign(place, "scorer_path", OWNED, overwrite=False)
    # A run that has begun checked this before, so then they are its own.
    storage.write_bytes(f"{place}/_work/2.json", b"")
    refused(place, "README.md")
    storage.write_bytes(f"{place}/_work/1.json", b"")
    artifacts.withdraw(place, "scorer_path", OWNED, keep="_work")
    assert storage.list_files(place) == {"_work/1.json": 0, "_work/2.json": 0}


@both
def test_files_that_are_not_in_the_way_may_stay_beside_a_new_run(place):
    for name, way in (("thesis.txt", False), ("data/mine.bin", True), ("_work/mine", True), ("README.md", True)):
        storage.write_bytes(f"{place}/{name}", b"theirs")
        if way:
            with pytest.raises(UsageError, match=rf"e\.g\. {name}; nothing was deleted"):
                artifacts.refuse_foreign(place, "scorer_path", OWNED, overwrite=False)
        else:
            artifacts.refuse_foreign(place, "scorer_path", OWNED, overwrite=False)
        storage.delete(f"{place}/{name}")


def test_a_bucket_of_others_is_not_emptied(bucket):
    for name in ("photos/cat.jpg", "README.md", "data/part-0.bin"):
        storage.write_bytes(f"{bucket}/{name}", b"theirs")
    refused(bucket, "README.md")


@both
@pytest.mark.parametrize("name", ["../outside", "data/../../outside", "/outside", "a//b", "", "a\\b", "a\0b"])
def test_a_manifest_that_names_files_outside_its_folder_deletes_none(place, name):
    storage.write_bytes(f"{place}/../outside" if not storage.is_s3(place) else f"{place.removesuffix('/place')}/outside", b"theirs")
    publish(place, "README.md")
    manifest = storage.read_json(f"{place}/_MANIFEST.json")
    storage.write_json(f"{place}/_MANIFEST.json", {**manifest, "files": {**manifest["files"], name: {"bytes": 6, "sha256": "0"}}})
    before = storage.list_files(place)
    with pytest.raises(CappyError, match=r"_MANIFEST\.json names the file .* not within the folder") as caught:
        artifacts.withdraw(place, "scorer_path", OWNED)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
    assert storage.list_files(place) == before
    assert storage.exists(storage.join(place.rsplit("/", 1)[0], "outside"))
    with pytest.raises(CappyError, match="not within the folder"):
        artifacts.read_manifest(place, "scorer", "train")


@both
@pytest.mark.parametrize(("manifest", "told"), [({"kind": "dataset", "files": {}}, "holds a dataset, not a scorer"), ([], "not readable")])
def test_what_another_verb_published_is_not_deleted(place, manifest, told):
    storage.write_json(f"{place}/_MANIFEST.json", manifest)
    with pytest.raises(UsageError, match=rf"scorer_path={place} .*{told}.*nothing was deleted: choose another scorer_path"):
        artifacts.withdraw(place, "scorer_path", OWNED)
    assert storage.exists(f"{place}/_MANIFEST.json")


def test_symbolic_links_are_never_followed(tmp_path):
    place, outside = tmp_path / "place", tmp_path / "outside"
    outside.mkdir()
    (outside / "part-0.bin").write_bytes(b"theirs")
    publish(str(place), "README.md", "data/part-0.bin")
    (place / "data").rename(tmp_path / "moved")
    (place / "data").symlink_to(outside)
    refused(str(place), "data")
    (place / "data").unlink()
    (place / "data").mkdir()
    (place / "data" / "part-0.bin").symlink_to(outside / "part-0.bin")
    refused(str(place), "data/part-0.bin")
    assert (outside / "part-0.bin").read_bytes() == b"theirs"


def test_a_destination_that_is_a_link_itself_is_withdrawn_where_it_leads(tmp_path):
    publish(str(tmp_path / "disk"), "README.md", "data/part-0.bin")
    (tmp_path / "place").symlink_to(tmp_path / "disk")
    artifacts.withdraw(str(tmp_path / "place"), "scorer_path", OWNED)
    assert list((tmp_path / "disk").iterdir()) == [] and (tmp_path / "place").is_symlink()


def test_what_atomic_writes_left_and_empty_folders_go_and_others_stay(tmp_path):
    publish(str(tmp_path), "README.md", "data/part-0.bin")
    for name in (".README.md.", "data/.part-0.bin.", "._MANIFEST.json.", "_work/.7.json."):
        storage.write_bytes(f"{tmp_path}/{name}{'0f' * 16}", b"half")
    (tmp_path / "empty").mkdir()
    artifacts.withdraw(str(tmp_path), "scorer_path", OWNED)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    storage.write_bytes(f"{tmp_path}/.thesis.txt.{'0f' * 16}", b"theirs")
    refused(str(tmp_path), f".thesis.txt.{'0f' * 16}")


@both
@pytest.mark.parametrize("again", ["withdraw", "run"])
def test_a_withdrawal_that_was_interrupted_is_completed(place, again, monkeypatch):
    publish(place, "README.md", "data/part-0.bin", "results.txt")
    with monkeypatch.context() as patch:
        done = artifacts._delete_files_and_empty_folders

        def interrupted(uri, names):
            if names != [artifacts.MANIFEST]:
                raise KeyboardInterrupt
            done(uri, names)

        patch.setattr(artifacts, "_delete_files_and_empty_folders", interrupted)
        with pytest.raises(KeyboardInterrupt):
            artifacts.withdraw(place, "scorer_path", OWNED)
    assert not storage.exists(f"{place}/_MANIFEST.json") and storage.exists(f"{place}/results.txt")
    if again == "withdraw":
        artifacts.withdraw(place, "scorer_path", OWNED)
    else:
        artifacts.refuse_foreign(place, "scorer_path", OWNED, overwrite=False)
        artifacts.finish_withdrawal(place, "scorer_path", OWNED)
    assert storage.list_files(place) == {}


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
