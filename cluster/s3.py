"""Calls to S3 and compatible stores, with retries and with checksums in both directions. `cluster.s3_session` connects.

Every object carries its SHA-256 in the metadata: the store rejects a damaged upload, and each reader checks its download. A call
that fails for a transient reason is repeated.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity
import urllib3

from cluster.content_encoding import EncodingError, decode, unsupported
from cluster.errors import CappyError
from cluster.s3_session import endpoint_hint, is_anonymous, s3_client

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

T = TypeVar("T")

# Bytes of one read, and the smallest part of a multipart upload.
_CHUNK = 8 << 20
# The limit of S3 for the parts of one upload.
_MAX_PARTS = 10_000
_PART_THREADS = 4
# If each call fails with probability 1/3, all ten attempts fail once in 60,000 calls.
_ATTEMPTS = 10
_CHECK_ATTEMPTS = 4
# Error codes for an upload that was damaged or cut on the way. The same request can succeed.
_DAMAGED_ON_ARRIVAL = {
    "BadDigest",
    "InvalidDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "RequestTimeout",
}
# Error codes for too many requests.
_THROTTLED = {
    *("SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "RequestThrottledException"),
    *("RequestLimitExceeded", "TooManyRequests", "TooManyRequestsException", "BandwidthLimitExceeded", "ProvisionedThroughputExceeded"),
    *("OperationAborted", "PriorRequestNotComplete", "EC2ThrottledException", "TransactionInProgressException"),
}
# Error code for a request that was damaged on the way, or for a wrong secret key. The second attempt distinguishes them.
_SIGNATURE = "SignatureDoesNotMatch"
_SIGNATURE_ATTEMPTS = 2
# Error codes for valid credentials without the permission. A response to HEAD has no body, so its code is the status.
_DENIED = {"AccessDenied", "AllAccessDisabled", "Forbidden", "403"}
# Error codes for a damaged list of parts: a list of parts has no checksum.
_DAMAGED_PART_LIST = {"InvalidPart", "InvalidPartOrder", "MalformedXML"}


class Damaged(CappyError):
    """The stored bytes differ from the bytes that were written."""


class Denied(CappyError):
    """The credentials are valid, but do not permit the request."""


class _DamagedError(Exception):
    """The bytes that arrived differ from the bytes that were written. The call is repeated."""


class _IncompleteError(Exception):
    """The store carried out only a part of a request."""


def failure_reason(error: Exception) -> str:
    """Return one line for a failed S3 call. It omits the details of the request, which can contain key ids."""
    text = str(error)
    if any(mark in text for mark in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken")):
        return f"the object store{endpoint_hint()} refused the credentials; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if any(mark in text for mark in ("AccessDenied", "ACCESS_DENIED", "HTTP status 403", "(403)", "AllAccessDisabled")):
        if is_anonymous():
            return (
                f"the object store{endpoint_hint()} refused an anonymous request, and there are no AWS credentials; "
                f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        return f"the object store{endpoint_hint()} denied access; check the permissions of the credentials for this bucket and prefix"
    if "RequestTimeTooSkewed" in text:
        return f"the object store{endpoint_hint()} refused the request, because the clock of this machine is wrong; set the clock"
    response = getattr(error, "response", None) or {}
    if 400 <= response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) < 500:
        return f"the object store{endpoint_hint()} refused the request; check the bucket, AWS_REGION and the permissions"
    return f"the object store{endpoint_hint()} cannot be reached; check AWS_ENDPOINT_URL, the network and the bucket"


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Return the bucket and the key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def key_prefix(uri: str) -> str:
    """Return the common prefix of the keys of all objects below a URI."""
    key = bucket_and_key(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def call_with_retries(uri: str, call: Callable[[], T], attempts: int | None = None) -> T:
    """Return the result of an S3 call, repeated after transient errors; see `_is_transient`.

    Raises `FileNotFoundError` if the object or bucket is missing, `Damaged` if every attempt received damaged bytes, and
    `CappyError` if the store refuses the request or fails on every attempt. A failed condition (status 412) raises `ClientError`.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    limit = attempts or _ATTEMPTS
    signature_errors = 0

    def is_last(state: tenacity.RetryCallState) -> bool:
        nonlocal signature_errors
        error = state.outcome.exception() if state.outcome else None
        signature_errors += isinstance(error, ClientError) and error_code(error) == _SIGNATURE
        return state.attempt_number >= limit or signature_errors >= _SIGNATURE_ATTEMPTS

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=5),
        stop=is_last,
        reraise=True,
    )
    try:
        return retrying(call)
    except ClientError as error:
        code = error_code(error)
        if code in ("NoSuchKey", "404", "NoSuchBucket", "NoSuchUpload"):
            raise FileNotFoundError(uri) from None
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
            raise
        raise (Denied if code in _DENIED else CappyError)(f"{uri}: {failure_reason(error)} (error code {code})") from None
    except _DamagedError as error:
        raise Damaged(f"{uri}: {error}, {limit} times; write it again") from None
    except _IncompleteError as error:
        raise CappyError(f"{uri}: {error}; check the permissions of the bucket policy") from None
    except (BotoCoreError, ResponseParserError, urllib3.exceptions.HTTPError) as error:
        raise CappyError(f"{uri}: {failure_reason(error)} ({type(error).__name__})") from None


