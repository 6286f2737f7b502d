"""Files and object storage behind one URI: a local path or `s3://bucket/prefix`.

A folder is *published* when it holds `_MANIFEST.json`, which is written last and only if nobody else wrote one: a conditional
PUT (`If-None-Match: *`) on S3, a hard link on disk. Readers refuse a folder without one. On S3 whole objects travel with their
SHA-256 both ways, so that one damaged or cut on the wire is sent or asked for again, never taken; Parquet readers that stream
go through pyarrow's filesystem, under page checksums. Credentials and endpoint come from the usual AWS environment variables
or the machine's role, never the config.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from cluster.errors import CappyError, UsageError
from cluster.s3 import (
    arrow_filesystem,
    bucket_and_key,
    call_with_retries,
    delete_objects,
    download_object,
    endpoint_hint,
    environment,
    failure_reason,
    get_object,
    key_prefix,
    list_objects,
    list_page,
    put_object,
    s3_client,
    upload_object,
)


def is_s3(uri: str) -> bool:
    """Whether a URI is in object storage."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/p", "data", "x")` is `s3://b/p/data/x`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """Return `uri` with a local path made absolute, so that it means the same in every process of a machine."""
    return uri.rstrip("/") if is_s3(uri) else str(Path(uri).expanduser().absolute())


def check_uri(uri: str, setting: str) -> str:
    """Return `absolute(uri)` once its bucket or nearest existing folder can be reached.

    Raises `UsageError` naming `setting` when the scheme is unknown, the bucket is missing or the store does not answer.
    """
    if "://" in uri and not is_s3(uri):
        raise UsageError(f"{setting}={uri}: only local paths and s3:// are known; copy the data there first")
    if is_s3(uri):
        bucket = uri.removeprefix("s3://").split("/")[0]
        if not bucket:
            raise UsageError(f"{setting}={uri} names no bucket; write s3://bucket/prefix")
        try:
            info = filesystem(uri)[0].get_file_info(bucket)
        except OSError as error:
            raise CappyError(f"{setting}={uri}: {failure_reason(error)}") from None
        if info.type == pafs.FileType.NotFound:
            raise CappyError(f"{setting}={uri}: bucket {bucket!r} does not exist{endpoint_hint()}; create it or change {setting}")
    return absolute(uri)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path of `uri` on it."""
    if is_s3(uri):
        return arrow_filesystem(*environment()), uri.removeprefix("s3://").rstrip("/")
    return pafs.LocalFileSystem(), absolute(uri)


def exists(uri: str) -> bool:
    """Whether a file, or anything below a folder, is there."""
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
        call_with_retries(uri, lambda: s3_client().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str) -> dict[str, int]:
    """Return the size in bytes of every file below `uri`, by path relative to it, sorted; empty where nothing is."""
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


def check_relative_path(name: str, uri: str) -> str:
    """Return the path of a file below `uri`, as a listing or a manifest gives it.

    Raises `CappyError` where it could lead out of a folder: it is absolute, or has an empty part, `.`, `..`, a backslash or NUL.
    """
    if not isinstance(name, str) or {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
        raise CappyError(f"{uri} names the file {name!r}, which is not within the folder; do not use it, or rename the file there")
    return name


def glob(uri: str) -> list[str]:
    """Return the files a path stands for, sorted: the file itself, all below a folder, or those a glob matches.

    In a glob `*` and `?` stay within a path part and `**` crosses parts, on disk and on s3:// alike.
    """
    parts = absolute(uri).split("/")
    fixed = list(takewhile(lambda part: not any(mark in part for mark in "*?["), parts))
    root = "/".join(fixed)
    if len(fixed) == len(parts):
        if is_file(root):
            return [root]
        return [join(root, name) for name in list_files(root)]
    pattern = PurePosixPath("/", *parts[len(fixed) :])
    return [join(root, name) for name in list_files(root) if _matches(PurePosixPath("/", name).parts, pattern.parts)]


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def read_bytes(uri: str) -> bytes:
    """Return a whole file. Raises `FileNotFoundError` where nothing is, `Damaged` where it keeps arriving damaged."""
    if is_s3(uri):
        return call_with_retries(uri, partial(get_object, uri))
    return Path(absolute(uri)).read_bytes()


def read_json(uri: str) -> Any:
    """Raises `FileNotFoundError` where nothing is, `ValueError` where it is not JSON."""
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> dict[str, Any]:
    """Write a whole file at once (a reader sees the old file, none, or all of `data`); return its entry for a manifest."""
    if is_s3(uri):
        call_with_retries(uri, partial(put_object, uri, data))
    else:
        target = Path(absolute(uri))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        temporary.replace(target)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_json(uri: str, value: Any) -> dict[str, Any]:
    """Write a JSON file whole, and return its entry for a manifest, as `write_bytes` does."""
    return write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON in UTF-8, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def create_json(uri: str, value: dict[str, Any]) -> bool:
    """Write a JSON file only if there is none: of any number of racing writers exactly one gets True.

    Each write carries a `writer` id: where S3's answer is lost, boto3 asks again and is told 412 although our bytes won.
    """
    value = {**value, "writer": uuid.uuid4().hex}
    if not is_s3(uri):
        target = Path(filesystem(uri)[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{value['writer']}")
        temporary.write_bytes(json_bytes(value))
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True
    from botocore.exceptions import ClientError

    try:
        call_with_retries(uri, partial(put_object, uri, json_bytes(value), IfNoneMatch="*", ContentType="application/json"))
    except ClientError:  # 412: there is one, perhaps ours
        return bool(read_json(uri).get("writer") == value["writer"])
    return True


def delete(uri: str) -> None:
    """Remove a file or a folder with all below it; nothing there is fine."""
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
    """Remove the named files below `uri`; a file that is not there is fine."""
    if not is_s3(uri):
        for name in names:
            Path(join(absolute(uri), name)).unlink(missing_ok=True)
        return
    bucket = bucket_and_key(uri)[0]
    keys = [bucket_and_key(join(uri, name))[1] for name in names]
    for start in range(0, len(keys), 1000):
        call_with_retries(uri, partial(delete_objects, bucket, keys[start : start + 1000]))


def remove_empty_folder(uri: str) -> None:
    """Remove a folder on disk if nothing is in it; object storage has no empty folders."""
    if not is_s3(uri):
        with suppress(OSError):
            Path(absolute(uri)).rmdir()


def sha256(uri: str) -> str:
    """Return the SHA-256 of a file in hex, read in pieces of 8 MiB. Raises `CappyError` where it keeps arriving damaged."""
    if is_s3(uri):
        return call_with_retries(uri, partial(download_object, uri, None))
    with Path(absolute(uri)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload_folder(folder: Path, uri: str) -> dict[str, dict[str, Any]]:
    """Copy every file of a local folder below `uri`; return the entry of each for a manifest, by its path."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: upload_file(path, join(uri, name)) for name, path in files.items()}


