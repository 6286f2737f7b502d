"""Send malformed and malicious requests to a server and compare its answers with the documented ones.

    python -m benchmarks.hostile http://127.0.0.1:8000 --key "$CAPPY_API_KEY"

Each request is raw bytes over a separate connection. Prints a table of requests and answers; exits with an error if an answer is wrong.
The server must have the default `serving` settings. Without `--key`, requests about keys are left out. Without a URL, the benchmark
starts a server.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.config import ServingConfig, load

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Answer:
    """A server's answer. `code` is the code in OpenAI's error body, or None. Status 0: the connection closed without an answer."""

    status: int
    code: str | None
    body: bytes
    seconds: float


@dataclass(frozen=True)
class HostileRequest:
    """A request and its documented answer. `drip` is sent after it, one byte every 0.1 s until an answer arrives."""

    name: str
    status: int
    code: str | None
    sent: bytes
    drip: bytes = b""


def send(url: str, hostile: HostileRequest, timeout_s: float = 60.0) -> Answer:
    """Send the bytes of a request and return the first answer."""
    target = urlsplit(url)
    start = time.monotonic()
    with socket.create_connection((target.hostname or "127.0.0.1", target.port or 80), timeout=timeout_s) as wire:
        try:
            wire.sendall(hostile.sent)
            if hostile.drip:
                _drip(wire, hostile.drip)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may answer before it has read the whole request
        response = HTTPResponse(wire, method=hostile.sent.split(b" ", 1)[0].decode("latin-1"))
        try:
            response.begin()
            body = response.read()
        except (HTTPException, ConnectionResetError):
            return Answer(0, None, b"", time.monotonic() - start)
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    return Answer(response.status, code, body, time.monotonic() - start)


def _drip(wire: socket.socket, rest: bytes) -> None:
    wait_s = wire.gettimeout()
    wire.settimeout(0.1)
    for byte in rest:
        wire.send(bytes([byte]))
        try:
            wire.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            continue
        break
    wire.settimeout(wait_s)


class RequestWriter:
    """Write requests as bytes, with an Authorization header if there is a key."""

    def __init__(self, key: str | None) -> None:
        self.key = [f"Authorization: Bearer {key}"] if key else []

    def bare(self, line: str, *headers: str, body: bytes = b"") -> bytes:
        """Return a request with the Host header and exactly these headers."""
        return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode() + body

    def get(self, path: str, *headers: str, method: str = "GET") -> bytes:
        return self.bare(f"{method} {path}", *self.key, *headers)

    def post(self, path: str, body: Any, *headers: str, kind: str | None = "application/json", length: int | None = None) -> bytes:
        """Return a POST of `body`: bytes unchanged, any other value as JSON. `length` replaces the correct Content-Length."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kinds = [f"Content-Type: {kind}"] if kind else []
        size = f"Content-Length: {len(data) if length is None else length}"
        return self.bare(f"POST {path}", *self.key, *kinds, size, *headers, body=data)

    def chunked(self, body: bytes) -> bytes:
        """Return a POST to the chat route with `Transfer-Encoding: chunked`; `body` holds the chunks with their sizes."""
        return self.bare(f"POST {CHAT}", *self.key, "Content-Type: application/json", "Transfer-Encoding: chunked", body=body)


def hostile_requests(serving: ServingConfig, key: str | None = None) -> list[HostileRequest]:
    """Return all requests for a server with these settings; requests about keys only with a `key`."""
    write = RequestWriter(key)
    return [
        *_bodies(write, serving),
        *_fields(write, serving),
        *_texts(write, serving),
        *_scoring(write, serving),
        *_http(write, serving),
        *(_keys(write) if key else ()),
    ]