def read_with_retries(uri: str, call: Callable[[], T]) -> T:
    """Return the result of `call_with_retries` for a call that reads the object `uri`.

    Without the permission to list the whole bucket, S3 denies reads of missing objects. The listing of the prefix then decides whether
    the object is missing: `FileNotFoundError`.
    """
    try:
        return call_with_retries(uri, call)
    except Denied:
        folder, _, name = uri.rpartition("/")
        if any(each["Key"] == bucket_and_key(uri)[1] for each in list_objects(folder, name)):
            raise
        raise FileNotFoundError(uri) from None


def check_access(uri: str) -> None:
    """Raise `FileNotFoundError` if the bucket of a URI is missing, and `CappyError` if the credentials can read nothing at the URI."""
    try:
        call_with_retries(uri, partial(list_page, uri, 1), _CHECK_ATTEMPTS)
    except Denied:
        bucket, key = bucket_and_key(uri)
        if not key:
            raise
        try:  # the permission to read one object is enough for a file
            call_with_retries(uri, lambda: s3_client().head_object(Bucket=bucket, Key=key))
        except FileNotFoundError:
            return
        except Denied as error:
            raise Denied(f"{error}; it needs s3:ListBucket and s3:GetObject") from None


def error_code(error: ClientError) -> str:
    """Return the error code of the store."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _is_transient(error: BaseException) -> bool:
    """Return whether the network or the store caused an error, so that the same request can succeed later."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 409, 429) or error_code(error) in {*_DAMAGED_ON_ARRIVAL, *_THROTTLED, _SIGNATURE}
    settings = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.ProfileNotFound,
        exceptions.ParamValidationError,
        exceptions.SSOError,
    )
    network_errors = _DamagedError | exceptions.BotoCoreError | ResponseParserError | urllib3.exceptions.HTTPError
    return isinstance(error, network_errors) and not isinstance(error, settings)


def list_page(uri: str, size: int = 1000, token: str | None = None, name: str = "") -> Any:
    """Return one page of the recursive listing of an s3:// folder; with `name`, of the paths in it that start with `name`."""
    more = {"ContinuationToken": token} if token else {}
    return s3_client().list_objects_v2(Bucket=bucket_and_key(uri)[0], Prefix=key_prefix(uri) + name, MaxKeys=size, **more)


def list_objects(uri: str, name: str = "") -> Iterator[Any]:
    """Yield all objects of `list_page`, with folder markers. Each page of the listing has its own retries."""
    token = None
    while True:
        page = call_with_retries(uri, partial(list_page, uri, token=token, name=name))
        yield from page.get("Contents", ())
        token = page.get("NextContinuationToken")
        if not token:
            return


def get_object(uri: str) -> bytes:
    """Return the checked content of an object, in one attempt."""
    return b"".join(_read_checked(uri))


def download_object(uri: str, file: Path | None) -> str:
    """Read a whole object, into a local file if one is given, and return its SHA-256 in hex. Makes one attempt."""
    digest = hashlib.sha256()
    with file.open("wb") if file else nullcontext() as sink:
        for chunk in _read_checked(uri):
            digest.update(chunk)
            if sink:
                sink.write(chunk)
    return digest.hexdigest()


def _read_checked(uri: str) -> Iterator[bytes]:
    """Yield the content of an object. Raises `_DamagedError` at its end if the stored bytes do not match the hash that the store has."""
    bucket, key = bucket_and_key(uri)
    answer = s3_client().get_object(Bucket=bucket, Key=key)
    encoding = answer.get("ContentEncoding", "")
    if unsupported(encoding):
        raise CappyError(f"{uri} is stored with Content-Encoding: {encoding}, only gzip can be read; store it without an encoding")
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def stored() -> Iterator[bytes]:
        for chunk in answer["Body"].iter_chunks(_CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
            yield chunk
        _check_digest(answer, sha256, md5)

    try:
        yield from decode(stored(), encoding, key)
    except EncodingError as error:
        raise _DamagedError(str(error)) from None


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
        head = read_with_retries(uri, lambda: s3_client().head_object(Bucket=bucket, Key=key))
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
            code = error_code(error)
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


def list_uploads(uri: str) -> Iterator[tuple[str, str]]:
    """Yield the path below a URI and the id of every multipart upload that is neither complete nor aborted."""
    start, bucket = len(key_prefix(uri)), bucket_and_key(uri)[0]
    marks: dict[str, str] = {}
    while True:
        call = partial(s3_client().list_multipart_uploads, Bucket=bucket, Prefix=key_prefix(uri), **marks)
        page = call_with_retries(uri, call)
        found = page.get("Uploads", [])
        for each in found:
            yield each["Key"][start:], each["UploadId"]
        if not page.get("IsTruncated") or not found:
            return
        last = found[-1]  # some stores send no markers
        marks = {
            "KeyMarker": page.get("NextKeyMarker") or last["Key"],
            "UploadIdMarker": page.get("NextUploadIdMarker") or last["UploadId"],
        }


def abort_upload(uri: str, upload: str) -> None:
    """Abort a multipart upload of an object: the store deletes its parts. A missing upload is not an error."""
    bucket, key = bucket_and_key(uri)
    try:
        call_with_retries(uri, lambda: s3_client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload))
    except FileNotFoundError:
        return


def delete_objects(bucket: str, keys: Sequence[str]) -> None:
    """Delete up to 1,000 objects in one attempt."""
    answer = s3_client().delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
    if answer.get("Errors"):
        raise _IncompleteError(f"{answer['Errors'][0].get('Key')} cannot be deleted ({answer['Errors'][0].get('Code')})")
