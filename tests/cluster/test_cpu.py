import os
import subprocess
import sys

import psutil
import pytest

from cluster.cpu import lower_priority, openmp_environment

# Prints a line when its second thread runs. It ends when its standard input is closed.
_TWO_THREADS = "import sys, threading; threading.Thread(target=sys.stdin.read).start(); print('ready', flush=True)"


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", _TWO_THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "ready\n"
        yield psutil.Process(started.pid)
        started.stdin.close()


def niceness(process):
    return [os.getpriority(os.PRIO_PROCESS, thread.id) for thread in process.threads()]


@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_niceness_of_every_thread_rises_by_ten_steps_to_at_most_19(process, times):
    before, own = niceness(process), niceness(psutil.Process())
    assert len(before) == 2
    for _ in range(times):
        lower_priority([process])
    assert niceness(process) == [min(19, each + 10 * times) for each in before]
    assert niceness(psutil.Process()) == own


def test_a_process_that_has_ended_is_skipped(process):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        gone = psutil.Process(ended.pid)
    before = niceness(process)
    lower_priority([gone, process])
    assert niceness(process) == [min(19, each + 10) for each in before]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_openmp_waits_actively_for_1000_iterations_unless_the_user_set_a_variable(before, after, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(before))
    assert openmp_environment() == after == openmp_environment()
