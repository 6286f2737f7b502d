"""ASGI middleware of the gateway: request log, authentication, limits of the URI and the headers. Imports no Ray."""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Collection

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from serving.api_keys import Caller, Keyring
from serving.backend import ApiError
from serving.prometheus import Metrics

logger = logging.getLogger("ray.serve")

MAX_URI_BYTES = 8192
"""Limit of path and query together."""
MAX_HEADER_BYTES = 65_536
"""Limit of all headers together."""
PROXY_CONTROL_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds", "serve-multiplexed-model-id", "x-session-id")
"""Headers that control Ray Serve's proxy.

With them a client can keep its request running after a disconnect, change the timeout, or choose the replica. Serve reads `_` as `-`
in some of them.
"""
PROXY_CONTROL_PREFIX = "x-serve-router-"
"""Prefix of the headers that Serve's load balancer sends to its router."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SERVE_LOG = {"skip_context_filter": True, "log_to_stderr": False}
"""Fields of a log record that Ray Serve reads: keep the record's other fields, and write it to the replica's log file only."""
_CLIENT_CLOSED = 499
"""nginx's status for a client that disconnected before the response started."""


class RequestLogMiddleware:
    """Gives each request an id, counts the response, and writes one line to the access log.

    The id is the client's `X-Request-Id` if that is a plain name, or else a random one. The response carries it in the same header.
    `proxied` is true behind Ray Serve's proxy. The proxy adds an id to a request without one, and always copies the client's header to
    the response. So an odd header comes back as it was, and only the log has the random id.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool, proxied: bool) -> None:
        self.app, self.metrics, self.access_log, self.proxied = app, metrics, access_log, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client_id = Headers(scope=scope).get("x-request-id", "")
        scope["request_id"] = client_id if _REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex
        start, status, size = time.monotonic(), 0, 0

        async def send_with_id(message: Event) -> None:
            nonlocal status, size
            size += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self.proxied:
                    MutableHeaders(scope=message)["X-Request-Id"] = scope["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # the response has started, so its status cannot change
                raise
            failure = internal_error(Request(scope), error)
            await JSONResponse(failure.body, failure.status)(scope, receive, send_with_id)
        finally:
            # The route's pattern: a path is the client's text and would make metrics and logs unbounded.
            route, status = getattr(scope.get("route"), "path", "other"), status or _CLIENT_CLOSED
            self.metrics.count_request(route, status)
            if self.access_log:
                caller: Caller | None = scope.get("caller")
                fields = {
                    "request_id": scope["request_id"],
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(time.monotonic() - start, 4),
                    "bytes": size,
                    "key": caller and caller.name,
                }
                logger.info("%s %s %d", scope["method"], route, status, extra=fields | _SERVE_LOG)


class AuthMiddleware:
    """Rejects requests without a valid key, except on the `public` paths, and sets the scope's `caller`.

    With `own_names` the Host header must be one of them. A server without keys needs this check against DNS rebinding. In that
    attack a web site points its own name at this machine and sends requests from its visitor's browser.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, own_names: frozenset[str] | None, public: Collection[str]) -> None:
        self.app, self.keyring, self.own_names, self.public = app, keyring, own_names, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.public:
            headers = Headers(scope=scope)
            try:
                if self.own_names and _host_name(headers.get("host", "")) not in self.own_names:
                    names = ", ".join(sorted(self.own_names))
                    raise ApiError(
                        f"the Host header does not name this machine; a server without API keys accepts only {names}", 403, code="forbidden"
                    )
                scope["caller"] = self.keyring.authenticate(headers.get("authorization"), headers.get("x-api-key"))
                scope["caller"].count_request()
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class RequestLimitsMiddleware:
    """Rejects a request with a URI or headers above the limits, or with a header that controls Serve's proxy.

    The proxy has read its headers by then. An immediate rejection leaves no work that the proxy could keep running.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # The operator can rename Serve's session header.
        self._control_headers = {*PROXY_CONTROL_HEADERS, _normalize_header(os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", ""))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = _size_error(scope) or self._header_error(scope)
            if error is not None:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _header_error(self, scope: Scope) -> ApiError | None:
        for name in {name.decode("latin-1") for name, _ in scope["headers"]}:
            normalized = _normalize_header(name)
            if normalized in self._control_headers or normalized.startswith(PROXY_CONTROL_PREFIX):
                message = f"the header {name[:80]} is reserved for the server's proxy; send the request without it"
                return ApiError(message, code="unsupported_header")
        return None


def internal_error(http: Request, error: Exception) -> ApiError:
    """Log an unexpected error and return the error for the client, which carries the request id and no details."""
    request_id = http.scope["request_id"]
    logger.error("%s %s failed, request %s", http.method, http.scope["path"], request_id, exc_info=error)
    return ApiError(f"internal error; the server's log has the cause under request {request_id}", 500, code="internal_error")


def _host_name(host: str) -> str:
    """Return a Host header without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).strip("[]").lower()


def _normalize_header(name: str) -> str:
    return name.lower().replace("_", "-")


def _size_error(scope: Scope) -> ApiError | None:
    """Return the error for a URI or headers above the limits, None if there is none."""
    uri_bytes = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    if uri_bytes > MAX_URI_BYTES:
        message = f"the URI has {uri_bytes:,} bytes, above the limit of {MAX_URI_BYTES:,}; send the request in the body"
        return ApiError(message, 414, code="uri_too_long")
    header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
    if header_bytes > MAX_HEADER_BYTES:
        message = f"the headers have {header_bytes:,} bytes, above the limit of {MAX_HEADER_BYTES:,}; send fewer or shorter headers"
        return ApiError(message, 431, code="headers_too_large")
    return None
