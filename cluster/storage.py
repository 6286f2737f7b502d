"""Files and object storage behind one URI: a local path or `s3://bucket/prefix`.

Bulk data goes through pyarrow's filesystems. A folder is *published* when it holds `_MANIFEST.json`, which is written last
and only if nobody else wrote one: a conditional PUT (`If-None-Match: *`) on S3, a hard link on disk. Readers refuse a folder
without one. Credentials and endpoint come from the usual AWS environment variables or the machine's role, never the config.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from cluster.errors import CappyError, UsageError

MANIFEST = "_MANIFEST.json"
_CHUNK = 8 << 20


def is_s3(uri: str) -> bool:
    """Whether a URI is in object storage."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/p", "data", "x")` is `s3://b/p/data/x`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """Return `uri` with a local path made absolute, so that it means the same in every process of a machine."""
    return uri.rstrip("/") if is_s3(uri) else str(Path(uri).expanduser().absolute())


def check(uri: str, setting: str) -> str:
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
            raise CappyError(f"{setting}={uri}: {_s3_reason(error)}") from None
        if info.type == pafs.FileType.NotFound:
            raise CappyError(f"{setting}={uri}: bucket {bucket!r} does not exist{_endpoint_hint()}; create it or change {setting}")
    return absolute(uri)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path of `uri` on it."""
    if is_s3(uri):
        environment = tuple(os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION"))
        return _s3(*environment), uri.removeprefix("s3://").rstrip("/")
    return pafs.LocalFileSystem(), absolute(uri)


@lru_cache(maxsize=8)
def _s3(endpoint_s3: str, endpoint: str, region: str) -> pafs.S3FileSystem:
    endpoint = endpoint_s3 or endpoint
    return pafs.S3FileSystem(
        endpoint_override=endpoint or None,
        region=region or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=5),
    )


def _endpoint_hint() -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {endpoint}" if endpoint else ""


def _s3_reason(error: Exception) -> str:
    """One line for a failed S3 call, without request details (they can hold key ids)."""
    text = str(error)
    if "ACCESS_DENIED" in text or "SignatureDoesNotMatch" in text or "InvalidAccessKeyId" in text or "HTTP status 403" in text:
        return f"the object store{_endpoint_hint()} refused the credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return f"the object store{_endpoint_hint()} cannot be reached; check AWS_ENDPOINT_URL, the network and the bucket"


def exists(uri: str) -> bool:
    """Whether a file, or anything below a folder, is there."""
    fs, path = filesystem(uri)
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def list_files(uri: str) -> dict[str, int]:
    """Return the size in bytes of every file below `uri`, by path relative to it, sorted; empty where nothing is."""
    fs, root = filesystem(uri)
    found = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
    files = {info.path[len(root) :].lstrip("/"): info.size for info in found if info.type == pafs.FileType.File}
    return dict(sorted(files.items()))


def glob(uri: str) -> list[str]:
    """Return the files a path stands for, sorted: the file itself, all below a folder, or those a glob matches.

    In a glob `*` and `?` stay within a path part and `**` crosses parts, on disk and on s3:// alike.
    """
    parts = absolute(uri).split("/")
    fixed = list(takewhile(lambda part: not any(mark in part for mark in "*?["), parts))
    root = "/".join(fixed)
    if len(fixed) == len(parts):
        fs, path = filesystem(root)
        if fs.get_file_info(path).type == pafs.FileType.File:
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
    """Raises `FileNotFoundError` where nothing is."""
    fs, path = filesystem(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


def read_json(uri: str) -> Any:
    """Raises `FileNotFoundError` where nothing is, `ValueError` where it is not JSON."""
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file at once: a reader sees the old file, none, or all of `data`."""
    fs, path = filesystem(uri)
    if is_s3(uri):
        with fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    temporary.replace(target)


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file whole, as `write_bytes` does."""
    write_bytes(uri, _json(value))


def _json(value: Any) -> bytes:
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
        temporary.write_bytes(_json(value))
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True
    from botocore.exceptions import ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        _boto3().put_object(Bucket=bucket, Key=key, Body=_json(value), IfNoneMatch="*", ContentType="application/json")
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") not in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
            raise CappyError(f"{uri} could not be written: {error.response.get('Error', {}).get('Code')}{_endpoint_hint()}") from None
        return bool(read_json(uri).get("writer") == value["writer"])
    return True


def _boto3() -> Any:
    import boto3
    from botocore.config import Config as BotoConfig

    options = BotoConfig(retries={"max_attempts": 5, "mode": "standard"}, connect_timeout=10, read_timeout=60)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.client("s3", region_name=region, config=options)


def delete(uri: str) -> None:
    """Remove a file or a folder with all below it; nothing there is fine."""
    fs, path = filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)
    elif is_s3(uri):
        # A prefix without a marker object is no directory to pyarrow once its last file is gone: nothing to do.
        return


def sha256(uri: str) -> str:
    """Return the SHA-256 of a file in hex, read in pieces of 8 MiB."""
    fs, path = filesystem(uri)
    digest = hashlib.sha256()
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def upload_folder(folder: Path, uri: str) -> None:
    """Copy every file of a local folder below `uri`."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        upload_file(file, join(uri, file.relative_to(folder).as_posix()))


