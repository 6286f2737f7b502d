"""Calls to S3 and compatible stores, with retries and with checksums in both directions. Imports nothing else of storage.

Every object carries its SHA-256 in the metadata: the store rejects a damaged upload, and each reader checks its download. A call
that fails for a transient reason is repeated. Credentials, endpoint and region come from the AWS environment variables or from
the role of the machine, never from the config.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs
import tenacity
import urllib3

from cluster.errors import CappyError

T = TypeVar("T")

# Bytes of one read, and the smallest part of a multipart upload.
_CHUNK = 8 << 20
_CONNECTIONS = 32
# The limit of S3 for the parts of one upload.
_MAX_PARTS = 10_000
_PART_THREADS = 4
# If each call fails with probability 1/3, all ten attempts fail once in 60,000 calls.
_ATTEMPTS = 10
# Error codes for an upload that was damaged or cut on the way. The same request can succeed.
_DAMAGED_ON_ARRIVAL = {
    "BadDigest",
    "InvalidDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "RequestTimeout",
    "SignatureDoesNotMatch",
}
# Error codes for a damaged list of parts: a list of parts has no checksum.
_DAMAGED_PART_LIST = {"InvalidPart", "InvalidPartOrder", "MalformedXML"}
# Error code for a conditional write during another write of the same object.
_CONFLICT = "ConditionalRequestConflict"


class Damaged(CappyError):
    """The stored bytes differ from the bytes that were written."""


class _DamagedError(Exception):
    """The bytes that arrived differ from the bytes that were written. The call is repeated."""


class _IncompleteError(Exception):
    """The store carried out only a part of a request."""


@lru_cache(maxsize=8)
def arrow_filesystem(*environment: str) -> pafs.S3FileSystem:
    """Return pyarrow's S3 filesystem. `environment` is the key of the cache; see `environment`."""
    return pafs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
        region=_region(),
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=5),
    )


def environment() -> tuple[str, ...]:
    """Return the environment variables that select a store and an account. A client is reused only while they are the same."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return tuple(os.environ.get(name, "") for name in names)


def s3_client(attempts: int = 1) -> Any:
    """Return a thread-safe boto3 client that sends a request up to `attempts` times.

    Use one attempt below `call_with_retries`: it recognises more transient errors than boto3.
    """
    return _new_client(attempts, *environment())


@lru_cache(maxsize=8)
def _new_client(attempts: int, *environment: str) -> Any:
    """Return one client for each environment: making a client takes as long as about a hundred calls."""
    import boto3
    from botocore.config import Config as BotoConfig

    retries: Any = {"total_max_attempts": attempts, "mode": "standard"}
    options = BotoConfig(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=_CONNECTIONS)
    return boto3.session.Session().client("s3", region_name=_region(), config=options)


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def endpoint_hint() -> str:
    """Return ` at ENDPOINT` for an error message, or nothing for the default endpoint."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {endpoint}" if endpoint else ""


