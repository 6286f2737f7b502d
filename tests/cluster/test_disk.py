"""Writes on a full disk, and the order of syncs, so that a power loss leaves no published folder with empty files."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from cluster import artifacts, cache, copying, disk, folder_writer, lease, storage
from cluster.errors import CappyError, find_disk_error
from tests.conftest import cappy
from tests.generation.made_set import publish

WRITES = {
    "write_bytes": lambda folder, source: storage.write_bytes(f"{folder}/a/f", source.read_bytes()),
    "upload_file": lambda folder, source: storage.upload_file(source, f"{folder}/a/f"),
    "create_json": lambda folder, source: storage.create_json(f"{folder}/a/f", {"text": "x" * 50_000}),
    "download_file": lambda folder, source: storage.download_file(str(source), folder / "a" / "f"),
    "FolderWriter.write_bytes": lambda folder, source: folder_writer.FolderWriter(str(folder)).write_bytes("a/f", source.read_bytes()),
    "FolderWriter.upload_file": lambda folder, source: folder_writer.FolderWriter(str(folder)).upload_file(source, "a/f"),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_write_to_a_full_disk_names_the_path_and_leaves_no_file(kind, small_disk, tmp_path):
    (tmp_path / "source").write_bytes(bytes(50_000))
    small_disk.fill()
    with pytest.raises(CappyError, match=rf"^{small_disk.folder}/a/f cannot be written \(No space left on device\); free some space there"):
        WRITES[kind](small_disk.folder, tmp_path / "source")
    if kind != "download_file":  # its folder is temporary
        assert small_disk.files() == []
    small_disk.free()
    WRITES[kind](small_disk.folder, tmp_path / "source")
    assert small_disk.files() == ["a/f"]


def test_a_write_to_a_folder_that_is_a_file_names_the_path(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(CappyError, match=rf"^{tmp_path}/a/b cannot be written \(.*\); check the disk and its permissions"):
        storage.write_bytes(f"{tmp_path}/a/b", b"y")


def test_a_full_temporary_folder_is_named(small_disk, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk.folder))
    error = rf"^TMPDIR={small_disk.folder} cannot be written \(No space left"
    with pytest.raises(CappyError, match=error), storage.temporary_folder("x") as folder:
        (folder / "large").write_bytes(bytes(1 << 20))
    assert small_disk.files() == []


def test_other_errors_than_those_of_a_disk_are_not_renamed(tmp_path):
    assert find_disk_error(OSError(errno.ENOENT, "x")) is None and find_disk_error(ValueError("x")) is None
    with pytest.raises(FileNotFoundError), storage.temporary_folder("x") as folder:
        (folder / "a" / "b").read_bytes()


def test_the_heartbeat_survives_a_full_disk_and_no_other_run_takes_the_lease(small_disk, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    place = f"{small_disk.folder}/_lease"
    with lease.hold(place, "dataset=x") as held:
        small_disk.fill()
        deadline = time.monotonic() + 30
        while not held._failure and time.monotonic() < deadline:
            time.sleep(0.01)
        assert f"{place}/000001.json cannot be written (No space left on device)" in held._failure
        small_disk.free()
        beat = storage.read_json(f"{place}/000001.json")["beat"]
        with pytest.raises(CappyError, match="is working there"), lease.hold(place, "dataset=x"):
            raise AssertionError("two hold it")
        assert storage.read_json(f"{place}/000001.json")["beat"] > beat
        held.check()


def test_a_run_that_failed_on_a_full_disk_releases_its_lease(small_disk):
    with lease.hold(f"{small_disk.folder}/_lease", "dataset=x"):
        small_disk.fill()
    start = time.monotonic()
    small_disk.free()
    with lease.hold(f"{small_disk.folder}/_lease", "dataset=x"):
        assert time.monotonic() - start < lease.TIMEOUT_S / 2


def test_a_lease_that_a_full_disk_ended_names_the_path(small_disk, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "TIMEOUT_S", 0.5)
    with lease.hold(str(small_disk.folder), "dataset=x") as held:
        small_disk.fill()
        deadline = time.monotonic() + 30
        while held._thread.is_alive() and time.monotonic() < deadline and held._clock() - held._last < 1:
            time.sleep(0.05)
        error = rf"the last heartbeat failed: {small_disk.folder}/000001.json cannot be written \(No space"
        with pytest.raises(lease.LeaseLost, match=error):
            held.check(read_store=False)


def test_a_pull_to_a_full_disk_names_the_path_and_resumes(small_disk, tmp_path):
    manifest = publish(f"{tmp_path}/set", letters="x" * 60_000 + "\n")
    small_disk.fill()
    with (small_disk.folder / "filler").open("r+b") as filler:
        filler.truncate(210_000)  # room for some of the files
    command = ("pull", f"{tmp_path}/set", f"{small_disk.folder}/copy")
    failed = cappy(*command)
    assert failed.returncode == 1 and f"{small_disk.folder}/copy/" in failed.stderr and "(No space left on device)" in failed.stderr
    assert "bug" not in failed.stderr and "Traceback" not in failed.stderr and "_MANIFEST.json" not in small_disk.files()
    small_disk.free()
    assert cappy(*command).returncode == 0
    assert small_disk.files() == sorted(f"copy/{name}" for name in (*manifest["files"], "_MANIFEST.json"))


@pytest.fixture
def log(monkeypatch):
    """The calls of fsync, rename and link, in order; each is carried out too."""
    calls: list[tuple[str, str]] = []

    def record(name, path_of):
        real = getattr(os, name)

        def call(*arguments, **options):
            calls.append((name, path_of(*arguments)))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    record("fsync", lambda descriptor: str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    for name in ("replace", "rename", "link"):
        record(name, lambda old, new, **_: f"{old} -> {new}")
    return calls


def check_order(calls, folder, files):
    """Check that all files below a folder, then its manifest, are synced with their folders."""
    named = {}
    for index, (name, path) in enumerate(calls):
        if name != "fsync" and path.split(" -> ")[1].startswith(f"{folder}/"):
            temporary, final = path.split(" -> ")
            assert ("fsync", temporary) in calls[:index], f"{final} got its name before its content was synced"
            assert ("fsync", str(Path(final).parent)) in calls[index:], f"the folder of {final} was not synced"
            named[Path(final).relative_to(folder).as_posix()] = index
    manifest = named["_MANIFEST.json"]
    for file in files:
        assert ("fsync", str(Path(folder, file).parent)) in calls[named[file] : manifest], f"{file} can be missing beside the manifest"
        for parent in Path(file).parents:  # each new folder is an entry of the folder above it
            assert ("fsync", str(Path(folder, parent).parent)) in calls[:manifest]


def test_files_then_folders_then_the_manifest_are_synced(log, tmp_path):
    folder = tmp_path / "a" / "set"
    manifest = publish(str(folder))
    check_order(log, folder, manifest["files"])
    log.clear()
    copying.copy_folder(str(folder), str(tmp_path / "b" / "copy"))
    check_order(log, tmp_path / "b" / "copy", manifest["files"])


def test_an_uploaded_folder_is_synced_before_its_manifest(log, tmp_path):
    (tmp_path / "model" / "data").mkdir(parents=True)
    for name in ("model.safetensors", "data/x"):
        (tmp_path / "model" / name).write_bytes(b"weights")
    folder = tmp_path / "scorer"
    files = folder_writer.FolderWriter(str(folder)).upload_folder(tmp_path / "model")
    storage.upload_file(tmp_path / "model" / "data" / "x", f"{folder}/data/y")
    artifacts.publish(str(folder), {"kind": "scorer", "files": files})
    check_order(log, folder, [*files, "data/y"])


def test_a_cached_folder_is_synced_before_it_gets_its_name(log, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    cache.build_once("models/m", lambda target: (target / "weights").write_bytes(b"x") and None)
    renamed = next(index for index, (name, path) in enumerate(log) if name != "fsync" and path.endswith("models/m"))
    temporary = log[renamed][1].split(" -> ")[0]
    assert {("fsync", f"{temporary}/weights"), ("fsync", temporary)} <= set(log[:renamed])
    assert ("fsync", str(tmp_path / "models")) in log[renamed:]


def test_a_filesystem_that_cannot_sync_folders_is_usable(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_bytes(f"{tmp_path}/a/f", b"x")
    assert storage.read_bytes(f"{tmp_path}/a/f") == b"x"


def test_the_temporary_name_of_a_file():
    assert disk.final_name(f"data/train/.part-1.parquet.{'0a' * 16}") == "data/train/part-1.parquet"
    assert disk.final_name("data/train/part-1.parquet") is disk.final_name(".hidden") is None
