"""Published folders: the manifest that marks a folder as complete, its checks, and the deletion of a verb's own files.

A folder is *published* if it has `_MANIFEST.json`. The manifest is written last, and only if no other run has written one: by a
conditional PUT (`If-None-Match: *`) on S3, by a hard link on disk. Readers refuse a folder without a manifest.

Imports `cluster.storage`, and no code of a verb.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cluster.config import Config
from cluster.disk import final_name
from cluster.errors import CappyError, UsageError
from cluster.progress import log
from cluster.redaction import redact_tree
from cluster.runtime import code_version
from cluster.s3 import abort_upload, failure_reason, list_uploads
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
"""A copy of the manifest during `withdraw`. After an interruption it lists the files that are still to be deleted."""


class FileEntry(TypedDict):
    """A file of a published folder."""

    bytes: int
    sha256: str
    """In hexadecimal."""
    rows: NotRequired[int]
    """Rows of a Parquet shard."""
    uri: NotRequired[str]
    """Location of a shard that is a file of another set, in a set of `cappy combine`. Other files are below the folder."""


class Manifest(TypedDict, total=False):
    """The content of `_MANIFEST.json`, for all kinds: `dataset`, `pairs`, `export`, `answers`, `scores`, `scorer`, `evaluation`.

    Unknown keys are kept.
    """

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]

    kind: str
    version: int
    """Version of the format of this kind."""
    created: str
    """Time in UTC, ISO 8601, in seconds."""
    code_version: str
    command: str
    """The command that made the folder."""
    files: dict[str, FileEntry]
    """All files of the folder, by their path below it. The manifest itself is not listed."""
    summary: dict[str, Any]
    """The result of the verb."""
    config: dict[str, Any]
    """The resolved config of the run."""
    writer: str
    """Id of the write of this manifest: two runs never have the same."""
    copied_from: str
    """URI of the source, in a copy."""
    counts: dict[str, Any]
    """Instructions and pairs by split (dataset, pairs)."""
    schema: dict[str, str]
    """Types of the columns (dataset, pairs)."""
    metric: dict[str, Any]
    """Name, mode and version of the label metric (dataset, pairs)."""
    lineage: dict[str, Any]
    """The settings that decide the content of the set (dataset, pairs)."""
    max_tokens: dict[str, int]
    """Largest length of a candidate by dataset, in tokens, from the lengths of the references (dataset)."""
    reused: dict[str, Any]
    """Rows, candidates and tokens from `generate.reuse`, and the rows of each of its sets (dataset)."""
    extends: dict[str, Any]
    """URI and version of the set that this set extends, and the rows, candidates and tokens that it has from it (dataset)."""
    combines: list[dict[str, Any]]
    """URI, version, rows and settings of each set that a set of `cappy combine` refers to (dataset)."""
    sampling: list[dict[str, Any]]
    """The settings with which each LLM sampled its decodings, in an extended or combined set: see `generation.sampling_records`
    (dataset)."""
    rates: dict[str, Any]
    """Tokens and rows per second of the sampling (dataset)."""
    seconds: dict[str, float]
    """Duration of each stage (dataset)."""
    cost: dict[str, Any]
    """Dollars (dataset)."""
    inputs: dict[str, str | None]
    """Versions of the published folders that the run read, by setting (scorer of `train`, evaluation)."""
    made_from: dict[str, Any]
    """URI and fingerprint of the set (pairs, export)."""
    relabelled_from: dict[str, Any]
    """The set with the earlier labels (a dataset of `annotate`)."""
    encoder: str
    """The pretrained encoder (scorer)."""
    base: dict[str, Any]
    """The scorer that was adapted (scorer of `adapt`)."""
    identity: Any
    """The settings and data that decide an adapted scorer (scorer of `adapt`)."""


_MANIFEST_TYPE = TypeAdapter(Manifest)


def read_any_manifest(uri: str, setting: str) -> Manifest:
    """Return the manifest of a published folder of any kind.

    Raises `CappyError` naming `setting` if nothing is published at `uri`.
    """
    try:
        data = read_bytes(join(uri, MANIFEST))
    except FileNotFoundError:
        data = b""
    return parse_any_manifest(data, uri, setting)


def parse_any_manifest(data: bytes, uri: str, setting: str) -> Manifest:
    """Return the manifest in the bytes of the manifest file of `uri`; raises as `read_any_manifest` does."""
    try:
        tree = json.loads(data)
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or not {"kind", "files"} <= tree.keys() or not _is_valid(tree):
        raise CappyError(
            f"{setting}={uri} has no readable {MANIFEST}: the folder is missing or its run did not finish; run its command again"
        )
    return _check_names(uri, tree)


def with_article(kind: object) -> str:
    """Return the kind of an artifact as a phrase: `a dataset`, `an export`, `pairs`."""
    name = str(kind)
    return name if name.endswith("s") else f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def read_manifest(uri: str, kind: str, verb: str) -> Manifest:
    """Return the manifest of a published folder of one `kind` (`dataset`, `pairs`, `scorer` or `evaluation`).

    Raises `CappyError` if nothing is published at `uri`, because the run did not finish, or if the folder is of another kind.
    """
    try:
        tree = read_json(join(uri, MANIFEST))
    except FileNotFoundError:
        state = "is not there" if not exists(uri) else f"has no {MANIFEST}: the run writing it did not finish"
        raise CappyError(f"{uri} {state}; run `cappy {verb}` (again) to complete it") from None
    except OSError as error:
        raise CappyError(f"{uri}: {failure_reason(error) if is_s3(uri) else error}") from None
    except ValueError:
        raise CappyError(f"{join(uri, MANIFEST)} is not JSON: it was changed after it was published; publish again") from None
    if not isinstance(tree, dict) or tree.get("kind") != kind:
        found = tree.get("kind") if isinstance(tree, dict) else type(tree).__name__
        raise CappyError(
            f"{uri} holds {with_article(found)}, not {with_article(kind)}; point the setting at a folder that `cappy {verb}` wrote"
        )
    if not _is_valid(tree):
        raise CappyError(f"{join(uri, MANIFEST)} is not a valid manifest: it was changed after it was published; publish again")
    return _check_names(uri, tree)


def _is_valid(tree: Any) -> bool:
    try:
        _MANIFEST_TYPE.validate_python(tree)
    except ValidationError:
        return False
    return True


def _check_names(uri: str, manifest: Mapping[str, Any]) -> Manifest:
    """Return a manifest if all its files are below `uri`, or are shards of other sets. A manifest can come from an untrusted source."""
    for name, entry in manifest.get("files", {}).items():
        if check_relative_path(name, join(uri, MANIFEST)) == MANIFEST:
            raise CappyError(f"{join(uri, MANIFEST)} names itself as a file, which is not within the folder; do not use it")
        place = entry.get("uri") if isinstance(entry, Mapping) else None
        if place is not None and not (name.startswith("data/") and str(place).endswith(".parquet")):
            raise CappyError(f"{join(uri, MANIFEST)}: {name} is at {place}; only a Parquet shard may be elsewhere; do not use it")
    return cast(Manifest, manifest)


def file_uri(uri: str, name: str, entry: Mapping[str, Any]) -> str:
    """Return the location of a file of the published folder `uri`, from its entry in the manifest."""
    return str(entry["uri"]) if "uri" in entry else join(uri, name)


def own_entries(files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the entries of files as those of a copy, which has all files below its folder."""
    return {name: {key: value for key, value in entry.items() if key != "uri"} for name, entry in files.items()}


