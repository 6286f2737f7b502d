"""Which scorers `cappy adapt` published, for those that use them. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from cluster import storage
from cluster.errors import CappyError


@dataclass(frozen=True)
class AdaptedScorer:
    """The scorer of one task."""

    task: str
    dataset: str | None
    """The rows it is for, by their `dataset`; null is all, with `adapt.by=all`."""
    uri: str


def read_published(adapted_uri: str, setting: str) -> list[AdaptedScorer]:
    """Return the scorers below `adapted_uri`, in the order of their tasks; tasks whose gate let none pass are not among them.

    Raises `CappyError` naming `setting`, the switch that asks for them, where `cappy adapt` has not run.
    """
    place = storage.join(adapted_uri, "results.json")
    try:
        tasks = storage.read_json(place)["tasks"]
    except FileNotFoundError:
        raise CappyError(f"{setting}=true: there is no {place}; run `cappy adapt` first, or set it false") from None
    return [
        # By its folder's name: the whole may have been copied or moved since.
        AdaptedScorer(
            task["task"], task["dataset"], storage.join(adapted_uri, storage.check_relative_path(task["uri"].rsplit("/", 1)[-1], place))
        )
        for task in tasks
        if task["uri"]
    ]
