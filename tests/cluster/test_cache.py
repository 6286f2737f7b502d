import subprocess
import sys

import pytest

from cluster import cache


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
