"""What a request may be as HTTP, before anyone reads what it says: its address, its headers, its body. Knows no models."""

from __future__ import annotations

import asyncio
import os

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.config import ServingConfig
from serving.protocol import ApiError

MAX_ADDRESS = 8192
"""Bytes of path and query."""
MAX_HEADERS = 65_536
"""Bytes of all headers together."""
STEERING = ("x-request-disconnect-disabled", "x-request-timeout-seconds", "serve-multiplexed-model-id", "x-session-id")
"""Headers by which a client changes what Ray Serve's proxy does: it goes on with a request whose client is gone, takes another time limit,
chooses the replica. Serve takes `_` for `-` in some of them."""
STEERING_PREFIX = "x-serve-router-"
"""Serve's own headers between its load balancer and its router begin with this."""


class RequestLimitsMiddleware:
    """Turns away requests whose address or headers are larger than any client of ours sends, or that steer Serve's proxy.

    The proxy has read its headers by then. Refused at once, a request leaves nothing that the proxy could keep running.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # The operator can give Serve's header for sessions another name.
        self._steering = {*STEERING, _dashed(os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", ""))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = _too_large(scope) or self._steers(scope)
            if error is not None:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _steers(self, scope: Scope) -> ApiError | None:
        for name in {name.decode("latin-1") for name, _ in scope["headers"]}:
            if _dashed(name) in self._steering or _dashed(name).startswith(STEERING_PREFIX):
                return ApiError(f"the header {name[:80]} is not for clients; send the request without it", code="unsupported_header")
        return None


def _dashed(name: str) -> str:
    return name.lower().replace("_", "-")


async def read(http: Request, serving: ServingConfig) -> bytes:
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


def _too_large(scope: Scope) -> ApiError | None:
    address = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    if address > MAX_ADDRESS:
        return ApiError(
            f"the address has {address:,} bytes, more than {MAX_ADDRESS:,}; all requests go in the body", 414, code="uri_too_long"
        )
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    if headers > MAX_HEADERS:
        return ApiError(f"the headers have {headers:,} bytes, more than {MAX_HEADERS:,}", 431, code="headers_too_large")
    return None
