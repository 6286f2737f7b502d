"""`cappy list`: find the published folders below a folder or an s3:// prefix, and the runs that did not finish. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

from cluster import artifacts, storage
from cluster.errors import CappyError
from cluster.redaction import redact_text

_READERS = 16
# Folders of a running or interrupted run, below its destination.
_UNFINISHED = ("_lease", "_staging", "_checkpoints", "_copying")
# Keys of a summary with the number of rows, by kind of folder; the first that exists is shown.
_ROWS = ("instructions", "rows", "training_pairs", "pairs")


class Entry(TypedDict):
    """A folder below the prefix."""

    path: str
    """Path below the prefix; empty for the prefix itself."""
    uri: str
    kind: str
    """The kind of the manifest (`dataset`, `scorer`, ...), `unfinished` for a run without one, `unreadable` for a damaged manifest."""
    created: str | None
    """Time in UTC, ISO 8601."""
    rows: int | None
    bytes: int
    """Size of the files in the manifest; of all files if there is none."""
    files: int
    problem: str | None
    """The reason that the manifest cannot be read; null if it can."""


def list_published(uri: str) -> list[Entry]:
    """Return the published folders and the unfinished runs at and below `uri`, by path.

    Reads names, sizes and manifests only. The checkpoints of a training and the units of a run are parts of their folder and are not
    listed on their own.

    Raises `CappyError` if there is no file below `uri`, or it cannot be listed.
    """
    uri = storage.check_uri(uri, "URI")
    sizes = storage.list_files(uri)
    if not sizes:
        raise CappyError(f"URI={uri}: there are no files; give a folder or an s3:// prefix, for example the workspace of a config")
    published = sorted(folder for name in sizes if (folder := _folder_of_manifest(name)) is not None)
    unfinished = sorted({folder for name in sizes if (folder := _folder_of_run(name)) is not None} - set(published))
    with ThreadPoolExecutor(_READERS) as readers:
        entries = list(readers.map(lambda path: _read(uri, path), published))
    for path in unfinished:
        below = [size for name, size in sizes.items() if not path or name.startswith(f"{path}/")]
        entries.append(
            Entry(
                path=path,
                uri=_join(uri, path),
                kind="unfinished",
                created=None,
                rows=None,
                bytes=sum(below),
                files=len(below),
                problem=None,
            )
        )
    return sorted(entries, key=lambda entry: entry["path"])


def _folder_of_manifest(name: str) -> str | None:
    """Return the folder of a manifest that a verb published, and None for any other file."""
    *folder, file = name.split("/")
    return "/".join(folder) if file == artifacts.MANIFEST and not any(part in _UNFINISHED for part in folder) else None


def _folder_of_run(name: str) -> str | None:
    """Return the destination of a run that has this file for its own use; None for any other file."""
    parts = name.split("/")[:-1]
    inner = next((number for number, part in enumerate(parts) if part in _UNFINISHED), None)
    return None if inner is None else "/".join(parts[:inner])


def _read(uri: str, path: str) -> Entry:
    place = _join(uri, path)
    try:
        manifest: Mapping[str, Any] = artifacts.read_any_manifest(place, "URI")
    except CappyError as error:
        return Entry(path=path, uri=place, kind="unreadable", created=None, rows=None, bytes=0, files=0, problem=redact_text(str(error)))
    summary = manifest.get("summary") or {}
    rows = next((summary[key] for key in _ROWS if isinstance(summary.get(key), int)), None)
    files = manifest["files"]
    return Entry(
        path=path,
        uri=place,
        kind=str(manifest.get("kind")),
        created=manifest.get("created"),
        rows=rows,
        bytes=sum(entry["bytes"] for entry in files.values()),
        files=len(files),
        problem=None,
    )


def _join(uri: str, path: str) -> str:
    return storage.join(uri, path) if path else uri
