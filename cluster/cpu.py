"""The CPU: scheduling priority, how OpenMP threads wait for each other, and whether it multiplies bfloat16."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_STEPS = 10
_LEAST = 19


def lower_priority(processes: Iterable[psutil.Process]) -> None:
    """Lower the scheduling priority of processes: raise the niceness of each thread by 10 steps, to at most 19.

    Use it for processes that compute continuously beside processes that answer requests. The other processes then get about nine
    times the CPU share (docs/results.md). Idle cores are still used. Threads and processes started later inherit it.
    """
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            for thread in process.threads():
                # On Linux niceness belongs to a thread.
                with suppress(OSError):  # the thread has ended
                    os.setpriority(os.PRIO_PROCESS, thread.id, min(_LEAST, os.getpriority(os.PRIO_PROCESS, thread.id) + _STEPS))


_OPENMP_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def openmp_environment() -> dict[str, str]:
    """Limit the active waiting of OpenMP threads, in libraries loaded later and in child processes, to 1,000 iterations.

    The default of OpenMP waits actively for much longer, which makes threads several times slower if another process needs a core.
    `PASSIVE` alone does not wait actively; a small model then spends a fifth of its time waiting for its threads
    (docs/results.md). Variables set by the user are kept. Returns the variables, for a process that does not inherit them.
    """
    if not any(name in os.environ for name in _OPENMP_VARIABLES):
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")
    return {name: os.environ[name] for name in _OPENMP_VARIABLES if name in os.environ}


def multiplies_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 natively. Else bfloat16 is slower than float32."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
