"""How OpenMP's threads wait for each other on CPUs that are shared."""

from __future__ import annotations

import os

_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_briefly() -> dict[str, str]:
    """Have threads of libraries loaded later, and of child processes, look for work a thousand times and then sleep.

    OpenMP's own default, to look for much longer, makes threads several times slower once anything else wants a core; to sleep at once
    (what `PASSIVE` alone does) makes a small model wait a fifth of its time for threads to wake up (docs/guides/serve.md, Load). What the
    user set stays.
    Returns the variables that say so, for a process that does not inherit them.
    """
    if not any(name in os.environ for name in _NAMES):
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")
    return {name: os.environ[name] for name in _NAMES if name in os.environ}