def publish_folder(
    uri: str,
    kind: str,
    *,
    files: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    config: Config | Mapping[str, Any],
    version: int = 1,
    created: str | None = None,
    describe: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
    check: Callable[[], None] = lambda: None,
    **facts: Any,
) -> Manifest:
    """Write the manifest of a complete folder, which publishes the folder; return the manifest.

    Args:
        uri: The folder.
        kind: `dataset`, `pairs`, `scorer` or `evaluation`.
        files: The entry of each file, `{"bytes": ..., "sha256": ...}`, by its path below the folder.
        summary: The result of the verb.
        config: The resolved config of the run.
        version: Version of the format of this kind.
        created: Time of the run, in UTC; None is now.
        describe: Writes files that describe the manifest, e.g. the card, and returns the manifest with these files.
        check: Called directly before the manifest is written. Raises if the folder belongs to another run now, e.g. `Lease.check`.
        **facts: Further keys of the manifest.

    Raises:
        CappyError: If another run published there first.
    """
    manifest: dict[str, Any] = {
        "kind": kind,
        "version": version,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        **facts,
        "summary": dict(summary),
        "config": redact_tree(config.model_dump(mode="json") if isinstance(config, Config) else dict(config)),
        "files": dict(files),
    }
    if describe:
        manifest = describe(uri, manifest)
    check()
    remove_temporaries(uri, manifest["files"])
    return publish(uri, manifest)


