"""Provide the demo's regression set and scorer: the default data of benchmarks that read a published set.

They are the outputs of `make demo`, in `runs/demo` under the working directory. A missing one is made first.
"""

from __future__ import annotations

import subprocess
import sys

from cluster import storage
from cluster.config import load
from cluster.progress import log


def demo_set() -> str:
    """Return the URI of the demo's published set; `cappy generate demo` makes a missing one (about 6 minutes on 2 cores)."""
    return _made("generate", load("demo").dataset_uri)


def demo_scorer() -> str:
    """Return the URI of the scorer trained on the demo's set; `cappy train demo` makes a missing one (about 5 minutes)."""
    demo_set()
    return _made("train", load("demo").scorer_uri)


def _made(verb: str, uri: str) -> str:
    if not storage.exists(storage.join(uri, "_MANIFEST.json")):
        log(f"{uri} is missing; running `cappy {verb} demo`")
        subprocess.run([sys.executable, "-m", "cappy.cli", verb, "demo"], check=True, stdin=subprocess.DEVNULL)
    return uri
