"""Reads the body of a request within the limits of media type, size and time. Imports no Ray."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from cluster.config import ServingConfig
from serving.backend import ApiError


async def read_body(http: Request, serving: ServingConfig) -> bytes:
    """Return the body of a request.

    Raises `ApiError`:
    - 415 if the request does not declare plain JSON. A browser sends any other media type across origins without a check, so a
      page of another site could send requests in its visitor's name;
    - 413 above `serving.max_body_bytes`, before more of the body is in memory;
    - 408 if the body does not arrive within `serving.body_timeout_s`;
    - 400 if the client disconnects.
    """
    media_type = http.headers.get("content-type", "")
    if media_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            f"Content-Type is {media_type[:80]!r}; send JSON with the header Content-Type: application/json",
            415,
            code="unsupported_media_type",
        )
    encoding = http.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(
            f"Content-Encoding {encoding[:80]!r} is not supported; send the JSON uncompressed", 415, code="unsupported_media_type"
        )
    limit = serving.max_body_bytes
    too_large = ApiError(
        f"the body is larger than {limit:,} bytes (serving.max_body_bytes); send a smaller body", 413, code="body_too_large"
    )
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and float(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(serving.body_timeout_s):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        message = f"the body did not arrive within {serving.body_timeout_s:g} s (serving.body_timeout_s); send it without pauses"
        raise ApiError(message, 408, code="body_timeout") from None
    except ClientDisconnect:
        raise ApiError("the client disconnected before the body was complete; send it again", code="incomplete_body") from None
    return bytes(body)