def publish(uri: str, manifest: Mapping[str, Any]) -> Manifest:
    """Write a complete manifest, which publishes the folder; `publish_folder` makes one.

    Raises `CappyError` if another run published there first.
    """
    if not create_json(join(uri, MANIFEST), dict(manifest)):
        raise _already_published_error(uri)
    return cast(Manifest, manifest)


def remove_temporaries(uri: str, names: Collection[str]) -> None:
    """Delete the temporary files of the files `names` and of the manifest, which killed runs left. Only a disk has such files."""
    if not is_s3(uri):
        delete_files(uri, [name for name in list_files(uri) if final_name(name) in {*names, MANIFEST}])


def abort_uploads(uri: str, is_own: Callable[[str], bool], check: Callable[[], None]) -> None:
    """Abort the multipart uploads that killed runs left at a destination. The parts of such uploads are stored but not listed.

    Call it right after the lease is taken, before the first write: every upload then belongs to an earlier run. `is_own` returns whether
    a verb writes a file with this path; other uploads continue. `check` raises if another run has the lease. A failure is logged.
    """
    if not is_s3(uri):
        return
    try:
        aborted: set[tuple[str, str]] = set()
        # Again until nothing is left: SeaweedFS lists only the first page correctly.
        while left := {(name, upload) for name, upload in list_uploads(uri) if is_own(name)} - aborted:
            check()
            for name, upload in sorted(left):
                abort_upload(join(uri, name), upload)
            aborted |= left
    except CappyError as error:
        log(f"incomplete uploads below {uri} could not be removed: {error}")


def clear_destination(uri: str, setting: str, owned: OwnedFiles, keep: str, check: Callable[[], None], *, overwrite: bool) -> None:
    """Remove the rest of earlier runs at a destination, before this run writes its first file: files and uploads of killed runs.

    Args:
        uri: The destination.
        setting: The setting that names it, for errors.
        owned: The files that the verb writes.
        keep: The folder of the lease, which stays.
        check: Raises if another run has the lease.
        overwrite: Whether a finished run is deleted too.
    """
    if overwrite:
        withdraw(uri, setting, owned, keep=keep, check=check)
    finish_withdrawal(uri, setting, owned, keep=keep, check=check)
    abort_uploads(uri, owned.includes, check)


def refuse_published(uri: str, setting: str, verb: str) -> None:
    """Raise `UsageError` if `uri` already holds a finished run."""
    if exists(join(uri, MANIFEST)):
        raise UsageError(
            f"{setting}={uri} already holds a finished run; choose another {setting} (or workspace), "
            f"or run `cappy {verb} --overwrite` to replace it"
        )


def refuse_nested(source: str, uri: str) -> None:
    """Raise `UsageError` if one folder contains the other, because a write or `--overwrite` would then change the source."""
    one, other = (folder if is_s3(folder) else str(Path(folder).resolve()) for folder in (source, uri))
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise UsageError(f"DST={uri} and SRC={source} are the same folder or one is in the other; choose a separate folder for DST")


