"""List the scorers that `cappy adapt` published. No torch, no Ray."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cluster import storage
from cluster.errors import CappyError


@dataclass(frozen=True)
class AdaptedScorer:
    """The published scorer of one task."""

    task: str
    dataset: str | None
    """The `dataset` of the task's rows; None for all rows, with `adapt.by=all`."""
    uri: str


def read_published(adapted_uri: str, setting: str) -> list[AdaptedScorer]:
    """Return the published scorers below `adapted_uri`, in the order of their tasks. Rejected tasks are not included.

    Raises `CappyError`, which names `setting`, when `cappy adapt` has not run there.
    """
    results = storage.join(adapted_uri, "results.json")
    try:
        tasks = storage.read_json(results)["tasks"]
    except FileNotFoundError:
        raise CappyError(f"{setting}=true: there is no {results}; run `cappy adapt` first, or set {setting}=false") from None
    return [
        # By the folder's name, because the whole folder may have been copied or moved since.
        AdaptedScorer(
            task["task"], task["dataset"], storage.join(adapted_uri, storage.check_relative_path(task["uri"].rsplit("/", 1)[-1], results))
        )
        for task in tasks
        if task["uri"]
    ]


def version(adapted_uri: str) -> str | None:
    """Return 16 hex digits that differ for each finished run of `cappy adapt` at a folder; None without one."""
    try:
        return hashlib.sha256(storage.read_bytes(storage.join(adapted_uri, "results.json"))).hexdigest()[:16]
    except OSError:
        return None