def upload_file(file: Path, uri: str) -> dict[str, Any]:
    """Copy a local file to `uri`, where a reader never sees half of it; return its entry for a manifest."""
    entry = {"bytes": file.stat().st_size, "sha256": sha256(str(file))}
    if is_s3(uri):
        bucket, key = bucket_and_key(uri)
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": entry["sha256"]}}
        call_with_retries(uri, partial(upload_object, str(file), bucket, key, extra))
        return entry
    target = Path(absolute(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    shutil.copyfile(file, temporary)
    temporary.replace(target)
    return entry


def version(uri: str) -> str | None:
    """Return a mark that changes whenever a file is written again: the ETag on S3, else inode, time and size. None: no such file."""
    try:
        if is_s3(uri):
            bucket, key = bucket_and_key(uri)
            return str(call_with_retries(uri, lambda: s3_client().head_object(Bucket=bucket, Key=key))["ETag"])
        state = Path(absolute(uri)).stat()
        return f"{state.st_ino}-{state.st_mtime_ns}-{state.st_size}"
    except FileNotFoundError:
        return None


@contextmanager
def temporary_file_beside(uri: str) -> Iterator[Path]:
    """A new name beside a file on disk, from which it can be renamed; whatever has that name afterwards is removed."""
    target = Path(absolute(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def download_folder(uri: str, folder: Path) -> None:
    """Copy every file below `uri` into a local folder.

    Raises `CappyError` before it copies the first where one of them would not come to be inside.
    """
    for relative in [check_relative_path(name, uri) for name in list_files(uri)]:
        download_file(join(uri, relative), folder / relative)


def download_file(uri: str, file: Path) -> str:
    """Copy `uri` to a local file and return its SHA-256. Raises `CappyError` where it keeps arriving damaged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if is_s3(uri):
        return call_with_retries(uri, partial(download_object, uri, file))
    shutil.copyfile(absolute(uri), file)
    return sha256(str(file))


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A local file with the bytes of `uri`: itself on disk, a checked copy under the same name (until the block ends) of an object.

    Raises `FileNotFoundError` where nothing is, `CappyError` where it keeps arriving damaged.
    """
    if not is_s3(uri):
        yield Path(absolute(uri))
        return
    with tempfile.TemporaryDirectory(prefix="cappy-copy-") as folder:
        copy = Path(folder, check_relative_path(uri.rsplit("/", 1)[-1], uri))
        download_file(uri, copy)
        yield copy


def new_temporary_folder(purpose: str) -> Path:
    """Return a fresh folder for intermediate files; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix=f"cappy-{purpose}-"))