def refuse_published_meanwhile(uri: str) -> None:
    """Raise `CappyError` if another run published at `uri` during this run."""
    if is_file(join(uri, MANIFEST)):
        raise _already_published_error(uri)


def _already_published_error(uri: str) -> CappyError:
    return CappyError(f"{uri} was published by another run meanwhile; its result is kept, and this run is not published")


def checksums(uri: str, files: Iterable[str]) -> dict[str, FileEntry]:
    """Return the entries of files below `uri` for a manifest."""
    sizes = list_files(uri)
    return {name: {"bytes": sizes[name], "sha256": sha256(join(uri, name))} for name in files}


def verify(uri: str, manifest: Mapping[str, Any]) -> list[str]:
    """Return the problems of the files in a manifest: missing, another size or another SHA-256. Empty if all files are intact."""
    sizes = list_files(uri)

    def problem(name: str, expected: Mapping[str, Any]) -> str | None:
        shown = name if "uri" not in expected else f"{name} ({expected['uri']})"
        if "uri" not in expected:
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != expected["bytes"]:
                return f"{name} has {sizes[name]} bytes, the manifest has {expected['bytes']}"
        try:
            return None if sha256(file_uri(uri, name, expected)) == expected["sha256"] else f"{shown} does not match its SHA-256"
        except FileNotFoundError:
            return f"{shown} is missing"

    # Threads are enough: the work waits for the store, and SHA-256 releases the interpreter lock.
    with ThreadPoolExecutor(8) as pool:
        return [found for found in pool.map(problem, manifest["files"], manifest["files"].values()) if found]


def cleanup(uri: str, check: Callable[[], None] = lambda: None) -> None:
    """Delete the intermediate files of a published folder after `check` passes. A failure is logged and ignored."""
    try:
        check()
        delete(uri)
    except (CappyError, OSError) as error:
        log(f"the result is published, but intermediate files at {uri} could not be removed: {error}")


@dataclass(frozen=True)
class OwnedFiles:
    """The files that one verb writes at its destination, as regular expressions for the whole path below it."""

    kind: str
    """The kind in the manifest: `dataset`, `scorer` or `evaluation`."""
    verb: str
    working: tuple[str, ...]
    """Files of an unfinished run, in folders that belong to the verb."""
    begun: str
    """The files of `working` that an unfinished run writes before its first result."""
    results: tuple[str, ...]
    """Files with common names such as `README.md`. They belong to the verb if the manifest lists them or a `begun` file exists."""

    def includes(self, name: str) -> bool:
        """Return whether the verb writes a file with this path."""
        return any(re.fullmatch(pattern, name) for pattern in (*self.working, *self.results))


def refuse_foreign(uri: str, setting: str, owned: OwnedFiles, *, overwrite: bool) -> None:
    """Raise `UsageError` if a run would delete or overwrite a file at `uri` that its verb did not write. Changes nothing.

    With `overwrite` every foreign file is refused. Without it, foreign files are accepted if no file of the run has their place.
    Also raises `UsageError` if the manifest is of another kind or not readable, and `CappyError` if it names a file outside the
    folder.
    """
    _list_own_files(uri, setting, owned, overwrite)


def withdraw(uri: str, setting: str, owned: OwnedFiles, keep: str | None = None, check: Callable[[], None] = lambda: None) -> None:
    """Delete the files that a verb wrote at `uri`, the manifest first, so that no reader accepts a part of the folder.

    Checks all files before it deletes the first, and raises as `refuse_foreign` does. `keep` is a subfolder to leave. `check` is
    called before each step, and raises if the folder belongs to another run. The next call completes an interrupted one.
    Symbolic links are never followed.
    """
    _delete_own_files(uri, _list_own_files(uri, setting, owned, overwrite=True), owned, keep, check)


