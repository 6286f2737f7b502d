"""CPU sharing between processes: scheduling priority, and how OpenMP threads wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import psutil

_STEPS = 10
_LEAST = 19


def lower_priority(processes: Iterable[psutil.Process]) -> None:
    """Have processes leave the cores to others that want them: each thread `10` steps of niceness more than it has, 19 at most.

    For those that compute without end beside others that have a little to do and somebody waiting for it: these then get about nine
    times the share (docs/results.md). Nobody loses a core that would be idle. What the threads start later inherits it.
    """
    for process in processes:
        with suppress(psutil.Error):
            for thread in process.threads():
                # On Linux niceness belongs to a thread.
                with suppress(OSError):  # it has ended
                    os.setpriority(os.PRIO_PROCESS, thread.id, min(_LEAST, os.getpriority(os.PRIO_PROCESS, thread.id) + _STEPS))


_OPENMP_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def openmp_environment() -> dict[str, str]:
    """Have threads of libraries loaded later, and of child processes, look for work a thousand times and then sleep.

    OpenMP's own default, to look for much longer, makes threads several times slower once anything else wants a core; to sleep at once
    (what `PASSIVE` alone does) makes a small model wait a fifth of its time for threads to wake up (docs/results.md). What the
    user set stays.
    Returns the variables that say so, for a process that does not inherit them.
    """
    if not any(name in os.environ for name in _OPENMP_VARIABLES):
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")
    return {name: os.environ[name] for name in _OPENMP_VARIABLES if name in os.environ}