def _bodies(write: RequestWriter, serving: ServingConfig) -> Iterator[HostileRequest]:
    """Yield bodies that are invalid JSON, or JSON made to exhaust its parser."""
    good = {"model": serving.model_name, "messages": HI}

    def raw(more: bytes) -> bytes:
        return write.post(CHAT, json.dumps(good)[:-1].encode() + b", " + more + b"}")

    for name, body in {
        "no body": b"",
        "half a body": b'{"model": "cappy", "mess',
        "a list": b"[]",
        "form fields under a JSON header": b"model=cappy&n=1",
        "bytes that are not UTF-8": b'{"model": "\xff\xfe"}',
        "UTF-16": json.dumps(good).encode("utf-16"),
        "100,000 open brackets": b"[" * 100_000,
    }.items():
        yield HostileRequest(name, 400, "invalid_json", write.post(CHAT, body))
    for name, more in {
        "NaN": b'"temperature": NaN',
        "-Infinity": b'"top_p": -Infinity',
        "nested 40 deep in an unused field": b'"metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 40,
        "a number of 100,000 digits": b'"seed": ' + b"9" * 100_000,
        "a field given twice": b'"n": 1, "n": 64',
        "half of a surrogate pair": b'"user": "\\ud800"',
        "100,000 small objects": b'"metadata": [' + b'{"a":{}},' * 50_000 + b"0]",
        "an object of 50,000 names": b'"cappy": ' + json.dumps({f"a{n}": 0 for n in range(50_000)}).encode(),
    }.items():
        yield HostileRequest(name, 400, "invalid_json", raw(more))
    yield HostileRequest("1e999, infinite when parsed", 400, "invalid_value", raw(b'"temperature": 1e999'))
    limit = serving.max_body_bytes
    yield HostileRequest("a body above the limit", 413, "body_too_large", write.post(CHAT, {**good, "user": "x" * limit}))
    yield HostileRequest("Content-Length of 1 TB, no body", 413, "body_too_large", write.post(CHAT, b"", length=10**12))
    endless = b"".join(b"10000\r\n" + b" " * 65_536 + b"\r\n" for _ in range(limit // 65_536 + 1))
    yield HostileRequest("more chunks than the limit allows", 413, "body_too_large", write.chunked(endless))
    yield HostileRequest("a body that stops before its end", 408, "body_timeout", write.post(CHAT, b'{"model":', length=100))
    yield HostileRequest("a byte of body every 0.1 s", 408, "body_timeout", write.post(CHAT, b"{", length=2000), drip=b" " * 1000)
    yield HostileRequest("a wrong chunk size", 400, None, write.chunked(b"zz\r\n{}\r\n0\r\n\r\n"))


def _fields(write: RequestWriter, serving: ServingConfig) -> Iterator[HostileRequest]:
    """Yield chat requests above a limit, or with fields that are not allowed."""
    most = serving.max_candidates
    for name, code, fields in (
        ("n = 0", "invalid_value", {"n": 0}),
        ("n = 10^9", "invalid_value", {"n": 10**9}),
        ("n = 1.5", "invalid_value", {"n": 1.5}),
        ("n = true", "invalid_value", {"n": True}),
        ("one candidate more than allowed", "invalid_value", {"cappy": {"candidates": most + 1}}),
        ("max_tokens = 10^12", "invalid_value", {"max_tokens": 10**12}),
        (
            "candidates x tokens above the limit",
            "invalid_value",
            {"cappy": {"candidates": most}, "max_tokens": serving.max_sampled_tokens // most + 1},
        ),
        (
            "a prompt with more characters than allowed",
            "context_length_exceeded",
            {"messages": [{**HI[0], "content": "x " * serving.max_prompt_chars}]},
        ),
        ("3,000 messages", "invalid_value", {"messages": HI * 3000}),
        ("200,000 messages that are numbers", "invalid_value", {"messages": [0] * 200_000}),
        ("an unsupported role", "invalid_value", {"messages": [{"role": "tool", "content": "x"}]}),
        (
            "an image",
            "invalid_value",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
        ),
        ("17 stop strings", "invalid_value", {"stop": [str(n) for n in range(17)]}),
        ("a stop string of 100,000 characters", "invalid_value", {"stop": "x" * 100_000}),
        ("logprobs", "unsupported_parameter", {"logprobs": True, "top_logprobs": 20}),
        ("guided decoding under its old name", "unsupported_parameter", {"guided_regex": "(a+)+" * 1000}),
        ("chat_template_kwargs", "unsupported_parameter", {"chat_template_kwargs": {"a": "x" * 10_000}}),
        ("a literal extra_body", "unsupported_parameter", {"extra_body": {"n": 10**9}}),
        ("an unknown field of 100,000 characters", "unsupported_parameter", {"x" * 100_000: "y" * 100_000}),
        ("two constraints", "invalid_value", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
        ("a regular expression of 100,000 characters", "invalid_value", {"structured_outputs": {"regex": "(a?)" * 25_000}}),
        ("10,000 choices", "invalid_value", {"structured_outputs": {"choice": [str(n) for n in range(10_000)]}}),
        ("65 stop token ids", "invalid_value", {"stop_token_ids": list(range(65))}),
        ("a stop token id of 10^12", "invalid_value", {"stop_token_ids": [10**12]}),
        ("min_tokens above max_tokens", "invalid_value", {"min_tokens": 10**9, "max_tokens": 5}),
        (
            "a tool call beside text",
            "invalid_value",
            {"messages": [*HI, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "type": "function"}]}, *HI]},
        ),
        (
            "an image beside the text of a part",
            "invalid_value",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "file:///etc/passwd"}}]}]},
        ),
        ("an unknown option of 100,000 characters", "invalid_value", {"cappy": {"x" * 100_000: 1}}),
    ):
        yield HostileRequest(name, 400, code, write.post(CHAT, {"model": serving.model_name, "messages": HI, **fields}))
    for model in ("../../etc/passwd", "s3://bucket/model", "x" * 100_000):
        yield HostileRequest(f"model = {model[:20]}", 404, "model_not_found", write.post(CHAT, {"model": model, "messages": HI}))
    nul = {"model": serving.model_name, "messages": [{"role": "user", "content": "a\0b"}], "max_tokens": 2, "cappy": {"candidates": 2}}
    yield HostileRequest("NUL in a prompt, which is allowed", 200, None, write.post(CHAT, nul))