def finish_withdrawal(uri: str, setting: str, owned: OwnedFiles, keep: str | None = None, check: Callable[[], None] = lambda: None) -> None:
    """Complete an interrupted `withdraw` at `uri`. Changes nothing if there was none."""
    if exists(join(uri, WITHDRAWN)) and not exists(join(uri, MANIFEST)):
        _delete_own_files(uri, _list_own_files(uri, setting, owned, overwrite=False), owned, keep, check)


def _list_own_files(uri: str, setting: str, owned: OwnedFiles, overwrite: bool) -> list[str]:
    """Return the paths of the files that the verb wrote below `uri`. Raises as `refuse_foreign` does."""
    found = _plain_files(uri)

    def one_of(name: str, patterns: Iterable[str]) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    listed = {name for each in (MANIFEST, WITHDRAWN) if found.get(each) for name in (each, *_files_in_manifest(uri, each, setting, owned))}
    begun = any(plain and re.fullmatch(owned.begun, name) for name, plain in found.items())
    expected = (*owned.working, *owned.results) if begun else owned.working

    def is_own(name: str) -> bool:
        return name in (MANIFEST, WITHDRAWN) or name in listed or one_of(name, expected)

    own = [name for name, plain in found.items() if plain and (is_own(name) or is_own(final_name(name) or name))]
    foreign = sorted(found.keys() - set(own))
    if not overwrite:
        # A run empties its working folders at its end, and readers of `data/*` read every file in `data/`.
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
    """Return the paths of all files below `uri`, each with whether it is a regular file. A symbolic link is not."""
    if is_s3(uri):
        return dict.fromkeys(list_files(uri), True)
    root = Path(absolute(uri))
    found: dict[str, bool] = {}
    for folder, folders, files in os.walk(root, onerror=_raise_unless_missing):
        below = Path(folder).relative_to(root)
        found |= {(below / name).as_posix(): False for name in folders if Path(folder, name).is_symlink()}
        for name in files:
            with suppress(FileNotFoundError):  # an atomic write has just renamed it
                found[(below / name).as_posix()] = stat.S_ISREG(Path(folder, name).lstat().st_mode)
    return found


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise CappyError(f"{error.filename} cannot be read ({error.strerror}); choose another place") from None


def _files_in_manifest(uri: str, name: str, setting: str, owned: OwnedFiles) -> set[str]:
    """Return the files listed by the manifest `name`, after a check that the verb wrote the manifest."""
    try:
        manifest = read_json(join(uri, name))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UsageError(
            f"{setting}={uri} has a {name} that is not readable, so the files of `cappy {owned.verb}` are unknown; "
            f"nothing was deleted: choose another {setting}, or move the folder away"
        )
    if manifest.get("kind") != owned.kind:
        raise UsageError(
            f"{setting}={uri} holds {with_article(manifest.get('kind'))}, not {with_article(owned.kind)}; nothing was deleted: "
            f"choose another {setting}, or move the folder away"
        )
    return set(_check_names(uri, manifest)["files"])


def _delete_own_files(uri: str, own: Sequence[str], owned: OwnedFiles, keep: str | None, check: Callable[[], None]) -> None:
    check()
    if MANIFEST in own:
        write_bytes(join(uri, WITHDRAWN), read_bytes(join(uri, MANIFEST)))
        _delete_files_and_empty_folders(uri, [MANIFEST])
    doomed = [name for name in own if name not in (MANIFEST, WITHDRAWN) and not (keep and name.startswith(f"{keep}/"))]
    # The `begun` files identify the other files as the verb's own, so they are deleted last.
    marks = [name for name in doomed if re.fullmatch(owned.begun, name)]
    for names in ([name for name in doomed if name not in marks], marks, [WITHDRAWN]):
        check()
        _delete_files_and_empty_folders(uri, names)


def _delete_files_and_empty_folders(uri: str, names: Sequence[str]) -> None:
    """Delete files below `uri`, and then the empty folders below it."""
    delete_files(uri, names)
    folders = {parent.as_posix() for name in names for parent in Path(name).parents} - {"."}
    for folder in sorted(folders, key=len, reverse=True):
        remove_empty_folder(join(uri, folder))
