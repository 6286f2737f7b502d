"""Published folders."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CappyError, UsageError
from cluster.progress import log
from cluster.s3 import failure_reason
from cluster.storage import (
    absolute,
    check_relative_path,
    create_json,
    delete,
    delete_files,
    exists,
    is_file,
    is_s3,
    join,
    list_files,
    read_bytes,
    read_json,
    remove_empty_folder,
    sha256,
    write_bytes,
)

MANIFEST = "_MANIFEST.json"
WITHDRAWN = "_WITHDRAWN.json"
"""A copy of the manifest while `withdraw` deletes its files: after an interruption it lists what is left to delete."""
# The file of an atomic write before it gets its name.
_TEMPORARY = re.compile(r"(^|.*/)\.([^/]+)\.[0-9a-f]{32}")


def _check_names(uri: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest once all files it lists are below `uri`: it may come from anyone."""
    for name in manifest.get("files", ()):
        if check_relative_path(name, join(uri, MANIFEST)) == MANIFEST:
            raise CappyError(f"{join(uri, MANIFEST)} names itself as a file, which is not within the folder; do not use it")
    return manifest


def cleanup(uri: str, check: Callable[[], None] = lambda: None) -> None:
    """Delete what a published folder no longer needs, once `check` passed. A failure is only reported."""
    try:
        check()
        delete(uri)
    except (CappyError, OSError) as error:
        log(f"what was made is published, but what the run left at {uri} could not be removed: {error}")