def _texts(write: RequestWriter, serving: ServingConfig) -> Iterator[HostileRequest]:
    """Yield text completions above a limit, or with parameters that are not supported."""
    for name, code, fields in (
        ("256 prompts, which together have too many candidates", "invalid_value", {"prompt": ["x"] * 256}),
        ("50,000 prompts in one request", "invalid_value", {"prompt": ["x"] * 50_000}),
        ("a prompt of token ids", "invalid_value", {"prompt": [1 << 40]}),
        ("an empty prompt", "invalid_value", {"prompt": ""}),
        ("a prompt with more characters than allowed", "context_length_exceeded", {"prompt": "x " * serving.max_prompt_chars}),
        ("echo of the prompt", "unsupported_parameter", {"prompt": "x", "echo": True}),
        ("best_of = 10^9", "unsupported_parameter", {"prompt": "x", "best_of": 10**9}),
        ("decodings that are paths", "invalid_value", {"prompt": "x", "cappy": {"decodings": ["../../etc/passwd"]}}),
        ("100,000 decodings", "invalid_value", {"prompt": "x", "cappy": {"decodings": ["greedy"] * 100_000}}),
    ):
        yield HostileRequest(f"completions: {name}", 400, code, write.post(TEXT, {"model": serving.model_name, **fields}))


