"""Versions of published folders: which publication of its inputs a run reads. Imports no code of a verb."""

from __future__ import annotations

from collections.abc import Mapping

from cluster import artifacts, storage
from cluster.errors import CappyError


def version(uri: str) -> str | None:
    """Return the `writer` of the manifest at `uri`, which differs for each publication.

    None if nothing is published there, e.g. for the name of a model.
    """
    try:
        manifest = storage.read_json(storage.join(uri, artifacts.MANIFEST))
    except (OSError, ValueError):
        return None
    return manifest.get("writer") if isinstance(manifest, dict) else None


def containing(path: str) -> str | None:
    """Return the version of the published folder that holds a file, folder or glob; None if no folder around it is published."""
    parts = storage.absolute(path).split("/")
    literal = next((number for number, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    root = 3 if storage.is_s3(path) else 1
    for end in range(literal, root, -1):
        try:
            if found := version("/".join(parts[:end])):
                return found
        except CappyError:  # the credentials may read the files of a source, and not the folders around it
            return None
    return None


def of_files(paths: Mapping[str, str]) -> dict[str, str]:
    """Return the version of each path that is in a published folder, by its setting. Other paths are left out."""
    found = {setting: containing(path) for setting, path in paths.items()}
    return {setting: each for setting, each in found.items() if each is not None}
