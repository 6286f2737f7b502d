"""Who gets a CPU core that several processes want."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import psutil

_STEPS = 10
_LEAST = 19


def give_way(processes: Iterable[psutil.Process]) -> None:
    """Have processes leave the cores to others that want them: each thread `10` steps of niceness more than it has, 19 at most.

    For those that compute without end beside others that have a little to do and somebody waiting for it: these then get about nine
    times the share (docs/guides/serve.md, Load). Nobody loses a core that would be idle. What the threads start later inherits it.
    """
    for process in processes:
        with suppress(psutil.Error):
            for thread in process.threads():
                # On Linux niceness belongs to a thread.
                with suppress(OSError):  # it has ended
                    os.setpriority(os.PRIO_PROCESS, thread.id, min(_LEAST, os.getpriority(os.PRIO_PROCESS, thread.id) + _STEPS))
