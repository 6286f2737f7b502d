"""Published folders: manifests, foreign files, withdrawal, publication."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest

from cluster import artifacts, storage
from cluster.config import Config
from cluster.errors import CappyError, UsageError

OWNED = artifacts.OwnedFiles("scorer", "train", (r"_work/\d+\.json",), r"_work/1\.json", (r"README\.md", r"data/part-\d\.bin"))


both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


@both
def test_a_folder_without_a_manifest_is_refused(place):
    storage.write_bytes(f"{place}/data/part.parquet", b"x")
    with pytest.raises(CappyError, match=r"has no _MANIFEST.json: the run writing it did not finish; run `cappy generate`"):
        artifacts.read_manifest(place, "dataset", "generate")


@both
def test_a_published_folder_is_read_verified_and_withdrawn(place):
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


def publish(place, *names):
    for name in names:
        storage.write_bytes(f"{place}/{name}", b"ours")
    artifacts.publish(place, {"kind": "scorer", "files": artifacts.checksums(place, names)})


def refused(place, example, **settings):
    """Assert that nothing is deleted because of the file `example`."""
    before = storage.list_files(place)
    message = (
        rf"scorer_path={place} holds files that no `cappy train` wrote, e\.g\. {re.escape(example)}.*: choose another scorer_path, or move"
    )
    with pytest.raises(UsageError, match=message) as caught:
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
    # An unfinished run has checked this before, so the files are its own.
    storage.write_bytes(f"{place}/_work/2.json", b"")
    refused(place, "README.md")
    storage.write_bytes(f"{place}/_work/1.json", b"")
    artifacts.withdraw(place, "scorer_path", OWNED, keep="_work")
    assert storage.list_files(place) == {"_work/1.json": 0, "_work/2.json": 0}


@both
def test_foreign_files_that_a_run_does_not_write_are_accepted_without_overwrite(place):
    for name, way in (("thesis.txt", False), ("data/mine.bin", True), ("_work/mine", True), ("README.md", True)):
        storage.write_bytes(f"{place}/{name}", b"theirs")
        if way:
            with pytest.raises(UsageError, match=rf"e\.g\. {name}; nothing was deleted"):
                artifacts.refuse_foreign(place, "scorer_path", OWNED, overwrite=False)
        else:
            artifacts.refuse_foreign(place, "scorer_path", OWNED, overwrite=False)
        storage.delete(f"{place}/{name}")


def test_a_bucket_with_foreign_files_is_not_emptied(bucket):
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
@pytest.mark.parametrize(
    ("manifest", "message"), [({"kind": "dataset", "files": {}}, "holds a dataset, not a scorer"), ([], "not readable")]
)
def test_the_files_of_another_verb_are_not_deleted(place, manifest, message):
    storage.write_json(f"{place}/_MANIFEST.json", manifest)
    with pytest.raises(UsageError, match=rf"scorer_path={place} .*{message}.*nothing was deleted: choose another scorer_path"):
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


def test_a_destination_that_is_a_symbolic_link_is_withdrawn_at_its_target(tmp_path):
    publish(str(tmp_path / "disk"), "README.md", "data/part-0.bin")
    (tmp_path / "place").symlink_to(tmp_path / "disk")
    artifacts.withdraw(str(tmp_path / "place"), "scorer_path", OWNED)
    assert list((tmp_path / "disk").iterdir()) == [] and (tmp_path / "place").is_symlink()


def test_temporary_files_and_empty_folders_are_deleted_and_other_files_kept(tmp_path):
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


@both
def test_publish_folder_writes_a_manifest_that_reads_back(place):
    entry = storage.write_bytes(f"{place}/f", b"x")
    order = []

    def describe(uri, manifest):
        order.append("describe")
        return {**manifest, "files": {**manifest["files"], "README.md": storage.write_bytes(f"{uri}/README.md", b"card")}}

    artifacts.publish_folder(
        place,
        "scorer",
        files={"f": entry},
        summary={"steps": 3},
        config=Config(),
        encoder="minilm-l6",
        describe=describe,
        check=lambda: order.append("check"),
    )
    manifest = artifacts.read_manifest(place, "scorer", "train")
    assert order == ["describe", "check"] and set(manifest["files"]) == {"f", "README.md"}
    assert manifest["encoder"] == "minilm-l6" and manifest["summary"] == {"steps": 3} and manifest["version"] == 1
    assert Config.model_validate(manifest["config"]) == Config()
    assert datetime.fromisoformat(manifest["created"]).tzinfo == UTC and manifest["code_version"]
    assert artifacts.verify(place, manifest) == []
    with pytest.raises(CappyError, match="was published by another run meanwhile"):
        artifacts.publish_folder(place, "scorer", files={}, summary={}, config={})


def test_a_folder_is_not_published_if_the_check_raises(tmp_path):
    def lost():
        raise CappyError("lease lost")

    with pytest.raises(CappyError, match="lease lost"):
        artifacts.publish_folder(str(tmp_path), "scorer", files={}, summary={}, config={}, check=lost)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [{"f": {}}, {"f": {"bytes": "1", "sha256": "0"}}, {"f": 3}, []], ids=str)
def test_a_manifest_with_invalid_entries_is_refused(files, tmp_path):
    storage.write_json(f"{tmp_path}/_MANIFEST.json", {"kind": "scorer", "files": files})
    with pytest.raises(CappyError, match=r"is not a valid manifest: it was changed after it was published"):
        artifacts.read_manifest(str(tmp_path), "scorer", "train")
    with pytest.raises(CappyError, match=r"URI=.* has no readable _MANIFEST.json"):
        artifacts.read_any_manifest(str(tmp_path), "URI")


def test_unknown_keys_of_a_manifest_are_kept(tmp_path):
    tree = {"kind": "a later kind", "files": {}, "later": {"key": 1}}
    storage.write_json(f"{tmp_path}/_MANIFEST.json", tree)
    assert artifacts.read_any_manifest(str(tmp_path), "URI") == tree


def test_the_publication_of_a_folder_removes_the_temporary_files_of_killed_runs(tmp_path):
    names = ["README.md", "data/part-1.bin", "_MANIFEST.json"]
    for name in ["README.md", "data/part-1.bin"]:
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    for name in (*names, "thesis.txt"):
        folder, _, file = name.rpartition("/")
        storage.write_bytes(f"{tmp_path}/{folder}/.{file}.{'0' * 32}", b"cut")
    files = artifacts.checksums(str(tmp_path), names[:2])
    artifacts.publish_folder(str(tmp_path), "scorer", files=files, summary={}, config={})
    assert set(storage.list_files(str(tmp_path))) == {*names, f".thesis.txt.{'0' * 32}"}  # not a file of the manifest
