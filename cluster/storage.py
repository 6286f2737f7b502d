"""Files and object storage behind one URI: a local path or `s3://bucket/prefix`.

A folder is *published* when it holds `_MANIFEST.json`, which is written last and only if nobody else wrote one: a conditional
PUT (`If-None-Match: *`) on S3, a hard link on disk. Readers refuse a folder without one. On S3 whole objects travel with their
SHA-256 both ways, so that one damaged or cut on the wire is sent or asked for again, never taken; Parquet readers that stream
go through pyarrow's filesystem, under page checksums. Credentials and endpoint come from the usual AWS environment variables
or the machine's role, never the config.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow.fs as pafs
import tenacity
import urllib3

from cluster.errors import CappyError, UsageError
from cluster.progress import log

MANIFEST = "_MANIFEST.json"
WITHDRAWN = "_WITHDRAWN.json"
"""A copy of the manifest while `withdraw` deletes its files: after an interruption it lists what is left to delete."""
T = TypeVar("T")

_CHUNK = 8 << 20
# The file of an atomic write before it gets its name.
_TEMPORARY = re.compile(r"(^|.*/)\.([^/]+)\.[0-9a-f]{32}")
_CONNECTIONS = 32
# S3 takes at most this many parts in an upload.
_MOST_PARTS = 10_000
_PART_THREADS = 4
# Times a conditional write is tried again after another writer of the same file was faster.
_REPLACE_ATTEMPTS = 5
# Times a call to the store is made; with every third one failing, all of these fail once in 60,000 times.
_ATTEMPTS = 10
# What S3 and its kin answer to a body that does not match its checksum, or that ended early.
_DAMAGED_ON_ARRIVAL = {
    "BadDigest",
    "InvalidDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "RequestTimeout",
    "SignatureDoesNotMatch",
}
# What it answers to a list of parts, which has no checksum, that was damaged.
_DAMAGED_PART_LIST = {"InvalidPart", "InvalidPartOrder", "MalformedXML"}
# What S3 answers to a conditional write while another write of the same object is under way.
_CONFLICT = "ConditionalRequestConflict"


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
            raise CappyError(f"{setting}={uri}: {_s3_reason(error)}") from None
        if info.type == pafs.FileType.NotFound:
            raise CappyError(f"{setting}={uri}: bucket {bucket!r} does not exist{_endpoint_hint()}; create it or change {setting}")
    return absolute(uri)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of `uri` and the path of `uri` on it."""
    if is_s3(uri):
        return _s3(*_environment()), uri.removeprefix("s3://").rstrip("/")
    return pafs.LocalFileSystem(), absolute(uri)


@lru_cache(maxsize=8)
def _s3(*environment: str) -> pafs.S3FileSystem:
    return pafs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
        region=_region(),
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
    if is_s3(uri):
        return _is_file(uri) or bool(_patiently(uri, partial(_page, uri, 1))["KeyCount"])
    return Path(absolute(uri)).exists()