def failure_reason(error: Exception) -> str:
    """Return one line for a failed S3 call. It omits the details of the request, which can contain key ids."""
    text = str(error)
    if "ACCESS_DENIED" in text or "SignatureDoesNotMatch" in text or "InvalidAccessKeyId" in text or "HTTP status 403" in text:
        return f"the object store{endpoint_hint()} refused the credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return f"the object store{endpoint_hint()} cannot be reached; check AWS_ENDPOINT_URL, the network and the bucket"


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Return the bucket and the key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def key_prefix(uri: str) -> str:
    """Return the common prefix of the keys of all objects below a URI."""
    key = bucket_and_key(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def call_with_retries(uri: str, call: Callable[[], T]) -> T:
    """Return the result of an S3 call, repeated after transient errors; see `_is_transient`.

    Raises `FileNotFoundError` if the object or bucket is missing, `Damaged` if every attempt received damaged bytes, and
    `CappyError` if the store refuses the request or fails on every attempt. A failed condition (status 412) raises `ClientError`.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
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
        raise CappyError(f"{uri}: {failure_reason(error)} (error code {code})") from None
    except _DamagedError as error:
        raise Damaged(f"{uri}: {error}, {_ATTEMPTS} times; write it again") from None
    except _IncompleteError as error:
        raise CappyError(f"{uri}: {error}; check the permissions of the bucket policy") from None
    except (BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError) as error:
        raise CappyError(f"{uri}: {failure_reason(error)} ({type(error).__name__})") from None


def _is_transient(error: BaseException) -> bool:
    """Return whether the network or the store caused an error, so that the same request can succeed later."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or error.response.get("Error", {}).get("Code") in {*_DAMAGED_ON_ARRIVAL, _CONFLICT}
    network_errors = _DamagedError | BotoCoreError | ResponseParserError | urllib3.exceptions.HTTPError
    return isinstance(error, network_errors) and not isinstance(error, NoCredentialsError)


def list_page(uri: str, size: int = 1000, token: str | None = None) -> Any:
    """Return one page of the recursive listing of an s3:// folder."""
    more = {"ContinuationToken": token} if token else {}
    return s3_client().list_objects_v2(Bucket=bucket_and_key(uri)[0], Prefix=key_prefix(uri), MaxKeys=size, **more)


def list_objects(uri: str) -> Iterator[Any]:
    """Yield all objects below an s3:// folder, with folder markers. Each page of the listing has its own retries."""
    token = None
    while True:
        page = call_with_retries(uri, partial(list_page, uri, token=token))
        yield from page.get("Contents", ())
        token = page.get("NextContinuationToken")
        if not token:
            return


def get_object(uri: str) -> bytes:
    """Return the checked bytes of an object, in one attempt."""
    bucket, key = bucket_and_key(uri)
    answer = s3_client().get_object(Bucket=bucket, Key=key)
    data = bytes(answer["Body"].read())
    _check_digest(answer, hashlib.sha256(data), hashlib.md5(data, usedforsecurity=False))
    return data


def _check_digest(answer: Any, sha256: Any, md5: Any) -> None:
    """Raise `_DamagedError` if the received bytes do not match the hash that the store has for them, if any."""
    expected = answer["Metadata"].get("sha256")
    if expected and sha256.hexdigest() != expected:
        raise _DamagedError("its bytes do not match the SHA-256 recorded when it was written")
    # Objects from other tools have no SHA-256 in the metadata. The ETag is the MD5 if the object was uploaded in one part and
    # is not encrypted with a key of the user.
    tag = answer.get("ETag", "").strip('"')
    keyed = answer.get("ServerSideEncryption", "AES256") != "AES256" or answer.get("SSECustomerAlgorithm")
    if not expected and not keyed and re.fullmatch("[0-9a-f]{32}", tag) and md5.hexdigest() != tag:
        raise _DamagedError("its bytes do not match its ETag")


def download_object(uri: str, file: Path | None) -> str:
    """Read a whole object, into a local file if one is given, and return its SHA-256 in hex. Makes one attempt."""
    bucket, key = bucket_and_key(uri)
    answer = s3_client().get_object(Bucket=bucket, Key=key)
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with file.open("wb") if file else nullcontext() as sink:
        for chunk in answer["Body"].iter_chunks(_CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
            if sink:
                sink.write(chunk)
    _check_digest(answer, sha256, md5)
    return sha256.hexdigest()


def put_object(uri: str, data: bytes, **options: str) -> None:
    """Write an object in one attempt. `options` are further arguments of boto3's `put_object`, e.g. `IfNoneMatch="*"`."""
    bucket, key = bucket_and_key(uri)
    digest = hashlib.sha256(data)
    checksum = base64.b64encode(digest.digest()).decode()
    # The store rejects a body that does not match the checksum. Readers check their download by the hash in the metadata.
    s3_client().put_object(Bucket=bucket, Key=key, Body=data, ChecksumSHA256=checksum, Metadata={"sha256": digest.hexdigest()}, **options)


def has_sha256(uri: str, digest: str) -> bool:
    """Return whether an object exists and was written with this SHA-256."""
    bucket, key = bucket_and_key(uri)
    try:
        head = call_with_retries(uri, lambda: s3_client().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return False
    return bool(head["Metadata"].get("sha256") == digest)


def upload_object(file: str, bucket: str, key: str, extra: dict[str, Any]) -> None:
    """Upload a local file without a condition. boto3 sends a large file in parts and repeats each part itself."""
    from boto3.exceptions import S3UploadFailedError

    try:
        s3_client(_ATTEMPTS).upload_file(file, bucket, key, ExtraArgs=extra)
    except S3UploadFailedError as error:
        raise error.__context__ or error from None


def put_local_file(uri: str, file: Path, entry: dict[str, Any], condition: dict[str, str]) -> None:
    """Upload a local file under a condition (`IfMatch` or `IfNoneMatch`).

    boto3's `upload_file` takes no condition for a multipart upload, so the parts are sent here. `entry` has `bytes` and `sha256`.
    """
    if entry["bytes"] <= _CHUNK:
        put_object(uri, file.read_bytes(), **condition)
        return
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(uri)
    client = s3_client()
    target = {"Bucket": bucket, "Key": key}
    create = partial(client.create_multipart_upload, **target, ChecksumAlgorithm="SHA256", Metadata={"sha256": entry["sha256"]})
    target["UploadId"] = call_with_retries(uri, create)["UploadId"]
    size = max(_CHUNK, -(-entry["bytes"] // _MAX_PARTS))

    def send(number: int) -> dict[str, Any]:
        with file.open("rb") as source:
            source.seek((number - 1) * size)
            data = source.read(size)
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        part = partial(client.upload_part, **target, PartNumber=number, Body=data, ChecksumSHA256=checksum)
        return {"PartNumber": number, "ETag": call_with_retries(uri, part)["ETag"], "ChecksumSHA256": checksum}

    def complete() -> None:
        try:
            client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, **condition)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code")
            if code in _DAMAGED_PART_LIST:
                raise _DamagedError(f"the store rejected the list of its parts ({code})") from None
            # If the response to an earlier attempt was lost, the upload is already complete.
            if code != "NoSuchUpload" or not has_sha256(uri, entry["sha256"]):
                raise

    try:
        with ThreadPoolExecutor(_PART_THREADS) as pool:
            parts = list(pool.map(send, range(1, -(-entry["bytes"] // size) + 1)))
        call_with_retries(uri, complete)
    except BaseException:
        with suppress(Exception):  # keep the first error
            client.abort_multipart_upload(**target)
        raise


def delete_objects(bucket: str, keys: Sequence[str]) -> None:
    """Delete up to 1,000 objects in one attempt."""
    answer = s3_client().delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
    if answer.get("Errors"):
        raise _IncompleteError(f"{answer['Errors'][0].get('Key')} cannot be deleted ({answer['Errors'][0].get('Code')})")