def _scoring(write: RequestWriter, serving: ServingConfig) -> Iterator[HostileRequest]:
    """Yield requests to the scorer above a limit."""
    scorer = {"model": serving.scorer_name}
    most = serving.max_pairs
    for name, path, fields in (
        ("one pair more than allowed", "/v1/score", {"text_1": "q", "text_2": ["a"] * (most + 1)}),
        ("one choice more than allowed", "/v1/classify", {"instruction": "q", "choices": [str(n) for n in range(most + 1)]}),
        (
            "a long query against many documents",
            "/v2/rerank",
            {"query": "q" * (serving.max_pairs_chars // most + 1), "documents": ["a"] * most},
        ),
        ("100,000 documents that are numbers", "/v1/rerank", {"query": "q", "documents": [1] * 100_000}),
        ("top_n = -1", "/v2/rerank", {"query": "q", "documents": ["a"], "top_n": -1}),
        ("text_1 and queries, two names of one field", "/v1/score", {"text_1": "q", "queries": "r", "text_2": "a"}),
        (
            "an image beside the text of a document",
            "/v1/rerank",
            {"query": "q", "documents": [{"text": "a", "image": "file:///etc/passwd"}]},
        ),
        ("a token limit that would cut a document", "/v2/rerank", {"query": "q", "documents": ["a b c"], "max_tokens_per_doc": 1}),
    ):
        yield HostileRequest(name, 400, "invalid_value", write.post(path, {**scorer, **fields}))
    for field, value in {"top_k": 1, "score_threshold": 0.5, "truncation_side": "left"}.items():
        body = {**scorer, "query": "q", "documents": ["a"], field: value}
        yield HostileRequest(f"rerank: {field}", 400, "unsupported_parameter", write.post("/v1/rerank", body))
    yield HostileRequest("empty texts to rank", 200, None, write.post("/v1/rerank", {**scorer, "query": " ", "documents": ["", ""]}))
    nul = {**scorer, "text_1": "\0", "text_2": ["", "\0", "\u202e\ufeff"]}
    yield HostileRequest("NUL and empty texts to score", 200, None, write.post("/v1/score", nul))


def _http(write: RequestWriter, serving: ServingConfig) -> Iterator[HostileRequest]:
    """Yield requests with hostile methods, paths, headers and protocols."""
    good = {"model": serving.model_name, "messages": HI}
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        yield HostileRequest(f"Content-Type {kind}", 415, "unsupported_media_type", write.post(CHAT, good, kind=kind))
    yield HostileRequest("a gzip bomb's header", 415, "unsupported_media_type", write.post(CHAT, good, "Content-Encoding: gzip"))
    for path in ("/health", "/ready", "/"):
        yield HostileRequest(f"HEAD of {path}", 200, None, write.get(path, method="HEAD"))
        yield HostileRequest(f"OPTIONS of {path}", 204, None, write.get(path, method="OPTIONS"))
    preflight = ("Origin: https://evil.example", "Access-Control-Request-Method: POST")
    yield HostileRequest("a preflight of another origin", 405, "method_not_allowed", write.get(CHAT, *preflight, method="OPTIONS"))
    for method in ("GET", "DELETE", "OPTIONS", "HEAD"):
        code = None if method == "HEAD" else "method_not_allowed"  # an answer to HEAD has no body
        yield HostileRequest(f"{method} of the chat route", 405, code, write.get(CHAT, method=method))
    for path in ("//v1/chat/completions", "/v1/%2e%2e/metrics", "/v1/../metrics", "/v1/chat/completions/", "/V1/MODELS", "/%00"):
        yield HostileRequest(f"path {path}", 404, "not_found", write.get(path))
    for path in ("/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/" + "x" * 5000):
        yield HostileRequest(f"path {path[:40]}", 404, "model_not_found", write.get(path))
    yield HostileRequest("a URL of 20,000 bytes", 414, "uri_too_long", write.get("/v1/models?" + "x" * 20_000))
    yield HostileRequest(
        "headers of 100,000 bytes", 431, "headers_too_large", write.get("/v1/models", *(f"X-{n}: {'x' * 1000}" for n in range(100)))
    )
    for header in (
        "X-Request-Disconnect-Disabled: ?1",
        "X-Request-Timeout-Seconds: -1",
        "serve_multiplexed_model_id: x",
        "Serve-Multiplexed-Model-Id: x",
        "X-Session-Id: x",
        "X-Serve-Router-Replica: x",
    ):
        yield HostileRequest(f"the header {header}", 400, "unsupported_header", write.post(CHAT, good, header))
    yield HostileRequest("unknown query parameters", 200, None, write.get("/v1/models?__proto__=1&limit=-1"))
    # Without keys a server on loopback accepts only the host names of its machine.
    status, code = (200, None) if write.key else (403, "forbidden")
    yield HostileRequest("an invalid Host", status, code, write.get("/v1/models").replace(b"Host: localhost", b"Host: [::"))
    twice = write.post(CHAT, good, "Transfer-Encoding: chunked")
    yield HostileRequest("two body lengths (request smuggling)", 400, None, twice)
    yield HostileRequest("an unknown method", 400, None, write.get("/v1/models", method="HACK"))
    yield HostileRequest("a TLS handshake instead of HTTP", 400, None, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200)
    websocket = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    yield HostileRequest("a WebSocket", 403, None, write.get(CHAT, *websocket))


def _keys(write: RequestWriter) -> Iterator[HostileRequest]:
    """Yield requests without the key, or with almost the right key."""
    (right,) = write.key
    for name, line, header in (
        ("no key", "GET /v1/models", "X: y"),
        ("a wrong key", "GET /v1/models", "Authorization: Bearer cappy-wrong"),
        ("the key without its last letter", "GET /v1/models", right[:-1]),
        ("the key under Basic", "GET /v1/models", right.replace("Bearer", "Basic")),
        ("a key of 50,000 bytes", "GET /v1/models", f"Authorization: Bearer {'x' * 50_000}"),
        ("the key in the URL", f"GET /v1/models?api_key={right.split()[-1]}", "X: y"),
        ("/metrics without a key", "GET /metrics", "X: y"),
        ("//health, which is not /health", "GET //health", "X: y"),
        ("an unknown path without a key", "GET /no/such/path", "X: y"),
    ):
        yield HostileRequest(name, 401, "invalid_api_key", write.bare(line, header))


def table(rows: Sequence[tuple[HostileRequest, Answer]]) -> str:
    """Return requests and answers as Markdown."""
    lines = ["| request | answer | code | seconds |", "| --- | --: | --- | --: |"]
    for hostile, answer in rows:
        code = f"`{answer.code}`" if answer.code else ""
        lines.append(f"| {hostile.name} | {answer.status} | {code} | {answer.seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="a running server; default: the benchmark starts `cappy serve demo` with a random scorer")
    parser.add_argument("--key")
    arguments = parser.parse_args()
    if arguments.url is None and arguments.key is not None:
        parser.error("--key is given without a url, and the server started here has no keys; give the url of your server")
    if arguments.url is not None:
        check_server(arguments.url, arguments.key)
        return
    # Imported here because a check of a running server needs no model.
    from benchmarks import servers

    with tempfile.TemporaryDirectory(prefix="cappy-hostile-") as name:
        servers.write_scorer(Path(name) / "scorer", 0)
        with servers.ours(load("demo", [f"workspace={name}"]), Path(name)) as server:
            check_server(server.url)


def check_server(url: str, key: str | None = None) -> None:
    """Send all requests, print the answers, and exit with an error if an answer differs from the documented one."""
    asked = hostile_requests(ServingConfig(), key)
    with ThreadPoolExecutor(4) as pool:
        rows = list(zip(asked, pool.map(lambda each: send(url, each), asked), strict=True))
    print(table(rows))
    wrong = [
        f"{each.name}: {answer.status} {answer.code}" for each, answer in rows if (answer.status, answer.code) != (each.status, each.code)
    ]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} answers are wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
