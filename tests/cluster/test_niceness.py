import os
import subprocess
import sys

import psutil
import pytest

from cluster.niceness import give_way

# Says when a second thread runs; whoever closes its input ends it.
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
def test_every_thread_gives_way_by_five_steps_down_to_the_last(process, times):
    before, own = niceness(process), niceness(psutil.Process())
    assert len(before) == 2
    for _ in range(times):
        give_way([process])
    assert niceness(process) == [min(19, each + 10 * times) for each in before]
    assert niceness(psutil.Process()) == own


def test_a_process_that_has_ended_is_passed_over(process):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        gone = psutil.Process(ended.pid)
    before = niceness(process)
    give_way([gone, process])
    assert niceness(process) == [min(19, each + 10) for each in before]
