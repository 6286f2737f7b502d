"""Files and object storage behind one URI: a local path or `s3://bucket/prefix`.

Whole objects on S3 are checked by their SHA-256 in both directions, see `cluster.s3`: a damaged or incomplete transfer is repeated.
Parquet readers stream through pyarrow's filesystem, with page checksums. Imports no code for manifests; see `cluster.artifacts`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from cluster import disk
from cluster.errors import CappyError, UsageError, describe_disk_error, find_disk_error
from cluster.s3 import (
    bucket_and_key,
    call_with_retries,
    check_access,
    delete_objects,
    download_object,
    get_object,
    key_prefix,
    list_objects,
    list_page,
    put_object,
    read_with_retries,
    upload_object,
)
from cluster.s3_session import arrow_filesystem, endpoint_hint, environment, s3_client


def is_s3(uri: str) -> bool:
    """Return whether a URI is in object storage."""
    return uri.startswith("s3://")


def is_hub(uri: str) -> bool:
    """Return whether a URI is a repository on the Hugging Face hub; see `cluster.hub`."""
    return uri.startswith("hf://")


def join(uri: str, *parts: str) -> str:
    """Return the parts joined by `/`: `join("s3://b/p", "data", "x")` is `s3://b/p/data/x`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """Return `uri`; a local path becomes absolute, so that it is valid in every process of a machine."""
    return uri.rstrip("/") if is_s3(uri) or is_hub(uri) else str(Path(uri).expanduser().absolute())


def check_uri(uri: str, setting: str) -> str:
    """Return `absolute(uri)` after a check that its bucket can be reached.

    Raises `UsageError` if the scheme is not supported or no bucket is named, and `CappyError` if the bucket does not exist or the
    store does not answer. `setting` is the name for the messages.
    """
    refuse_hub(uri, setting)
    if "://" in uri and not is_s3(uri):
        raise UsageError(f"{setting}={uri}: unsupported scheme; use a local path or s3://")
    if is_s3(uri):
        bucket = uri.removeprefix("s3://").split("/")[0]
        if not bucket:
            raise UsageError(f"{setting}={uri} names no bucket; write s3://bucket/prefix")
        try:
            check_access(uri)
        except FileNotFoundError:
            raise CappyError(f"{setting}={uri}: bucket {bucket!r} does not exist{endpoint_hint()}; create it or change {setting}") from None
        except CappyError as error:
            raise CappyError(f"{setting}={uri}: {str(error).removeprefix(f'{uri}: ')}") from None
    return absolute(uri)


def refuse_hub(uri: str, setting: str) -> None:
    """Raise `UsageError` if `uri` is a repository on the hub: only `push` and `pull` copy from and to it."""
    if is_hub(uri):
        raise UsageError(
            f"{setting}={uri}: only `cappy push` and `cappy pull` read and write the hub; give a folder, and copy it with "
            f"`cappy pull {uri} FOLDER` or `cappy push FOLDER {uri}`"
        )


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path of `uri` on it."""
    if is_s3(uri):
        return arrow_filesystem(*environment()), uri.removeprefix("s3://").rstrip("/")
    return pafs.LocalFileSystem(), absolute(uri)


def exists(uri: str) -> bool:
    """Return whether `uri` is a file, or a folder with a file below it."""
    if is_s3(uri):
        return is_file(uri) or bool(call_with_retries(uri, partial(list_page, uri, 1))["KeyCount"])
    return Path(absolute(uri)).exists()


def is_file(uri: str) -> bool:
    """Return whether `uri` is a file or an object."""
    if not is_s3(uri):
        return Path(absolute(uri)).is_file()
    bucket, key = bucket_and_key(uri)
    if not key:
        return False
    try:
        read_with_retries(uri, lambda: s3_client().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str) -> dict[str, int]:
    """Return the size in bytes of every file below `uri`, by relative path, sorted. Empty if `uri` does not exist."""
    try:
        if is_s3(uri):
            start = len(key_prefix(uri))
            # A key that ends in a slash marks a folder.
            files = {each["Key"][start:]: each["Size"] for each in list_objects(uri) if not each["Key"].endswith("/")}
        else:
            fs, root = filesystem(uri)
            found = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
            files = {info.path[len(root) :].lstrip("/"): info.size for info in found if info.type == pafs.FileType.File}
    except FileNotFoundError:  # no such bucket
        return {}
    except OSError as error:
        raise CappyError(f"{uri}: {error}") from None
    return dict(sorted(files.items()))


def list_versions(uri: str) -> dict[str, str]:
    """Return a text for every object below an s3:// folder that changes with its content, by relative path, sorted."""
    start = len(key_prefix(uri))
    objects = {each["Key"][start:]: each for each in list_objects(uri) if not each["Key"].endswith("/")}
    return {name: f"{each['Size']} {each.get('ETag') or each.get('LastModified')}" for name, each in sorted(objects.items())}


