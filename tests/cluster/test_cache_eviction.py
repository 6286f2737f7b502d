"""The size limit of the cached models, and copies that must stay: those in use."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from cluster import cache, cache_eviction
from cluster.errors import CappyError, UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    monkeypatch.setattr(cache_eviction, "_used", {})
    return tmp_path / "models" / "s3"


def add(folder, name, size, age):
    """Make an entry that no process uses, last used `age` seconds ago."""
    (folder / name).mkdir(parents=True)
    (folder / name / "weights").write_bytes(bytes(size))
    lock = folder / f".{name}.lock"
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_the_least_recently_used_entries_are_deleted_up_to_the_limit(folder, monkeypatch, capfd):
    for name, age in (("old", 300), ("older", 400), ("new", 10), ("newer", 5)):
        add(folder, name, 100, age)
    monkeypatch.setenv("CAPPY_CACHE_LIMIT_GB", str(400e-9))
    cache_eviction.make_room(folder, 0)
    assert names(folder) == ["new", "newer", "old", "older"]
    cache_eviction.make_room(folder, 150)
    assert names(folder) == ["new", "newer"] and not (folder / ".old.lock").exists()
    assert f"cache: deleted {folder}/older" in capfd.readouterr().err
    cache_eviction.make_room(folder, 10_000)  # larger than the limit: everything else goes
    assert names(folder) == []


def test_an_entry_without_a_record_of_its_use_has_the_age_of_its_folder(folder, monkeypatch):
    add(folder, "a", 100, 10)
    (folder / "b").mkdir()  # of an older version
    (folder / "b" / "weights").write_bytes(bytes(100))
    os.utime(folder / "b", (time.time() - 100,) * 2)
    monkeypatch.setenv("CAPPY_CACHE_LIMIT_GB", str(150e-9))
    cache_eviction.make_room(folder, 0)
    assert names(folder) == ["a"]


def test_an_entry_that_this_process_uses_is_not_deleted(folder, monkeypatch):
    for name in ("a", "b"):
        add(folder, name, 100, 100)
    cache_eviction.use(folder / "a", "s3://bucket/model")
    os.utime(folder / ".a.lock", (time.time() - 1000,) * 2)
    monkeypatch.setenv("CAPPY_CACHE_LIMIT_GB", "0")
    cache_eviction.make_room(folder, 100)
    assert names(folder) == ["a"]
    cache_eviction.use(folder / "c", "s3://bucket/model")  # a new version of the same model
    cache_eviction.make_room(folder, 100)
    assert names(folder) == []


def test_an_entry_that_another_process_uses_is_deleted_after_its_end(folder, monkeypatch):
    add(folder, "a", 100, 100)
    imports = "from cluster import cache_eviction\nfrom pathlib import Path\n"
    use = f"{imports}cache_eviction.use(Path({str(folder / 'a')!r}), 'm')\nprint(1, flush=True)\ninput()"
    monkeypatch.setenv("CAPPY_CACHE_LIMIT_GB", "0")
    with subprocess.Popen([sys.executable, "-c", use], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        cache_eviction.make_room(folder, 0)
        assert names(folder) == ["a"]
        other.kill()
        other.wait()
    cache_eviction.make_room(folder, 0)
    assert names(folder) == []


def test_the_default_limit_is_half_of_the_disk_and_a_wrong_limit_is_an_error(folder, monkeypatch, small_disk):
    monkeypatch.delenv("CAPPY_CACHE_LIMIT_GB", raising=False)
    place = small_disk.folder / "s3"
    for name, age in (("a", 20), ("b", 10)):
        add(place, name, 60 << 10, age)
    cache_eviction.make_room(place, 0)
    assert names(place) == ["a", "b"]
    cache_eviction.make_room(place, 16 << 10)
    assert names(place) == ["b"]
    for wrong in ("ten", "-1", "nan", "inf"):
        monkeypatch.setenv("CAPPY_CACHE_LIMIT_GB", wrong)
        with pytest.raises(UsageError, match=rf"CAPPY_CACHE_LIMIT_GB={wrong} is not a size; give the number of gigabytes"):
            cache_eviction.make_room(place, 0)


def test_temporary_folders_of_dead_processes_are_removed_and_those_of_live_processes_stay(folder, monkeypatch):
    monkeypatch.setattr(cache, "_ABANDONED_S", 0.0)
    build = (
        "from cluster import cache\n"
        "def build(target):\n    (target / 'part').write_bytes(b'x'); print(target, flush=True); input()\n"
        "cache.build_once('models/s3/other', build)"
    )
    command = [sys.executable, "-c", build]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as other:
        temporary = other.stdout.readline().strip()
        cache.build_once("models/s3/a", lambda target: None)
        assert os.path.exists(temporary)  # noqa: PTH110
        other.kill()
        other.wait()
    cache.build_once("models/s3/b", lambda target: None)
    assert not os.path.exists(temporary)  # noqa: PTH110
    assert names(folder) == ["a", "b"]


def test_a_build_that_fails_leaves_nothing(folder):
    def build(target):
        (target / "part").write_bytes(b"x")
        raise CappyError("broken")

    with pytest.raises(CappyError, match="broken"):
        cache.build_once("models/s3/a", build)
    assert list(folder.iterdir()) == []
