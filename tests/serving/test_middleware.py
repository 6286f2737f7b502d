"""The middleware over the gateway: request ids, the access log, keys, the Host header and the limits of URI and headers."""

from __future__ import annotations

import asyncio
import hashlib
import logging

import httpx
import pytest
from ray.serve._private import http_util

from cluster.config import Config
from serving.api_keys import create_key
from serving.gateway import build_api
from tests.serving.standin import BODY, Echo, client


async def test_with_keys_every_path_except_health_and_the_page_requires_one():
    key, sha256 = create_key()
    entry = {"name": "a", "sha256": sha256, "requests_per_minute": 4, "candidates_per_minute": 9}
    paths = [("POST", "/v1/chat/completions"), ("POST", "/v1/score"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/health/")]
    paths += [("GET", path) for path in ("/page.html", "/%2F", "/%2Fhealth", "/health/../v1/models")]
    async with client(Echo(), api_keys=[entry]) as http:
        for method, path in paths:
            refused = await http.request(method, path, json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/")).status_code == 200
        mine = {"headers": {"Authorization": f"Bearer {key}"}}
        assert (await http.post("/v1/chat/completions", json=BODY, **mine)).status_code == 200
        assert len((await http.get("/v1/models", **mine)).json()["data"]) == 3
        dear = await http.post("/v1/chat/completions", json=BODY, **mine)
        assert dear.status_code == 429 and "candidates" in dear.json()["error"]["message"] and int(dear.headers["retry-after"]) > 40
        assert (await http.get("/v1/models", headers={"X-API-Key": key})).status_code == 200
        assert (await http.get("/v1/models", **mine)).status_code == 429


async def test_each_answer_has_a_request_id_which_is_the_clients_if_that_is_a_plain_name():
    async with client(Echo(error=KeyError("secret"))) as http:
        assert (await http.get("/v1/models", headers={"X-Request-Id": "my-1"})).headers["x-request-id"] == "my-1"
        odd = (await http.get("/v1/models", headers={"X-Request-Id": "a b" * 99})).headers["x-request-id"]
        assert len(odd) == 32 and odd.isalnum()
        bug = await http.post("/v1/chat/completions", json=BODY)
        assert bug.headers["x-request-id"] in bug.json()["error"]["message"]
        assert (await http.get("/nothing")).headers["x-request-id"]


@pytest.fixture
def logged():
    """The lines of the access log. Other lines of Ray Serve's log, such as those of the readiness check, are left out."""

    class Keep(logging.Handler):
        def emit(self, record):
            if hasattr(record, "request_id"):
                records.append(record)

    records, keep, log = [], Keep(), logging.getLogger("ray.serve")
    level = log.level
    log.addHandler(keep)
    log.setLevel(logging.INFO)
    yield records
    log.removeHandler(keep)
    log.setLevel(level)


async def test_each_answer_is_a_line_of_the_access_log_without_prompt_or_key(logged):
    key, sha256 = create_key()
    mine = {"headers": {"Authorization": f"Bearer {key}", "X-Request-Id": "my-1"}}
    async with client(Echo(), api_keys=[{"name": "team-a", "sha256": sha256}]) as http:
        answer = await http.post("/v1/chat/completions", json={**BODY, "messages": [{"role": "user", "content": "private"}]}, **mine)
        for path in ("/v1/models/private", "/private?private=1"):
            await http.get(path, **mine)
            await http.get(path, headers={"X-API-Key": "private"})
    names = ("request_id", "method", "route", "status", "key", "bytes")
    lines = [tuple(getattr(record, name) for name in names) for record in logged]
    assert lines[0] == ("my-1", "POST", "/v1/chat/completions", 200, "team-a", len(answer.content))
    assert [line[1:5] for line in lines[1:]] == [
        ("GET", "/v1/models/{asked:path}", 404, "team-a"),
        ("GET", "other", 401, None),
        ("GET", "other", 404, "team-a"),
        ("GET", "other", 401, None),
    ]
    assert all(0 <= record.seconds < 60 for record in logged)
    assert not any(secret in str(vars(record)) for record in logged for secret in (key, sha256, "private"))


async def test_a_disconnected_client_is_in_the_access_log_and_access_log_false_logs_nothing(logged):
    backend = Echo(wait=30)
    async with client(backend) as http:
        request = asyncio.ensure_future(http.post("/v1/chat/completions", json=BODY))
        while not backend.prompts:
            assert not request.done()
            await asyncio.sleep(0.01)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert [(record.status, record.bytes, record.key) for record in logged] == [(499, 0, None)]
    async with client(Echo(), access_log=False) as http:
        await http.get("/health")
    assert len(logged) == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
    ],
)
async def test_a_server_without_keys_accepts_only_the_host_names_of_this_machine(host, status):
    async with client(Echo()) as http:
        answer = await http.get("/v1/models", headers={"Host": host})
        assert answer.status_code == status
        assert (await http.get("/health", headers={"Host": host})).status_code == 200
    if status == 403:
        assert answer.json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize(
    "serving", [{"api_keys": [{"name": "a", "sha256": hashlib.sha256(b"cappy-k").hexdigest()}]}, {"host": "0.0.0.0", "allow_no_keys": True}]
)
async def test_a_server_with_keys_or_behind_a_gateway_accepts_any_host_name(serving):
    async with client(Echo(), **serving) as http:
        answer = await http.get("/v1/models", headers={"Host": "llm.example", "Authorization": "Bearer cappy-k"})
        assert answer.status_code == 200


async def test_the_session_header_may_have_another_name(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_SESSION_ID_HEADER_KEY", "X_My_Session")
    api = build_api(Config(), Echo())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as http:
        answers = [await http.get("/v1/models", headers={name: "1"}) for name in ("x-my-session", "X-MY_SESSION", "x-mine")]
    assert [answer.status_code for answer in answers] == [400, 400, 200]
    assert (
        answers[0].json()["error"]["message"] == "the header x-my-session is reserved for the server's proxy; send the request without it"
    )


@pytest.mark.parametrize("sent", ["a b" * 99, "", "my-1", None, "\u00e9", "x" * 65])
async def test_behind_serves_proxy_an_answer_has_one_request_id(sent):
    """The proxy adds an id to a request that has none, and copies the client's header to the answer."""
    api = http_util.RequestIdMiddleware(build_api(Config(), Echo(), proxied=True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as http:
        headers = {} if sent is None else {"X-Request-Id": sent.encode("latin-1")}
        answer = await http.get("/v1/models", headers=headers)
    assert answer.status_code == 200
    (returned,) = answer.headers.get_list("x-request-id")
    assert sent is None or returned == sent
