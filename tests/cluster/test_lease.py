import subprocess
import sys
import threading
import time

import pytest

from cluster import lease, storage
from cluster.errors import CappyError
from cluster.lease import LeaseLost

both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lease, "TIMEOUT_S", 1.0)


@both
def test_a_second_run_is_refused_during_the_first_and_accepted_after_it(place):
    with (
        lease.hold(place, "dataset=x") as first,
        pytest.raises(CappyError, match=r"dataset=x: a run on .* is working there; wait for it, stop it"),
        lease.hold(place, "dataset=x"),
    ):
        raise AssertionError("two hold it")
    first.check()
    start = time.monotonic()
    with lease.hold(place, "dataset=x"):
        assert time.monotonic() - start < 1


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_without_a_wait(tmp_path):
    # The context manager is kept: collected as garbage, it would release the lease.
    take = f"from cluster import lease\nholder = lease.hold({str(tmp_path)!r}, 'x')\nholder.__enter__()\nimport os; os._exit(9)"
    assert subprocess.run([sys.executable, "-c", take]).returncode == 9
    left = storage.read_json(f"{tmp_path}/000001.json")
    assert left["beat"] == 0 and "released" not in left
    start = time.monotonic()
    with lease.hold(str(tmp_path), "x"):
        assert time.monotonic() - start < 1


def test_the_lease_of_a_silent_run_elsewhere_is_taken_after_the_timeout_and_lost_for_it(tmp_path, monkeypatch):
    with lease.hold(str(tmp_path), "x") as silent:
        monkeypatch.setattr(lease, "HEARTBEAT_S", 1000)
        time.sleep(0.3)
        storage.write_json(f"{tmp_path}/000001.json", {"host": "elsewhere", "boot": "b", "pid": 1, "since": 0, "beat": 7})
        start = time.monotonic()
        with lease.hold(str(tmp_path), "x"):
            assert time.monotonic() - start >= 1
            monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
            silent._send_heartbeats()
            with pytest.raises(LeaseLost, match=r"x: lease lost: "):
                silent.check()


@both
def test_one_of_two_concurrent_runs_gets_the_lease(place, monkeypatch):
    monkeypatch.setattr(storage, "list_files", lambda uri: {})  # both find no lease
    with lease.hold(place, "x"), pytest.raises(CappyError, match="another run started there at the same moment"), lease.hold(place, "x"):
        raise AssertionError("two hold it")


class Clock:
    """A clock in seconds that only the test advances."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def no_heartbeat(monkeypatch):
    """Real limits, and no heartbeat while a test runs."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 1e6)
    monkeypatch.setattr(lease, "TIMEOUT_S", 30.0)


def files_of(place):
    return {name: storage.read_bytes(f"{place}/{name}") for name in storage.list_files(place)}


@both
def test_a_lease_is_lost_by_the_clock_of_the_holder_without_a_takeover(place, no_heartbeat):
    clock = Clock()
    with lease.hold(place, "dataset=x", clock) as held:
        clock.now += 30
        held.check()
        taken = files_of(place)
        clock.now += 1
        with pytest.raises(LeaseLost, match=r"dataset=x: lease lost: no heartbeat for 31 s \(the limit is 30 s\)"):
            held.check(read_store=False)
        clock.now -= 31
        with pytest.raises(LeaseLost):  # once lost it stays lost
            held.check()
    assert files_of(place) == taken  # nor did the release write


def test_a_heartbeat_counts_from_the_start_of_its_write(tmp_path, monkeypatch):
    clock = Clock()
    with lease.hold(str(tmp_path), "x", clock) as held:
        monkeypatch.setattr(lease, "TIMEOUT_S", 30.0)
        clock.now += 29
        beat = held._beat
        while held._beat < beat + 2:  # one that began after the clock moved is written
            time.sleep(0.01)
        clock.now += 29
        held.check()


def test_a_lost_lease_never_writes_its_file_again(tmp_path, no_heartbeat):
    clock = Clock()
    with lease.hold(str(tmp_path), "x", clock) as held:
        before = files_of(str(tmp_path))
        clock.now += 31
        with pytest.raises(LeaseLost):
            held._write()  # a heartbeat
        assert files_of(str(tmp_path)) == before


@both
def test_a_successor_is_detected_before_the_next_heartbeat(place, no_heartbeat):
    with lease.hold(place, "dataset=x") as held:
        storage.create_json(f"{place}/000002.json", {"run": "other"})
        with pytest.raises(LeaseLost, match="another run took over"):
            held.check()
        with pytest.raises(LeaseLost, match="another run took over"):
            held.claim.check()


