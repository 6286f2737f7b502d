"""ASGI middleware of the gateway: request log, authentication, limits of the address and the headers. Imports no Ray."""

from __future__ import annotations

import logging
import os
import re
import time
import uuid

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from serving.api_keys import Caller, Keyring
from serving.backend import ApiError
from serving.prometheus import Metrics

logger = logging.getLogger("ray.serve")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PUBLIC_PATHS = ("/", "/health")
"""Paths that want no key: they tell nothing and cost nothing."""
_SERVE_LOG = {"skip_context_filter": True, "log_to_stderr": False}
"""What Ray Serve reads in a record: leave its fields alone, and write it to the replica's log file only."""


class RequestLogMiddleware:
    """Gives each request a number (`X-Request-Id`: the client's own where it is a plain one), counts its answer and logs it.

    `proxied`: in front is Ray Serve's proxy, which gives a request without a number one and puts the number it came with in the answer.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool, proxied: bool) -> None:
        self.app, self.metrics, self.access_log, self.proxied = app, metrics, access_log, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        scope["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        start, status, size = time.monotonic(), 0, 0

        async def numbered(message: Event) -> None:
            nonlocal status, size
            size += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (self.proxied and scope["request_id"] == given):
                    MutableHeaders(scope=message)["X-Request-Id"] = scope["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, numbered)
        except Exception as error:
            if status:  # too late to say anything
                raise
            told = internal_error(Request(scope), error)
            await JSONResponse(told.body, told.status)(scope, receive, numbered)
        finally:
            # The pattern, not the path: that is of the client's making. nginx's 499: it went away before an answer began.
            route, status = getattr(scope.get("route"), "path", "other"), status or 499
            self.metrics.count_request(route, status)
            if self.access_log:
                caller: Caller | None = scope.get("caller")
                answered = {
                    "request_id": scope["request_id"],
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(time.monotonic() - start, 4),
                    "bytes": size,
                    "key": caller and caller.name,
                }
                logger.info("%s %s %d", scope["method"], route, status, extra=answered | _SERVE_LOG)


class AuthMiddleware:
    """Lets those with a known key in, to every path but /health and the page; the scope's `caller` says who they are.

    With `own_names` it also wants one of these in the header Host: without keys, a page of another site could otherwise ask through
    its reader's browser, once it has a name of its own resolve to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, own_names: frozenset[str] | None) -> None:
        self.app, self.keyring, self.own_names = app, keyring, own_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _PUBLIC_PATHS:
            headers = Headers(scope=scope)
            try:
                if self.own_names and _host_name(headers.get("host", "")) not in self.own_names:
                    names = ", ".join(sorted(self.own_names))
                    raise ApiError(f"without API keys this server answers to {names} alone, by the header Host", 403, code="forbidden")
                scope["caller"] = self.keyring.authenticate(headers.get("authorization"), headers.get("x-api-key"))
                scope["caller"].count_request()
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _host_name(host: str) -> str:
    """Return a Host header without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).strip("[]").lower()


def internal_error(http: Request, error: Exception) -> ApiError:
    """Hide a failure of ours behind the request's number, which finds it in the log."""
    number = http.scope["request_id"]
    logger.error("%s %s failed, request %s", http.method, http.scope["path"], number, exc_info=error)
    return ApiError(f"the server failed; its log has the reason under request {number}", 500, code="internal_error")


MAX_URI_BYTES = 8192
"""Bytes of path and query."""
MAX_HEADER_BYTES = 65_536
"""Bytes of all headers together."""
PROXY_CONTROL_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds", "serve-multiplexed-model-id", "x-session-id")
"""Headers by which a client changes what Ray Serve's proxy does: it goes on with a request whose client is gone, takes another time limit,
chooses the replica. Serve takes `_` for `-` in some of them."""
PROXY_CONTROL_PREFIX = "x-serve-router-"
"""Serve's own headers between its load balancer and its router begin with this."""


class RequestLimitsMiddleware:
    """Turns away requests whose address or headers are larger than any client of ours sends, or that steer Serve's proxy.

    The proxy has read its headers by then. Refused at once, a request leaves nothing that the proxy could keep running.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # The operator can give Serve's header for sessions another name.
        self._steering = {*PROXY_CONTROL_HEADERS, _normalize_header(os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", ""))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = _too_large(scope) or self._steers(scope)
            if error is not None:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _steers(self, scope: Scope) -> ApiError | None:
        for name in {name.decode("latin-1") for name, _ in scope["headers"]}:
            if _normalize_header(name) in self._steering or _normalize_header(name).startswith(PROXY_CONTROL_PREFIX):
                return ApiError(f"the header {name[:80]} is not for clients; send the request without it", code="unsupported_header")
        return None


def _normalize_header(name: str) -> str:
    return name.lower().replace("_", "-")


def _too_large(scope: Scope) -> ApiError | None:
    address = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    if address > MAX_URI_BYTES:
        return ApiError(
            f"the address has {address:,} bytes, more than {MAX_URI_BYTES:,}; all requests go in the body", 414, code="uri_too_long"
        )
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    if headers > MAX_HEADER_BYTES:
        return ApiError(f"the headers have {headers:,} bytes, more than {MAX_HEADER_BYTES:,}", 431, code="headers_too_large")
    return None