def _is_file(uri: str) -> bool:
    if not is_s3(uri):
        return Path(absolute(uri)).is_file()
    bucket, key = _located(uri)
    if not key:
        return False
    try:
        _patiently(uri, lambda: _boto3().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return False
    return True


def list_files(uri: str) -> dict[str, int]:
    """Return the size in bytes of every file below `uri`, by path relative to it, sorted; empty where nothing is."""
    try:
        if is_s3(uri):
            start = len(_below(uri))
            # A key that ends in a slash marks a folder.
            files = {each["Key"][start:]: each["Size"] for each in _objects(uri) if not each["Key"].endswith("/")}
        else:
            fs, root = filesystem(uri)
            found = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
            files = {info.path[len(root) :].lstrip("/"): info.size for info in found if info.type == pafs.FileType.File}
    except FileNotFoundError:  # no such bucket
        return {}
    except OSError as error:
        raise CappyError(f"{uri}: {error}") from None
    return dict(sorted(files.items()))


def _below(uri: str) -> str:
    """What the keys of all objects below a URI begin with."""
    key = _located(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def _page(uri: str, size: int = 1000, token: str | None = None) -> Any:
    """One page of the listing of an s3:// folder, with all below it."""
    more = {"ContinuationToken": token} if token else {}
    return _boto3().list_objects_v2(Bucket=_located(uri)[0], Prefix=_below(uri), MaxKeys=size, **more)


def _objects(uri: str) -> Iterator[Any]:
    """All objects below an s3:// folder, folder markers among them; each page of the listing is worth its own tries."""
    token = None
    while True:
        page = _patiently(uri, partial(_page, uri, token=token))
        yield from page.get("Contents", ())
        token = page.get("NextContinuationToken")
        if not token:
            return


def check_name(name: str, uri: str) -> str:
    """Return the path of a file below `uri`, as a listing or a manifest gives it.

    Raises `CappyError` where it could lead out of a folder: it is absolute, or has an empty part, `.`, `..`, a backslash or NUL.
    """
    if not isinstance(name, str) or {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
        raise CappyError(f"{uri} names the file {name!r}, which is not within the folder; do not use it, or rename the file there")
    return name


def _check_names(uri: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest once all files it lists are below `uri`: it may come from anyone."""
    for name in manifest.get("files", ()):
        if check_name(name, join(uri, MANIFEST)) == MANIFEST:
            raise CappyError(f"{join(uri, MANIFEST)} names itself as a file, which is not within the folder; do not use it")
    return manifest


def glob(uri: str) -> list[str]:
    """Return the files a path stands for, sorted: the file itself, all below a folder, or those a glob matches.

    In a glob `*` and `?` stay within a path part and `**` crosses parts, on disk and on s3:// alike.
    """
    parts = absolute(uri).split("/")
    fixed = list(takewhile(lambda part: not any(mark in part for mark in "*?["), parts))
    root = "/".join(fixed)
    if len(fixed) == len(parts):
        if _is_file(root):
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
        return _patiently(uri, partial(_get, uri))
    return Path(absolute(uri)).read_bytes()


def _get(uri: str) -> bytes:
    bucket, key = _located(uri)
    answer = _boto3().get_object(Bucket=bucket, Key=key)
    data = bytes(answer["Body"].read())
    _check(answer, hashlib.sha256(data), hashlib.md5(data, usedforsecurity=False))
    return data


def _check(answer: Any, sha256: Any, md5: Any) -> None:
    """Raise `_DamagedError` where an object's bytes are not those that were written, as far as the store can say what they were."""
    expected = answer["Metadata"].get("sha256")
    if expected and sha256.hexdigest() != expected:
        raise _DamagedError("its bytes do not match the SHA-256 it was written with")
    # What others wrote carries no hash of ours; uploaded in one piece and not encrypted with a key of theirs, its tag is its MD5.
    tag = answer.get("ETag", "").strip('"')
    keyed = answer.get("ServerSideEncryption", "AES256") != "AES256" or answer.get("SSECustomerAlgorithm")
    if not expected and not keyed and re.fullmatch("[0-9a-f]{32}", tag) and md5.hexdigest() != tag:
        raise _DamagedError("its bytes do not match the store's tag")


def read_json(uri: str) -> Any:
    """Raises `FileNotFoundError` where nothing is, `ValueError` where it is not JSON."""
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> dict[str, Any]:
    """Write a whole file at once (a reader sees the old file, none, or all of `data`); return its entry for a manifest."""
    if is_s3(uri):
        _patiently(uri, partial(_put, uri, data))
    else:
        target = Path(absolute(uri))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        temporary.replace(target)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _put(uri: str, data: bytes, **options: str) -> None:
    bucket, key = _located(uri)
    digest = hashlib.sha256(data)
    checksum = base64.b64encode(digest.digest()).decode()
    # The store refuses a body that does not match; the hash in the metadata lets every later reader check what it got.
    _boto3().put_object(Bucket=bucket, Key=key, Body=data, ChecksumSHA256=checksum, Metadata={"sha256": digest.hexdigest()}, **options)


def _located(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


class Damaged(CappyError):
    """What is there is not what was written."""


class _DamagedError(Exception):
    """An object arrived with other bytes than were written."""


class _RefusedError(Exception):
    """The store did a part of what it was asked."""


def _patiently(uri: str, call: Callable[[], T]) -> T:
    """Return what an S3 call gives, asking again where the store or the wire failed; see `_worth_another_try`.

    Raises `FileNotFoundError` where nothing is, `Damaged` where it keeps arriving damaged, `CappyError` where the store refuses
    or keeps failing.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_worth_another_try),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=5),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )
    try:
        return retrying(call)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in ("NoSuchKey", "404", "NoSuchBucket"):
            raise FileNotFoundError(uri) from None
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
            raise
        raise CappyError(f"{uri}: {_s3_reason(error)} (it answered {code})") from None
    except _DamagedError as error:
        raise Damaged(f"{uri}: {error}, {_ATTEMPTS} times; write it again") from None
    except _RefusedError as error:
        raise CappyError(f"{uri}: {error}; check what its policy allows") from None
    except (BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError) as error:
        raise CappyError(f"{uri}: {_s3_reason(error)} ({type(error).__name__})") from None


def _worth_another_try(error: BaseException) -> bool:
    """Whether an S3 call failed on the wire or in the store rather than by what it asked for."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or error.response.get("Error", {}).get("Code") in {*_DAMAGED_ON_ARRIVAL, _CONFLICT}
    on_the_wire = _DamagedError | BotoCoreError | ResponseParserError | urllib3.exceptions.HTTPError
    return isinstance(error, on_the_wire) and not isinstance(error, NoCredentialsError)


def write_json(uri: str, value: Any) -> dict[str, Any]:
    """Write a JSON file whole, and return its entry for a manifest, as `write_bytes` does."""
    return write_bytes(uri, _json(value))


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

    try:
        _patiently(uri, partial(_put, uri, _json(value), IfNoneMatch="*", ContentType="application/json"))
    except ClientError:  # 412: there is one, perhaps ours
        return bool(read_json(uri).get("writer") == value["writer"])
    return True


def _boto3(attempts: int = 1) -> Any:
    """The S3 client that sends a request up to `attempts` times; with one, `_patiently` tries again, knowing more errors."""
    return _s3_client(attempts, *_environment())


@lru_cache(maxsize=8)
def _s3_client(attempts: int, *environment: str) -> Any:
    """One client a process and environment: making one takes as long as some hundred calls, and it is thread-safe."""
    import boto3
    from botocore.config import Config as BotoConfig

    retries: Any = {"total_max_attempts": attempts, "mode": "standard"}
    options = BotoConfig(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=_CONNECTIONS)
    return boto3.session.Session().client("s3", region_name=_region(), config=options)


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _environment() -> tuple[str, ...]:
    """What decides where a store is and who asks; a client made under other values is not used again."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return tuple(os.environ.get(name, "") for name in names)


def delete(uri: str) -> None:
    """Remove a file or a folder with all below it; nothing there is fine."""
    if not is_s3(uri):
        path = Path(absolute(uri))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    bucket, key = _located(uri)
    try:
        keys = [each["Key"] for each in _objects(uri)]
        for start in range(0, len(keys), 1000):
            _patiently(uri, partial(_delete, bucket, keys[start : start + 1000]))
        if key:
            _patiently(uri, lambda: _boto3().delete_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return


def _delete(bucket: str, keys: Sequence[str]) -> None:
    answer = _boto3().delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
    if answer.get("Errors"):
        raise _RefusedError(f"{answer['Errors'][0].get('Key')} cannot be deleted ({answer['Errors'][0].get('Code')})")


def delete_files(uri: str, names: Sequence[str]) -> None:
    """Remove the named files below `uri`; a file that is not there is fine."""
    if not is_s3(uri):
        for name in names:
            Path(join(absolute(uri), name)).unlink(missing_ok=True)
        return
    bucket = _located(uri)[0]
    keys = [_located(join(uri, name))[1] for name in names]
    for start in range(0, len(keys), 1000):
        _patiently(uri, partial(_delete, bucket, keys[start : start + 1000]))


def remove_empty_folder(uri: str) -> None:
    """Remove a folder on disk if nothing is in it; object storage has no empty folders."""
    if not is_s3(uri):
        with suppress(OSError):
            Path(absolute(uri)).rmdir()


def cleanup(uri: str, check: Callable[[], None] = lambda: None) -> None:
    """Delete what a published folder no longer needs, once `check` passed. A failure is only reported."""
    try:
        check()
        delete(uri)
    except (CappyError, OSError) as error:
        log(f"what was made is published, but what the run left at {uri} could not be removed: {error}")


def sha256(uri: str) -> str:
    """Return the SHA-256 of a file in hex, read in pieces of 8 MiB. Raises `CappyError` where it keeps arriving damaged."""
    if is_s3(uri):
        return _patiently(uri, partial(_download, uri, None))
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
        bucket, key = _located(uri)
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": entry["sha256"]}}
        _patiently(uri, partial(_upload, str(file), bucket, key, extra))
        return entry
    target = Path(absolute(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    shutil.copyfile(file, temporary)
    temporary.replace(target)
    return entry


def _upload(file: str, bucket: str, key: str, extra: dict[str, Any]) -> None:
    from boto3.exceptions import S3UploadFailedError

    try:
        # Large files go in parts, and each part is worth its own tries.
        _boto3(_ATTEMPTS).upload_file(file, bucket, key, ExtraArgs=extra)
    except S3UploadFailedError as error:
        raise error.__context__ or error from None


def version(uri: str) -> str | None:
    """Return a mark that changes whenever a file is written again: the ETag on S3, else inode, time and size. None: no such file."""
    try:
        if is_s3(uri):
            bucket, key = _located(uri)
            return str(_patiently(uri, lambda: _boto3().head_object(Bucket=bucket, Key=key))["ETag"])
        state = Path(absolute(uri)).stat()
        return f"{state.st_ino}-{state.st_mtime_ns}-{state.st_size}"
    except FileNotFoundError:
        return None


class FolderWriter:
    """Write files below one folder without replacing a file of a run that took over in the meantime.

    Each write reads the file's `version`, calls `check`, and then writes only if the version is still the same: `If-Match` or
    `If-None-Match` on S3, a hard link or a compared rename on disk. A file that another run wrote after `check` passed has
    another version, so the write is refused and `check` is called again. Two windows remain. On disk, a rename follows the
    last comparison by some microseconds. On S3, a file that was written again with the same bytes has the same ETag.

    `check` raises `CappyError` once the folder is another run's, e.g. `Lease.check`. By default it raises once the folder has
    a manifest.
    """

    def __init__(self, uri: str, check: Callable[[], None] | None = None) -> None:
        self.uri = uri
        self._check = check or partial(refuse_published_meanwhile, uri)

    def write_bytes(self, name: str, data: bytes) -> dict[str, Any]:
        """Write a whole file; return its entry for a manifest."""
        uri = join(self.uri, name)
        digest = hashlib.sha256(data).hexdigest()
        if is_s3(uri):
            self._write(uri, digest, lambda condition: _put(uri, data, **condition))
        else:
            with _beside(uri) as temporary:
                temporary.write_bytes(data)
                self._move(uri, temporary)
        return {"bytes": len(data), "sha256": digest}

    def write_json(self, name: str, value: Any) -> dict[str, Any]:
        """Write a JSON file; return its entry for a manifest."""
        return self.write_bytes(name, _json(value))

    def upload_file(self, file: Path, name: str, *, move: bool = False) -> dict[str, Any]:
        """Copy a local file; return its entry for a manifest. With `move` the file may be renamed instead: it is not used again."""
        uri = join(self.uri, name)
        digest = sha256(str(file))
        entry = {"bytes": file.stat().st_size, "sha256": digest}
        if is_s3(uri):
            self._write(uri, digest, partial(_put_file, uri, file, entry))
        elif move:
            Path(absolute(uri)).parent.mkdir(parents=True, exist_ok=True)
            self._move(uri, file)
        else:
            with _beside(uri) as temporary:
                shutil.copyfile(file, temporary)
                self._move(uri, temporary)
        return entry

    def upload_folder(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Copy every file of a local folder; return the entry of each for a manifest, by its path."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: self.upload_file(path, name) for name, path in files.items()}

    def _write(self, uri: str, digest: str, send: Callable[[dict[str, str]], None]) -> None:
        from botocore.exceptions import ClientError

        for _ in range(_REPLACE_ATTEMPTS):
            seen = version(uri)
            self._check()
            condition = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen}
            try:
                _patiently(uri, partial(send, condition))
                return
            except (ClientError, FileNotFoundError):  # 412: another version; or the file to replace was removed
                # Where the answer to an earlier try was lost, the other version is this one.
                if _has_sha256(uri, digest):
                    return
        raise _contended(uri)

    def _move(self, uri: str, file: Path) -> None:
        target = Path(absolute(uri))
        for _ in range(_REPLACE_ATTEMPTS):
            seen = version(uri)
            self._check()
            if seen is None:
                try:
                    os.link(file, target)
                except FileExistsError:
                    continue
                file.unlink()
                return
            if version(uri) == seen:
                file.replace(target)
                return
        raise _contended(uri)


def _contended(uri: str) -> CappyError:
    return CappyError(f"{uri}: another process writes this file too; stop one of them, then run the command again")


@contextmanager
def _beside(uri: str) -> Iterator[Path]:
    """A new name beside a file on disk, from which it can be renamed; whatever has that name afterwards is removed."""
    target = Path(absolute(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _has_sha256(uri: str, digest: str) -> bool:
    """Whether an object was written with this SHA-256."""
    bucket, key = _located(uri)
    try:
        head = _patiently(uri, lambda: _boto3().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return False
    return bool(head["Metadata"].get("sha256") == digest)


def _put_file(uri: str, file: Path, entry: dict[str, Any], condition: dict[str, str]) -> None:
    """Send a local file under a condition: `upload_file` of boto3 takes none for what it sends in parts."""
    if entry["bytes"] <= _CHUNK:
        _put(uri, file.read_bytes(), **condition)
        return
    from botocore.exceptions import ClientError

    bucket, key = _located(uri)
    client = _boto3()
    named = {"Bucket": bucket, "Key": key}
    begin = partial(client.create_multipart_upload, **named, ChecksumAlgorithm="SHA256", Metadata={"sha256": entry["sha256"]})
    named["UploadId"] = _patiently(uri, begin)["UploadId"]
    size = max(_CHUNK, -(-entry["bytes"] // _MOST_PARTS))

    def send(number: int) -> dict[str, Any]:
        with file.open("rb") as source:
            source.seek((number - 1) * size)
            data = source.read(size)
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        part = partial(client.upload_part, **named, PartNumber=number, Body=data, ChecksumSHA256=checksum)
        return {"PartNumber": number, "ETag": _patiently(uri, part)["ETag"], "ChecksumSHA256": checksum}

    def complete() -> None:
        try:
            client.complete_multipart_upload(**named, MultipartUpload={"Parts": parts}, **condition)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code")
            if code in _DAMAGED_PART_LIST:
                raise _DamagedError(f"the store refused the list of its parts ({code})") from None
            # Where the answer to an earlier try was lost, the upload is over.
            if code != "NoSuchUpload" or not _has_sha256(uri, entry["sha256"]):
                raise

    try:
        with ThreadPoolExecutor(_PART_THREADS) as pool:
            parts = list(pool.map(send, range(1, -(-entry["bytes"] // size) + 1)))
        _patiently(uri, complete)
    except BaseException:
        with suppress(Exception):  # the first failure is the one to report
            client.abort_multipart_upload(**named)
        raise


def download_folder(uri: str, folder: Path) -> None:
    """Copy every file below `uri` into a local folder.

    Raises `CappyError` before it copies the first where one of them would not come to be inside.
    """
    for relative in [check_name(name, uri) for name in list_files(uri)]:
        download_file(join(uri, relative), folder / relative)


def download_file(uri: str, file: Path) -> str:
    """Copy `uri` to a local file and return its SHA-256. Raises `CappyError` where it keeps arriving damaged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if is_s3(uri):
        return _patiently(uri, partial(_download, uri, file))
    shutil.copyfile(absolute(uri), file)
    return sha256(str(file))


def _download(uri: str, file: Path | None) -> str:
    """Read an object whole, into a local file if one is given, and return its SHA-256."""
    bucket, key = _located(uri)
    answer = _boto3().get_object(Bucket=bucket, Key=key)
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with file.open("wb") if file else nullcontext() as sink:
        for chunk in answer["Body"].iter_chunks(_CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
            if sink:
                sink.write(chunk)
    _check(answer, sha256, md5)
    return sha256.hexdigest()


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A local file with the bytes of `uri`: itself on disk, a checked copy under the same name (until the block ends) of an object.

    Raises `FileNotFoundError` where nothing is, `CappyError` where it keeps arriving damaged.
    """
    if not is_s3(uri):
        yield Path(absolute(uri))
        return
    with tempfile.TemporaryDirectory(prefix="cappy-copy-") as folder:
        copy = Path(folder, check_name(uri.rsplit("/", 1)[-1], uri))
        download_file(uri, copy)
        yield copy


def new_temporary_folder(purpose: str) -> Path:
    """Return a fresh folder for intermediate files; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix=f"cappy-{purpose}-"))


def published(uri: str, setting: str) -> dict[str, Any]:
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
        raise CappyError(f"{uri}: {_s3_reason(error) if is_s3(uri) else error}") from None
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
    if _is_file(join(uri, MANIFEST)):
        raise _published_meanwhile(uri)


def _published_meanwhile(uri: str) -> CappyError:
    return CappyError(f"{uri} was published by another run meanwhile; its result stands, this one is not published")


@dataclass(frozen=True)
class Owned:
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


def refuse_foreign(uri: str, setting: str, owned: Owned, *, overwrite: bool) -> None:
    """Raise `UsageError` where a run would delete or overwrite a file at `uri` that its verb did not write. Changes nothing.

    With `overwrite` that is every other file. Without it, files may stay that are not in the way. Raises `UsageError` as well where
    the manifest there is of another kind or not readable, and `CappyError` where it names a file outside the folder.
    """
    _survey(uri, setting, owned, overwrite)


def withdraw(uri: str, setting: str, owned: Owned, keep: str | None = None, check: Callable[[], None] = lambda: None) -> None:
    """Delete what a verb wrote at `uri`, the manifest first, so that no reader ever accepts a part of it.

    Checks all files before it deletes the first, and raises as `refuse_foreign` does. `keep` is a folder to leave. `check` is
    called before each step and raises where the place is another run's by now. The next call completes an interrupted one.
    Symbolic links are never followed.
    """
    _delete_own(uri, _survey(uri, setting, owned, overwrite=True), owned, keep, check)


def finish_withdrawal(uri: str, setting: str, owned: Owned, keep: str | None = None, check: Callable[[], None] = lambda: None) -> None:
    """Complete a `withdraw` that was interrupted at `uri`; without one, change nothing."""
    if exists(join(uri, WITHDRAWN)) and not exists(join(uri, MANIFEST)):
        _delete_own(uri, _survey(uri, setting, owned, overwrite=False), owned, keep, check)


def _survey(uri: str, setting: str, owned: Owned, overwrite: bool) -> list[str]:
    """Return the paths below `uri` of the files that the verb wrote; raise as `refuse_foreign` does."""
    found = _plain_files(uri)

    def one_of(name: str, patterns: Iterable[str]) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    listed = {name for each in (MANIFEST, WITHDRAWN) if found.get(each) for name in (each, *_listed(uri, each, setting, owned))}
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


def _listed(uri: str, name: str, setting: str, owned: Owned) -> set[str]:
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


def _delete_own(uri: str, own: Sequence[str], owned: Owned, keep: str | None, check: Callable[[], None]) -> None:
    check()
    if MANIFEST in own:
        write_bytes(join(uri, WITHDRAWN), read_bytes(join(uri, MANIFEST)))
        _delete_files(uri, [MANIFEST])
    going = [name for name in own if name not in (MANIFEST, WITHDRAWN) and not (keep and name.startswith(f"{keep}/"))]
    # What makes the rest known as the verb's own goes last.
    marks = [name for name in going if re.fullmatch(owned.begun, name)]
    for names in ([name for name in going if name not in marks], marks, [WITHDRAWN]):
        check()
        _delete_files(uri, names)


def _delete_files(uri: str, names: Sequence[str]) -> None:
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
        raise _published_meanwhile(uri)
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