@both
@pytest.mark.parametrize("again", [False, True], ids=["gone", "taken anew"])
def test_a_successor_that_finished_and_removed_its_lease_is_detected(place, again, no_heartbeat):
    with lease.hold(place, "dataset=x") as held:
        storage.delete(place)
        if again:
            storage.create_json(f"{place}/000001.json", {"run": "another"})
        with pytest.raises(LeaseLost, match="another run took over"):
            held.check()
    assert [storage.read_json(f"{place}/{name}")["run"] for name in storage.list_files(place)] == ["another"] * again


@both
def test_a_run_that_finished_leaves_no_lease(place):
    for _ in range(2):
        with lease.hold(place, "x"):
            pass
    with lease.hold(place, "x") as held:
        assert len(storage.list_files(place)) == 3
        held.finish()
    assert not storage.exists(place)


def test_each_run_has_a_different_id(tmp_path):
    with lease.hold(str(tmp_path), "x") as first:
        pass
    with lease.hold(str(tmp_path), "x") as second:
        assert first.run != second.run and len(second.run) == 8


@pytest.mark.parametrize(
    "content", [b"", b'{"host": "el', b"[]", b"null", b'{"run": "12345678"}', b'{"host": "h", "pid": "x"}', b"\xff\xfe"]
)
def test_an_incomplete_lease_file_is_taken_after_the_timeout(content, tmp_path, capfd):
    storage.write_bytes(f"{tmp_path}/000003.json", content)
    (tmp_path / f".000004.json.{'a' * 32}").write_bytes(b"")  # a kill between write and rename
    start = time.monotonic()
    with lease.hold(str(tmp_path), "dataset=x") as held:
        assert held.claim.number == 4 and time.monotonic() - start >= 1
        held.finish()
    assert "dataset=x: a run with an unreadable lease file" in capfd.readouterr().err
    assert not tmp_path.exists()  # with all temporary files


def test_an_incomplete_lease_file_that_is_rewritten_belongs_to_a_live_run(tmp_path):
    storage.write_bytes(f"{tmp_path}/000001.json", b"")
    rewrite = threading.Timer(0.3, storage.write_bytes, (f"{tmp_path}/000001.json", b'{"beat": 2'))
    rewrite.start()
    with (
        pytest.raises(CappyError, match=r"dataset=x: a run with an unreadable lease file .* is working there"),
        lease.hold(str(tmp_path), "dataset=x"),
    ):
        raise AssertionError("two hold it")
    rewrite.join()


# The names of this machine in another container on it: the same host and boot id, but other process ids.
OTHER_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]


@pytest.mark.parametrize("command", [OTHER_NAMESPACE, OTHER_NAMESPACE[:-1]], ids=["own /proc", "/proc of the machine"])
def test_a_live_lease_is_not_taken_from_another_pid_namespace(command, tmp_path):
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("a PID namespace is not permitted here")
    limits = "from cluster import lease\nlease.HEARTBEAT_S, lease.TIMEOUT_S = 0.1, 20.0\n"
    take = f"{limits}with lease.hold({str(tmp_path)!r}, 'x'): print('taken')"
    with lease.hold(str(tmp_path), "x"):
        other = subprocess.run([*command, sys.executable, "-c", take], capture_output=True, text=True)
        assert other.stdout == "" and "is working there" in other.stderr
    other = subprocess.run([*command, sys.executable, "-c", take], capture_output=True, text=True)
    assert other.stdout == "taken\n"


def test_the_lease_of_an_older_version_without_a_namespace_is_taken_only_without_a_heartbeat(tmp_path):
    me = {key: value for key, value in lease._this_process().items() if key not in ("namespace", "ticks")}
    storage.write_json(f"{tmp_path}/000001.json", {**me, "pid": 2**22 + 1, "run": "a", "beat": 1})  # no process has this id
    start = time.monotonic()
    with lease.hold(str(tmp_path), "x"):
        assert time.monotonic() - start >= 1


def test_a_change_of_the_clock_does_not_end_a_live_lease(tmp_path, monkeypatch):
    with lease.hold(str(tmp_path), "x"):
        holder = storage.read_json(f"{tmp_path}/000001.json")
        assert not lease._has_ended({**holder, "since": holder["since"] + 60})
        assert lease._has_ended({**holder, "ticks": holder["ticks"] - 1})  # an earlier process with the same id
