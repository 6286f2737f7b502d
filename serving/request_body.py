"""Reads the body of a request within the limits of size, time and media type. Imports no Ray."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from cluster.config import ServingConfig
from serving.backend import ApiError


async def read_body(http: Request, serving: ServingConfig) -> bytes:
    """Return the body.

    Raises `ApiError`: 415 for what does not say it is plain JSON (a web page elsewhere can send anything else from its visitor's
    browser, unasked), 413 above `serving.max_body_bytes`, before more of it is held in memory, 408 where it is not here within
    `serving.body_timeout_s`, 400 where the client breaks off.
    """
    kind = http.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            f"Content-Type is {kind[:80]!r}; send JSON with the header Content-Type: application/json",
            415,
            code="unsupported_media_type",
        )
    coding = http.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ApiError(f"Content-Encoding {coding[:80]!r} is not supported; send the JSON as it is", 415, code="unsupported_media_type")
    limit = serving.max_body_bytes
    too_large = ApiError(f"the body is larger than {limit:,} bytes (serving.max_body_bytes); send less", 413, code="body_too_large")
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
        late = f"the body was not here within {serving.body_timeout_s:g} s (serving.body_timeout_s); send it at once"
        raise ApiError(late, 408, code="body_timeout") from None
    except ClientDisconnect:
        raise ApiError("the client went away before its body was here", code="incomplete_body") from None
    return bytes(body)
