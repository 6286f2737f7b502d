"""Copy a published folder to a repository on the Hugging Face hub: `cappy push SRC hf://...`.

The files are uploaded first, which readers do not see. One commit then adds all of them and the manifest, so a reader finds the whole
folder or nothing. The commit names its parent: if another push came first, the hub refuses it. An interrupted push is repeated by the
same command, which does not upload the stored files again. A later version of a folder is a further commit; earlier commits stay.

Imports `huggingface_hub` inside functions, because its import takes time. Imports no Ray and no code of a verb.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import artifacts, hub, storage
from cluster.copying import copy_summary, without_copy_facts
from cluster.errors import CappyError, UsageError
from cluster.progress import Bar

_THREADS = 8
# Files and bytes of one request for uploads. Of a source in object storage, the files of one request are on the local disk.
_BATCH_FILES = 50
_BATCH_BYTES = 1 << 30
_MAIN = "main"
# Files that a new repository has.
_GIVEN = (".gitattributes", "README.md")


def push_folder(source: str, destination: str) -> dict[str, Any]:
    """Commit the published folder `source` to the repository `destination`; return a summary with the `commit`.

    Creates a missing repository (private) and a missing branch. The commit deletes the files of an earlier push to the same place that
    are not in the new manifest.

    Raises `UsageError` if the place is of another kind or holds files of another origin. Raises `CappyError` if a file does not match its
    SHA-256, or the hub refuses the push. In all cases it commits nothing.
    """
    if storage.is_hub(source):
        raise UsageError(f"DST={destination}: SRC is on the hub too; run `cappy pull {source} FOLDER` first, then push FOLDER")
    place = hub.parse(destination, "DST")
    source = storage.check_uri(source, "SRC")
    manifest = artifacts.read_any_manifest(source, "SRC")
    files = dict(manifest["files"])
    _check_place(manifest["kind"], place)
    hub.refuse_pickles(files, f"SRC={source}")
    start = time.monotonic()
    with hub.quiet():
        _create(place)
        head = hub.Commit(place, "DST")
        there = head.list_files()
        earlier = head.read_manifest() if artifacts.MANIFEST in there else None
        if earlier and without_copy_facts(earlier) == without_copy_facts(manifest):
            return {**copy_summary(place.uri, manifest["kind"], source, files, ()), "commit": head.sha}
        _refuse_other_content(place, manifest, there, earlier)
        names = [name for name in sorted(files) if name not in there or there[name] != files[name]["sha256"]]
        additions = _upload(source, place, {name: files[name] for name in names})
        stale = sorted((set(earlier["files"]) - set(files)) & set(there)) if earlier else []
        commit = _commit(place, head.sha, manifest, additions, stale)
    return {**copy_summary(place.uri, manifest["kind"], source, files, names, time.monotonic() - start), "commit": commit}


def _check_place(kind: str, place: hub.Repository) -> None:
    """Raise `UsageError` if the repository is of another type, or the revision is a commit."""
    if place.revision and re.fullmatch("[0-9a-f]{40}", place.revision):
        raise UsageError(f"DST={place.uri} names a commit, which never changes; give a branch, or leave the revision out")
    wanted = "model" if kind == "scorer" else "dataset"
    if place.type != wanted:
        address = f"hf://{'datasets/' if wanted == 'dataset' else ''}{place.name}"
        raise UsageError(f"DST={place.uri} is a {place.type} repository, and SRC holds {artifacts.with_article(kind)}; write {address}")


def _create(place: hub.Repository) -> None:
    """Create the repository and the branch, if they do not exist."""
    from huggingface_hub.errors import RevisionNotFoundError

    api = hub.client()
    with hub.one_line_errors(place, "DST"):
        api.create_repo(place.name, repo_type=place.type, private=True, exist_ok=True)
        if place.revision:
            try:
                api.repo_info(place.name, repo_type=place.type, revision=place.revision)
            except RevisionNotFoundError:
                api.create_branch(place.name, repo_type=place.type, branch=place.revision, exist_ok=True)


def _refuse_other_content(
    place: hub.Repository, manifest: artifacts.Manifest, there: Mapping[str, Any], earlier: artifacts.Manifest | None
) -> None:
    """Raise `UsageError` if the place has a folder of another kind, or files that are of no push to it."""
    if earlier and earlier["kind"] != manifest["kind"]:
        raise UsageError(
            f"DST={place.uri} holds {artifacts.with_article(earlier['kind'])}, and SRC holds {artifacts.with_article(manifest['kind'])}; "
            f"choose another repository or a path in it"
        )
    own = {*manifest["files"], *(earlier["files"] if earlier else _GIVEN), *_GIVEN[:1], artifacts.MANIFEST}
    strange = sorted(set(there) - own)
    if strange:
        raise UsageError(
            f"DST={place.uri} holds other files, {strange[0]} first of {len(strange)}; choose another repository, or a path in it"
        )


def _upload(source: str, place: hub.Repository, files: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Upload files in batches and return the operations of the commit. Large files are in them by their SHA-256 only.

    Raises `CappyError` if a file does not match its SHA-256.
    """
    from huggingface_hub import CommitOperationAdd

    api = hub.client()
    additions: list[Any] = []
    with Bar("pushing", len(files), "files") as bar:
        for batch in _batches(files):
            with _local_files({name: artifacts.file_uri(source, name, files[name]) for name in batch}) as local:
                added = {name: CommitOperationAdd(place.place(name), local[name]) for name in batch}
                for name, addition in added.items():
                    if addition.upload_info.sha256.hex() != files[name]["sha256"]:
                        raise CappyError(
                            f"{artifacts.file_uri(source, name, files[name])} does not match its SHA-256; nothing is committed: repair "
                            f"the source (`cappy inspect` checks it), then run the same command again to resume"
                        )
                with hub.one_line_errors(place, "DST"):
                    # An empty list of ignored files: the .gitignore of the repository must not leave files out.
                    api.preupload_lfs_files(
                        place.name,
                        list(added.values()),
                        repo_type=place.type,
                        revision=place.revision or _MAIN,
                        num_threads=_THREADS,
                        gitignore_content="",
                    )
                for name, addition in added.items():
                    if isinstance(addition.path_or_fileobj, str):  # a small text file, which is a part of the commit itself
                        addition.path_or_fileobj = local[name].read_bytes()
            additions += added.values()
            bar.advance(len(batch), MB=sum(files[name]["bytes"] for name in batch) // 10**6)
    return additions


def _batches(files: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name, entry in files.items():
        if batch and (len(batch) == _BATCH_FILES or size + entry["bytes"] > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += entry["bytes"]
    if batch:
        yield batch


@contextmanager
def _local_files(places: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """Yield local paths of the files at `places`, by name: the files themselves, or temporary copies of objects."""
    try:
        with storage.temporary_folder("push") as folder, ThreadPoolExecutor(_THREADS) as pool:
            local = {name: folder / name if storage.is_s3(uri) else Path(uri) for name, uri in places.items()}
            remote = [name for name, uri in places.items() if storage.is_s3(uri)]
            for name in places.keys() - set(remote):
                local[name].stat()
            list(pool.map(lambda name: storage.download_file(places[name], local[name]), remote))
            yield local
    except FileNotFoundError as error:
        missing = error.filename or "a file of the source"
        raise CappyError(f"{missing} is missing, its manifest names it; nothing is committed: repair the source") from None


def _commit(place: hub.Repository, parent: str, manifest: artifacts.Manifest, additions: Sequence[Any], stale: Sequence[str]) -> str:
    """Commit the uploaded files, the manifest and the deletions; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    # The place of the source is not published: it can be a path of this machine.
    data = storage.json_bytes(without_copy_facts(manifest))
    operations = [
        *additions,
        CommitOperationAdd(place.place(artifacts.MANIFEST), data),
        *(CommitOperationDelete(place.place(name)) for name in stale),
    ]
    with hub.one_line_errors(place, "DST"):
        made = hub.client().create_commit(
            place.name,
            operations,
            commit_message=f"cappy push: {manifest['kind']}",
            repo_type=place.type,
            revision=place.revision or _MAIN,
            parent_commit=parent,
        )
    return str(made.oid)