def upload_file(file: Path, uri: str) -> None:
    """Copy a local file to `uri`; a reader never sees half of it."""
    fs, path = filesystem(uri)
    if is_s3(uri):
        with fs.open_output_stream(path, compression=None) as stream, file.open("rb") as source:
            shutil.copyfileobj(source, stream, _CHUNK)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    shutil.copyfile(file, temporary)
    temporary.replace(target)


def download_folder(uri: str, folder: Path) -> None:
    """Copy every file below `uri` into a local folder."""
    for relative in list_files(uri):
        download_file(join(uri, relative), folder / relative)


def download_file(uri: str, file: Path) -> None:
    """Copy the file at `uri` to a local one. Raises `FileNotFoundError` where nothing is."""
    fs, path = filesystem(uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    with fs.open_input_stream(path, compression=None) as stream, file.open("wb") as sink:
        shutil.copyfileobj(stream, sink, _CHUNK)


def new_temporary_folder(purpose: str) -> Path:
    """Return a fresh folder for intermediate files; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix=f"cappy-{purpose}-"))


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
        raise CappyError(f"{uri}: {_s3_reason(error) if is_s3(uri) else error}") from None
    except ValueError:
        raise CappyError(f"{join(uri, MANIFEST)} is not JSON: it was changed after it was published; publish again") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise CappyError(f"{uri} holds a {found}, not a {kind}; point the setting at what `cappy {verb}` wrote")
    return manifest


def refuse_published(uri: str, setting: str, verb: str) -> None:
    """Raise `UsageError` when `uri` already holds a finished run, before anything is spent."""
    if exists(join(uri, MANIFEST)):
        raise UsageError(
            f"{setting}={uri} already holds a finished run; choose another {setting} (or workspace), "
            f"or run `cappy {verb} --overwrite` to replace it"
        )


def withdraw(uri: str) -> None:
    """Take a published folder back, manifest first, so that no reader ever accepts a part of it."""
    delete(join(uri, MANIFEST))
    delete(uri)


def publish(uri: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest, which marks the folder complete.

    Raises `CappyError` when another run published there first.
    """
    if not create_json(join(uri, MANIFEST), manifest):
        raise CappyError(f"{uri} was published by another run meanwhile; its result stands, this one is not published")
    return manifest


def checksums(uri: str, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `{relative path: {"bytes", "sha256"}}` of files below `uri`, for a manifest."""
    sizes = list_files(uri)
    return {name: {"bytes": sizes[name], "sha256": sha256(join(uri, name))} for name in files}


def verify(uri: str, manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with the files a manifest names: missing, of another size or another SHA-256; empty when sound."""
    sizes = list_files(uri)
    problems = []
    for name, expected in manifest["files"].items():
        if name not in sizes:
            problems.append(f"{name} is missing")
        elif sizes[name] != expected["bytes"]:
            problems.append(f"{name} has {sizes[name]} bytes, the manifest says {expected['bytes']}")
        elif sha256(join(uri, name)) != expected["sha256"]:
            problems.append(f"{name} does not match its SHA-256")
    return problems
