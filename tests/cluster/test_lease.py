import subprocess
import sys
import time

import pytest

from cluster import lease, storage
from cluster.errors import CappyError

both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "SILENCE_S", 1.0)


@both
def test_while_one_run_lives_another_is_refused_and_afterwards_let_in(place):
    with (
        lease.held(place, "dataset=x") as first,
        pytest.raises(CappyError, match=r"dataset=x: a run on .* is working there; wait for it, stop it"),
        lease.held(place, "dataset=x"),
    ):
        raise AssertionError("two hold it")
    first.check()
    start = time.monotonic()
    with lease.held(place, "dataset=x"):
        assert time.monotonic() - start < 1


def test_a_killed_process_of_this_machine_is_succeeded_at_once(tmp_path):
    take = f"from cluster import lease\nlease.held({str(tmp_path)!r}, 'x').__enter__()\nimport os; os._exit(9)"
    assert subprocess.run([sys.executable, "-c", take]).returncode == 9
    assert storage.read_json(f"{tmp_path}/000001.json")["beat"] == 0
    start = time.monotonic()
    with lease.held(str(tmp_path), "x"):
        assert time.monotonic() - start < 1


def test_a_silent_run_elsewhere_is_succeeded_after_a_while_and_learns_of_it(tmp_path, monkeypatch):
    with lease.held(str(tmp_path), "x") as silent:
        monkeypatch.setattr(lease, "BEAT_S", 1000)
        time.sleep(0.3)
        storage.write_json(f"{tmp_path}/000001.json", {"host": "elsewhere", "boot": "b", "pid": 1, "since": 0, "beat": 7})
        start = time.monotonic()
        with lease.held(str(tmp_path), "x"):
            assert time.monotonic() - start >= 1
            monkeypatch.setattr(lease, "BEAT_S", 0.1)
            silent._live()
            with pytest.raises(CappyError, match="another run took over"):
                silent.check()


@both
def test_of_two_at_the_same_moment_one_wins(place, monkeypatch):
    monkeypatch.setattr(storage, "list_files", lambda uri: {})  # both saw nobody
    with lease.held(place, "x"), pytest.raises(CappyError, match="another run started there at the same moment"), lease.held(place, "x"):
        raise AssertionError("two hold it")
