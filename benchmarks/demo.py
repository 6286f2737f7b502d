"""Provide the demo's regression set and scorer: the default data of benchmarks that read a published set.

The set is that of `make demo`, and the scorer is trained on it: `runs/demo/dataset` and `runs/demo/scorer` under the working directory. A
missing one is made first.
"""

from __future__ import annotations

import subprocess
import sys

from cluster import storage
from cluster.config import load
from cluster.progress import log

_EPOCHS = "training.epochs=3"


def demo_set() -> str:
    """Return the URI of the demo's published set; `cappy generate demo` makes a missing one (about 8 minutes on 2 cores)."""
    return _made("generate", load("demo").dataset_uri)


def demo_scorer() -> str:
    """Return the URI of the scorer trained on the demo's set; `cappy train demo --set training.epochs=3` makes a missing one."""
    demo_set()
    return _made("train", load("demo").scorer_uri)


def _made(verb: str, uri: str) -> str:
    if not storage.exists(storage.join(uri, "_MANIFEST.json")):
        log(f"{uri} is missing; running `cappy {verb} demo --set {_EPOCHS}`")
        subprocess.run([sys.executable, "-m", "cappy.cli", verb, "demo", "--set", _EPOCHS], check=True, stdin=subprocess.DEVNULL)
    return uri
