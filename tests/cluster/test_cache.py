import subprocess
import sys
import tarfile

import pytest

from cluster import cache
from cluster.errors import CappyError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path))
    return tmp_path


def test_an_entry_is_built_once(folder):
    built = []
    for _ in range(2):
        entry = cache.build_once("a/b", lambda target: built.append((target / "f").write_text("x")))
    assert (entry / "f").read_text() == "x"
    assert len(built) == 1


def test_a_failed_build_leaves_nothing(folder):
    with pytest.raises(RuntimeError):
        cache.build_once("a/b", lambda target: (_ for _ in ()).throw(RuntimeError("half way")))
    assert list((folder / "a").iterdir()) == []


def test_concurrent_processes_build_one_complete_entry(folder):
    script = (
        "import time, cluster.cache as c; c.build_once('x', lambda t: ((t/'a').write_text('1'), time.sleep(.3), (t/'b').write_text('2')))"
    )
    racers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0, 0]
    assert sorted(path.name for path in folder.iterdir()) == ["x"]
    assert sorted(path.name for path in (folder / "x").iterdir()) == ["a", "b"]


def test_no_code_of_an_archive_runs_before_its_hash_is_checked(folder, monkeypatch):
    """pip reads the metadata of an sdist by running its build backend. This archive has the right name and another content."""
    source, links, marker = folder / "source", folder / "links", folder / "marker"
    source.mkdir()
    links.mkdir()
    (source / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (source / "backend.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: bigbench\nVersion: 1.0.0\n")
    with tarfile.open(links / "bigbench-1.0.0.tar.gz", "w:gz") as archive:
        archive.add(source, "bigbench-1.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(CappyError) as caught:
        cache.fetch_archive("bigbench")
    assert not marker.exists()
    assert str(caught.value).startswith("bigbench-1.0.0.tar.gz does not have SHA-256 1bb398")
    assert list((folder / "archives").iterdir()) == []