def read_any_manifest(uri: str, setting: str) -> dict[str, Any]:
    """Return the manifest of a published folder of any kind; raises `CappyError` naming `setting` where nothing is published."""
    try:
        manifest = read_json(join(uri, MANIFEST))
    except (FileNotFoundError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CappyError(
            f"{setting}={uri} has no readable {MANIFEST}: nothing is there, or the run writing it did not finish; run its command again"
        )
    return _check_names(uri, manifest)


def read_manifest(uri: str, kind: str, verb: str) -> dict[str, Any]:
    """Return the manifest of a published folder of one `kind` (`dataset`, `scorer` or `evaluation`).

    Raises `CappyError` where nothing is published (the run writing it did not finish) or it is of another kind.
    """
    try:
        manifest = read_json(join(uri, MANIFEST))
    except FileNotFoundError:
        state = "is not there" if not exists(uri) else f"has no {MANIFEST}: the run writing it did not finish"
        raise CappyError(f"{uri} {state}; run `cappy {verb}` (again) to complete it") from None
    except OSError as error:
        raise CappyError(f"{uri}: {failure_reason(error) if is_s3(uri) else error}") from None
    except ValueError:
        raise CappyError(f"{join(uri, MANIFEST)} is not JSON: it was changed after it was published; publish again") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise CappyError(f"{uri} holds a {found}, not a {kind}; point the setting at what `cappy {verb}` wrote")
    return _check_names(uri, manifest)


def refuse_published(uri: str, setting: str, verb: str) -> None:
    """Raise `UsageError` when `uri` already holds a finished run, before anything is spent."""
    if exists(join(uri, MANIFEST)):
        raise UsageError(
            f"{setting}={uri} already holds a finished run; choose another {setting} (or workspace), "
            f"or run `cappy {verb} --overwrite` to replace it"
        )


def refuse_published_meanwhile(uri: str) -> None:
    """Raise `CappyError` when another run published at `uri` since this one began."""
    if is_file(join(uri, MANIFEST)):
        raise _already_published_error(uri)


def _already_published_error(uri: str) -> CappyError:
    return CappyError(f"{uri} was published by another run meanwhile; its result stands, this one is not published")


@dataclass(frozen=True)
class OwnedFiles:
    """The files that one verb writes at its destination: regular expressions that match a whole path below it."""

    kind: str
    """The manifest's kind: `dataset`, `scorer` or `evaluation`."""
    verb: str
    working: tuple[str, ...]
    """Files of an unfinished run. Their folders are the verb's own, so their names are theirs too."""
    begun: str
    """Those of the `working` files that an unfinished run writes before its first result."""
    results: tuple[str, ...]
    """Files with common names (`README.md`): the verb's own where the manifest lists them or a `begun` file is there."""


def refuse_foreign(uri: str, setting: str, owned: OwnedFiles, *, overwrite: bool) -> None:
    """Raise `UsageError` where a run would delete or overwrite a file at `uri` that its verb did not write. Changes nothing.

    With `overwrite` that is every other file. Without it, files may stay that are not in the way. Raises `UsageError` as well where
    the manifest there is of another kind or not readable, and `CappyError` where it names a file outside the folder.
    """
    _list_own_files(uri, setting, owned, overwrite)


def withdraw(uri: str, setting: str, owned: OwnedFiles, keep: str | None = None, check: Callable[[], None] = lambda: None) -> None:
    """Delete what a verb wrote at `uri`, the manifest first, so that no reader ever accepts a part of it.

    Checks all files before it deletes the first, and raises as `refuse_foreign` does. `keep` is a folder to leave. `check` is
    called before each step and raises where the place is another run's by now. The next call completes an interrupted one.
    Symbolic links are never followed.
    """
    _delete_own_files(uri, _list_own_files(uri, setting, owned, overwrite=True), owned, keep, check)


def finish_withdrawal(uri: str, setting: str, owned: OwnedFiles, keep: str | None = None, check: Callable[[], None] = lambda: None) -> None:
    """Complete a `withdraw` that was interrupted at `uri`; without one, change nothing."""
    if exists(join(uri, WITHDRAWN)) and not exists(join(uri, MANIFEST)):
        _delete_own_files(uri, _list_own_files(uri, setting, owned, overwrite=False), owned, keep, check)


def _list_own_files(uri: str, setting: str, owned: OwnedFiles, overwrite: bool) -> list[str]:
    """Return the paths below `uri` of the files that the verb wrote; raise as `refuse_foreign` does."""
    found = _plain_files(uri)

    def one_of(name: str, patterns: Iterable[str]) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    listed = {name for each in (MANIFEST, WITHDRAWN) if found.get(each) for name in (each, *_files_in_manifest(uri, each, setting, owned))}
    begun = any(plain and re.fullmatch(owned.begun, name) for name, plain in found.items())
    expected = (*owned.working, *owned.results) if begun else owned.working

    def is_own(name: str) -> bool:
        return name in (MANIFEST, WITHDRAWN) or name in listed or one_of(name, expected)

    own = [name for name, plain in found.items() if plain and (is_own(name) or is_own(_TEMPORARY.sub(r"\1\2", name)))]
    foreign = sorted(found.keys() - set(own))
    if not overwrite:
        # A run empties its working folders at its end, and whoever reads `data/*` reads all that is in it.
        folders = tuple({f"{pattern.split('/')[0]}/" for pattern in (*owned.working, *owned.results) if "/" in pattern})
        foreign = [name for name in foreign if name.startswith(folders) or one_of(name, owned.results)]
    if foreign:
        example = foreign[0] if foreign[0].isprintable() else repr(foreign[0])
        count = f" ({len(foreign)} in all)" if len(foreign) > 1 else ""
        raise UsageError(
            f"{setting}={uri} holds files that no `cappy {owned.verb}` wrote, e.g. {example}{count}; nothing was deleted: "
            f"choose another {setting}, or move them away"
        )
    return own


def _plain_files(uri: str) -> dict[str, bool]:
    """Return what is below `uri`, without folders, and whether each is a plain file rather than, e.g., a symbolic link."""
    if is_s3(uri):
        return dict.fromkeys(list_files(uri), True)
    root = Path(absolute(uri))
    found: dict[str, bool] = {}
    for folder, folders, files in os.walk(root, onerror=_raise_unless_missing):
        below = Path(folder).relative_to(root)
        found |= {(below / name).as_posix(): False for name in folders if Path(folder, name).is_symlink()}
        for name in files:
            with suppress(FileNotFoundError):  # an atomic write has just got its name
                found[(below / name).as_posix()] = stat.S_ISREG(Path(folder, name).lstat().st_mode)
    return found


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise CappyError(f"{error.filename} cannot be read ({error.strerror}); choose another place") from None


def _files_in_manifest(uri: str, name: str, setting: str, owned: OwnedFiles) -> set[str]:
    """Return the files that the manifest `name` lists, once it is known to be the verb's own."""
    try:
        manifest = read_json(join(uri, name))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UsageError(
            f"{setting}={uri} has a {name} that is not readable, so what `cappy {owned.verb}` wrote there is not known; "
            f"nothing was deleted: choose another {setting}, or move the folder away"
        )
    if manifest.get("kind") != owned.kind:
        raise UsageError(
            f"{setting}={uri} holds a {manifest.get('kind')}, not a {owned.kind}; nothing was deleted: "
            f"choose another {setting}, or move the folder away"
        )
    return set(_check_names(uri, manifest)["files"])


def _delete_own_files(uri: str, own: Sequence[str], owned: OwnedFiles, keep: str | None, check: Callable[[], None]) -> None:
    check()
    if MANIFEST in own:
        write_bytes(join(uri, WITHDRAWN), read_bytes(join(uri, MANIFEST)))
        _delete_files_and_empty_folders(uri, [MANIFEST])
    going = [name for name in own if name not in (MANIFEST, WITHDRAWN) and not (keep and name.startswith(f"{keep}/"))]
    # What makes the rest known as the verb's own goes last.
    marks = [name for name in going if re.fullmatch(owned.begun, name)]
    for names in ([name for name in going if name not in marks], marks, [WITHDRAWN]):
        check()
        _delete_files_and_empty_folders(uri, names)


def _delete_files_and_empty_folders(uri: str, names: Sequence[str]) -> None:
    """Delete files below `uri`, and the folders below it that are empty then."""
    delete_files(uri, names)
    folders = {parent.as_posix() for name in names for parent in Path(name).parents} - {"."}
    for folder in sorted(folders, key=len, reverse=True):
        remove_empty_folder(join(uri, folder))


def publish(uri: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest, which marks the folder complete.

    Raises `CappyError` when another run published there first.
    """
    if not create_json(join(uri, MANIFEST), manifest):
        raise _already_published_error(uri)
    return manifest


def checksums(uri: str, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `{relative path: {"bytes", "sha256"}}` of files below `uri`, for a manifest."""
    sizes = list_files(uri)
    return {name: {"bytes": sizes[name], "sha256": sha256(join(uri, name))} for name in files}


def verify(uri: str, manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with the files a manifest names: missing, of another size or another SHA-256; empty when sound."""
    sizes = list_files(uri)

    def problem(name: str, expected: dict[str, Any]) -> str | None:
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["bytes"]:
            return f"{name} has {sizes[name]} bytes, the manifest says {expected['bytes']}"
        try:
            return None if sha256(join(uri, name)) == expected["sha256"] else f"{name} does not match its SHA-256"
        except FileNotFoundError:
            return f"{name} is missing"

    # Threads: it waits on the store, and SHA-256 lets go of the interpreter.
    with ThreadPoolExecutor(8) as pool:
        return [found for found in pool.map(problem, manifest["files"], manifest["files"].values()) if found]
