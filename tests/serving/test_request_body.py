import asyncio

import pytest
from fastapi import Request

from cluster.config import ServingConfig
from serving.backend import ApiError
from serving.request_body import read_body

JSON = {"content-type": "application/json; charset=utf-8"}
SERVING = ServingConfig(max_body_bytes=1024, body_timeout_s=0.05)


def request(headers: dict[str, str], *messages: dict) -> Request:
    """Return a request that receives `messages`, and after them nothing."""
    waiting = list(messages)

    async def receive() -> dict:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    scope = {"type": "http", "method": "POST", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    return Request(scope, receive)


def chunk(body: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_in_chunks_is_joined():
    assert await read_body(request(JSON, chunk(b'{"a"', more=True), chunk(b": 1}")), SERVING) == b'{"a": 1}'


async def test_a_body_of_exactly_the_limit_is_accepted():
    assert await read_body(request(JSON, chunk(b"x" * 1024)), SERVING) == b"x" * 1024


@pytest.mark.parametrize(
    ("headers", "messages", "status", "code", "message"),
    [
        ({}, [chunk(b"{}")], 415, "unsupported_media_type", "Content-Type is ''; send JSON with the header"),
        ({"content-type": "text/plain"}, [chunk(b"{}")], 415, "unsupported_media_type", "Content-Type is 'text/plain'"),
        ({**JSON, "content-encoding": "gzip"}, [chunk(b"{}")], 415, "unsupported_media_type", "send the JSON uncompressed"),
        ({**JSON, "content-length": "1025"}, [], 413, "body_too_large", r"1,024 bytes \(serving.max_body_bytes\); send a smaller body"),
        (JSON, [chunk(b"x" * 1000, more=True), chunk(b"x" * 25, more=True)], 413, "body_too_large", "larger than 1,024 bytes"),
        (JSON, [chunk(b"{", more=True)], 408, "body_timeout", r"did not arrive within 0.05 s \(serving.body_timeout_s\)"),
        (JSON, [chunk(b"{", more=True), {"type": "http.disconnect"}], 400, "incomplete_body", "the client disconnected"),
    ],
)
async def test_a_body_outside_the_limits_is_an_error_with_its_own_status(headers, messages, status, code, message):
    with pytest.raises(ApiError, match=message) as caught:
        await read_body(request(headers, *messages), SERVING)
    assert (caught.value.status, caught.value.code) == (status, code)