def check_relative_path(name: str, uri: str) -> str:
    """Return `name`, the path of a file below `uri` in a listing or a manifest, after a check.

    Raises `CappyError` if the path could lead out of the folder: it is absolute, or has an empty part, `.`, `..`, a backslash or NUL.
    """
    if not isinstance(name, str) or {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
        raise CappyError(f"{uri} names the file {name!r}, which is not within the folder; do not use it, or rename the file there")
    return name


def glob(uri: str) -> list[str]:
    """Return the sorted files of a path: the file itself, all files below a folder, or all matches of a glob.

    In a glob, `*` and `?` match within one path part and `**` matches several parts, on disk and on s3://.
    """
    root, pattern = split_glob(uri)
    if not pattern:
        return [root] if is_file(root) else [join(root, name) for name in list_files(root)]
    parts = PurePosixPath("/", pattern).parts
    return [join(root, name) for name in list_files(root) if _matches(PurePosixPath("/", name).parts, parts)]


def split_glob(uri: str) -> tuple[str, str]:
    """Return the literal start of a path, absolute, and the glob after it. The glob is empty if the path has no wildcard.

    A path or a folder that exists is literal, also with `*`, `?` or `[` in its name.
    """
    uri = absolute(uri)
    parts = uri.split("/")
    wild = [number for number, part in enumerate(parts) if any(mark in part for mark in "*?[")]
    if not wild or exists(uri):
        return uri, ""
    first = next((number for number in wild if not exists("/".join(parts[: number + 1]))), len(parts) - 1)
    return "/".join(parts[:first]), "/".join(parts[first:])


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def read_bytes(uri: str) -> bytes:
    """Return the bytes of a file. Raises `FileNotFoundError` if it does not exist, `Damaged` if all attempts got damaged bytes."""
    if is_s3(uri):
        return read_with_retries(uri, partial(get_object, uri))
    return Path(absolute(uri)).read_bytes()


def read_json(uri: str) -> Any:
    """Return the value of a JSON file. Raises `FileNotFoundError` if it does not exist, `ValueError` if it is not JSON."""
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> dict[str, Any]:
    """Write a whole file atomically: a reader gets the old file or all of `data`. Return its entry for a manifest."""
    if is_s3(uri):
        call_with_retries(uri, partial(put_object, uri, data))
    else:
        disk.replace(Path(absolute(uri)), data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_json(uri: str, value: Any) -> dict[str, Any]:
    """Write a JSON file atomically and return its entry for a manifest, as `write_bytes` does."""
    return write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON in UTF-8, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def create_json(uri: str, value: dict[str, Any]) -> bool:
    """Write a JSON file only if none exists; return whether it was written. Exactly one of several concurrent writers gets True.

    Each write has a `writer` id. If the response of S3 is lost, the retry gets status 412 although the first attempt succeeded;
    the id in the stored file then decides.
    """
    value = {**value, "writer": uuid.uuid4().hex}
    if not is_s3(uri):
        return disk.create(Path(absolute(uri)), json_bytes(value))
    from botocore.exceptions import ClientError

    try:
        call_with_retries(uri, partial(put_object, uri, json_bytes(value), IfNoneMatch="*", ContentType="application/json"))
    except ClientError:  # 412: the file exists, possibly from an earlier attempt of this write
        return bool(read_json(uri).get("writer") == value["writer"])
    return True


def delete(uri: str) -> None:
    """Delete a file, or a folder with everything below it. A missing file is not an error."""
    if not is_s3(uri):
        path = Path(absolute(uri))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    bucket, key = bucket_and_key(uri)
    try:
        keys = [each["Key"] for each in list_objects(uri)]
        for start in range(0, len(keys), 1000):
            call_with_retries(uri, partial(delete_objects, bucket, keys[start : start + 1000]))
        if key:
            call_with_retries(uri, lambda: s3_client().delete_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return


def delete_files(uri: str, names: Sequence[str]) -> None:
    """Delete the named files below `uri`. A missing file is not an error."""
    if not is_s3(uri):
        for name in names:
            Path(join(absolute(uri), name)).unlink(missing_ok=True)
        return
    bucket = bucket_and_key(uri)[0]
    keys = [bucket_and_key(join(uri, name))[1] for name in names]
    for start in range(0, len(keys), 1000):
        call_with_retries(uri, partial(delete_objects, bucket, keys[start : start + 1000]))


def remove_empty_folder(uri: str) -> None:
    """Delete an empty folder on disk. Object storage has no empty folders."""
    if not is_s3(uri):
        with suppress(OSError):
            Path(absolute(uri)).rmdir()


def sha256(uri: str) -> str:
    """Return the SHA-256 of a file in hex, read in blocks. Raises `CappyError` if all attempts got damaged bytes."""
    if is_s3(uri):
        return read_with_retries(uri, partial(download_object, uri, None))
    with Path(absolute(uri)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload_folder(folder: Path, uri: str) -> dict[str, dict[str, Any]]:
    """Copy every file of a local folder to `uri`; return their entries for a manifest, by relative path."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: upload_file(path, join(uri, name)) for name, path in files.items()}


def upload_file(file: Path, uri: str) -> dict[str, Any]:
    """Copy a local file to `uri` atomically; return its entry for a manifest."""
    entry = {"bytes": file.stat().st_size, "sha256": sha256(str(file))}
    if is_s3(uri):
        bucket, key = bucket_and_key(uri)
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": entry["sha256"]}}
        call_with_retries(uri, partial(upload_object, str(file), bucket, key, extra))
        return entry
    disk.copy(file, Path(absolute(uri)))
    return entry


def version(uri: str) -> str | None:
    """Return a text that changes with each write of a file: the ETag on S3, else inode, time and size. None if it does not exist."""
    try:
        if is_s3(uri):
            bucket, key = bucket_and_key(uri)
            return str(read_with_retries(uri, lambda: s3_client().head_object(Bucket=bucket, Key=key))["ETag"])
        state = Path(absolute(uri)).stat()
        return f"{state.st_ino}-{state.st_mtime_ns}-{state.st_size}"
    except FileNotFoundError:
        return None


def download_folder(uri: str, folder: Path) -> None:
    """Copy every file below `uri` into a local folder.

    Raises `CappyError` before the first copy if the path of a file leads out of the folder.
    """
    for relative in [check_relative_path(name, uri) for name in list_files(uri)]:
        download_file(join(uri, relative), folder / relative)


def download_file(uri: str, file: Path) -> str:
    """Copy `uri` to a local file and return its SHA-256. Raises `CappyError` if all attempts got damaged bytes."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if is_s3(uri):
            return read_with_retries(uri, partial(download_object, uri, file))
        shutil.copyfile(absolute(uri), file)
    except OSError as error:
        if full := find_disk_error(error):
            raise CappyError(describe_disk_error(full, str(file))) from None
        raise
    return sha256(str(file))


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """Yield a local file with the bytes of `uri`: the file itself on disk, or a checked temporary copy of an object with the same name.

    Raises `FileNotFoundError` if it does not exist, `CappyError` if all attempts got damaged bytes.
    """
    if not is_s3(uri):
        yield Path(absolute(uri))
        return
    with temporary_folder("copy") as folder:
        copy = Path(folder, check_relative_path(uri.rsplit("/", 1)[-1], uri))
        download_file(uri, copy)
        yield copy


def new_temporary_folder(purpose: str) -> Path:
    """Return a fresh folder for intermediate files; the caller removes it."""
    with disk.errors_of(f"TMPDIR={tempfile.gettempdir()}"):
        return Path(tempfile.mkdtemp(prefix=f"cappy-{purpose}-"))


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Yield a fresh folder for intermediate files, which is removed after the block.

    Raises `CappyError`, which names the folder, for a write inside the block that fails because its disk is full or broken.
    """
    folder = new_temporary_folder(purpose)
    try:
        yield folder
    except CappyError:
        raise
    except Exception as error:
        if full := find_disk_error(error):
            raise CappyError(describe_disk_error(full, f"TMPDIR={folder.parent}")) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
