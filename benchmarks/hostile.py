"""What does a server answer to those who mean it ill? Sends each request of a table as raw bytes over a connection of its own.

    python -m benchmarks.hostile http://127.0.0.1:8000 --key "$CAPPY_API_KEY"

prints the table, and fails where an answer is not the one the table promises. The server's `serving` settings must be the defaults.
Without a key those requests are left out that are about keys. Without a URL it starts a server of its own.
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
    """What came back: `code` is that of OpenAI's error body, None where there is none; status 0 is a connection closed unanswered."""

    status: int
    code: str | None
    body: bytes
    seconds: float


@dataclass(frozen=True)
class Hostile:
    """A request and the answer it must get; `drip` is sent after it, a byte every 0.1 s until an answer comes."""

    name: str
    status: int
    code: str | None
    sent: bytes
    drip: bytes = b""


def ask(url: str, hostile: Hostile, timeout_s: float = 60.0) -> Answer:
    """Send a request as it stands and return the first answer."""
    target = urlsplit(url)
    start = time.monotonic()
    with socket.create_connection((target.hostname or "127.0.0.1", target.port or 80), timeout=timeout_s) as wire:
        try:
            wire.sendall(hostile.sent)
            if hostile.drip:
                _drip(wire, hostile.drip)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before it was told all
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


class Writer:
    """Writes requests: with the key's header, where there is a key."""

    def __init__(self, key: str | None) -> None:
        self.key = [f"Authorization: Bearer {key}"] if key else []

    def bare(self, line: str, *headers: str, body: bytes = b"") -> bytes:
        """A request of exactly these headers and Host."""
        return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode() + body

    def get(self, path: str, *headers: str, method: str = "GET") -> bytes:
        return self.bare(f"{method} {path}", *self.key, *headers)

    def post(self, path: str, body: Any, *headers: str, kind: str | None = "application/json", length: int | None = None) -> bytes:
        """A POST of bytes as they are, or of anything else as JSON; `length` is a Content-Length of one's own making."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kinds = [f"Content-Type: {kind}"] if kind else []
        size = f"Content-Length: {len(data) if length is None else length}"
        return self.bare(f"POST {path}", *self.key, *kinds, size, *headers, body=data)

    def chunked(self, body: bytes) -> bytes:
        """A POST to the chat route whose body is sent in chunks, written by hand."""
        return self.bare(f"POST {CHAT}", *self.key, "Content-Type: application/json", "Transfer-Encoding: chunked", body=body)


def requests(serving: ServingConfig, key: str | None = None) -> list[Hostile]:
    """Return the table for a server with these settings; with a `key`, those about keys too."""
    write = Writer(key)
    return [
        *_bodies(write, serving),
        *_fields(write, serving),
        *_texts(write, serving),
        *_scoring(write, serving),
        *_http(write, serving),
        *(_keys(write) if key else ()),
    ]


def _bodies(write: Writer, serving: ServingConfig) -> Iterator[Hostile]:
    """Bodies that are no JSON, or JSON meant to hurt its reader."""
    good = {"model": serving.model_name, "messages": HI}

    def raw(more: bytes) -> bytes:
        return write.post(CHAT, json.dumps(good)[:-1].encode() + b", " + more + b"}")

    for name, body in {
        "no body": b"",
        "half a body": b'{"model": "cappy", "mess',
        "a list": b"[]",
        "form fields under a JSON header": b"model=cappy&n=1",
        "bytes that are no UTF-8": b'{"model": "\xff\xfe"}',
        "UTF-16": json.dumps(good).encode("utf-16"),
        "100,000 open brackets": b"[" * 100_000,
    }.items():
        yield Hostile(name, 400, "invalid_json", write.post(CHAT, body))
    for name, more in {
        "NaN": b'"temperature": NaN',
        "-Infinity": b'"top_p": -Infinity',
        "nested 40 deep where nobody looks": b'"metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 40,
        "a number of 100,000 digits": b'"seed": ' + b"9" * 100_000,
        "a field given twice": b'"n": 1, "n": 64',
        "half of a surrogate pair": b'"user": "\\ud800"',
        "an object of 50,000 names": b'"cappy": ' + json.dumps({f"a{n}": 0 for n in range(50_000)}).encode(),
    }.items():
        yield Hostile(name, 400, "invalid_json", raw(more))
    yield Hostile("1e999, infinite once read", 400, "invalid_value", raw(b'"temperature": 1e999'))
    limit = serving.max_body_bytes
    yield Hostile("a body above the limit", 413, "body_too_large", write.post(CHAT, {**good, "user": "x" * limit}))
    yield Hostile("a body said to be 1 TB, none sent", 413, "body_too_large", write.post(CHAT, b"", length=10**12))
    endless = b"".join(b"10000\r\n" + b" " * 65_536 + b"\r\n" for _ in range(limit // 65_536 + 1))
    yield Hostile("chunks without end", 413, "body_too_large", write.chunked(endless))
    yield Hostile("a body that stops half way", 408, "body_timeout", write.post(CHAT, b'{"model":', length=100))
    yield Hostile("a byte of body every 0.1 s", 408, "body_timeout", write.post(CHAT, b"{", length=2000), drip=b" " * 1000)
    yield Hostile("a wrong chunk size", 400, None, write.chunked(b"zz\r\n{}\r\n0\r\n\r\n"))


def _fields(write: Writer, serving: ServingConfig) -> Iterator[Hostile]:
    """Chat requests that ask for too much, or for what is not theirs."""
    most = serving.max_candidates
    for name, code, fields in (
        ("n = 0", "invalid_value", {"n": 0}),
        ("n = 10^9", "invalid_value", {"n": 10**9}),
        ("n = 1.5", "invalid_value", {"n": 1.5}),
        ("n = true", "invalid_value", {"n": True}),
        ("a candidate more than allowed", "invalid_value", {"cappy": {"candidates": most + 1}}),
        ("max_tokens = 10^12", "invalid_value", {"max_tokens": 10**12}),
        (
            "candidates x tokens above the limit",
            "invalid_value",
            {"cappy": {"candidates": most}, "max_tokens": serving.max_sampled_tokens // most + 1},
        ),
        (
            "a prompt above the characters allowed",
            "context_length_exceeded",
            {"messages": [{**HI[0], "content": "x " * serving.max_prompt_chars}]},
        ),
        ("3,000 messages", "invalid_value", {"messages": HI * 3000}),
        ("200,000 messages that are none", "invalid_value", {"messages": [0] * 200_000}),
        ("a role of its own", "invalid_value", {"messages": [{"role": "tool", "content": "x"}]}),
        (
            "an image",
            "invalid_value",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
        ),
        ("17 stop strings", "invalid_value", {"stop": [str(n) for n in range(17)]}),
        ("a stop string of 100,000 characters", "invalid_value", {"stop": "x" * 100_000}),
        ("logprobs", "unsupported_parameter", {"logprobs": True, "top_logprobs": 20}),
        ("an unknown option of 100,000 characters", "invalid_value", {"cappy": {"x" * 100_000: 1}}),
    ):
        yield Hostile(name, 400, code, write.post(CHAT, {"model": serving.model_name, "messages": HI, **fields}))
    for model in ("../../etc/passwd", "s3://bucket/model", "x" * 100_000):
        yield Hostile(f"model = {model[:20]}", 404, "model_not_found", write.post(CHAT, {"model": model, "messages": HI}))
    nul = {"model": serving.model_name, "messages": [{"role": "user", "content": "a\0b"}], "max_tokens": 2, "cappy": {"candidates": 2}}
    yield Hostile("NUL in a prompt, a character like others", 200, None, write.post(CHAT, nul))


def _texts(write: Writer, serving: ServingConfig) -> Iterator[Hostile]:
    """Text completions that ask for too much, or for what no candidate has."""
    for name, code, fields in (
        ("many prompts at once", "invalid_value", {"prompt": ["x"] * 50_000}),
        ("a prompt of token ids", "invalid_value", {"prompt": [1 << 40]}),
        ("an empty prompt", "invalid_value", {"prompt": ""}),
        ("a prompt above the characters allowed", "context_length_exceeded", {"prompt": "x " * serving.max_prompt_chars}),
        ("echo of the prompt", "unsupported_parameter", {"prompt": "x", "echo": True}),
        ("best_of = 10^9", "unsupported_parameter", {"prompt": "x", "best_of": 10**9}),
        ("decodings that are paths", "invalid_value", {"prompt": "x", "cappy": {"decodings": ["../../etc/passwd"]}}),
        ("100,000 decodings", "invalid_value", {"prompt": "x", "cappy": {"decodings": ["greedy"] * 100_000}}),
    ):
        yield Hostile(f"completions: {name}", 400, code, write.post(TEXT, {"model": serving.model_name, **fields}))


def _scoring(write: Writer, serving: ServingConfig) -> Iterator[Hostile]:
    """Too much for the scorer."""
    scorer = {"model": serving.scorer_name}
    most = serving.max_pairs
    for name, path, fields in (
        ("a pair more than allowed", "/v1/score", {"text_1": "q", "text_2": ["a"] * (most + 1)}),
        ("a choice more than allowed", "/v1/classify", {"instruction": "q", "choices": [str(n) for n in range(most + 1)]}),
        (
            "a long query against many documents",
            "/v2/rerank",
            {"query": "q" * (serving.max_pairs_chars // most + 1), "documents": ["a"] * most},
        ),
        ("100,000 documents that are numbers", "/v1/rerank", {"query": "q", "documents": [1] * 100_000}),
        ("top_n = -1", "/v2/rerank", {"query": "q", "documents": ["a"], "top_n": -1}),
    ):
        yield Hostile(name, 400, "invalid_value", write.post(path, {**scorer, **fields}))
    nul = {**scorer, "text_1": "\0", "text_2": ["", "\0", "\u202e\ufeff"]}
    yield Hostile("NUL and nothing to score", 200, None, write.post("/v1/score", nul))


def _http(write: Writer, serving: ServingConfig) -> Iterator[Hostile]:
    """Tricks with what is around the body."""
    good = {"model": serving.model_name, "messages": HI}
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        yield Hostile(f"Content-Type {kind}", 415, "unsupported_media_type", write.post(CHAT, good, kind=kind))
    yield Hostile("a gzip bomb's header", 415, "unsupported_media_type", write.post(CHAT, good, "Content-Encoding: gzip"))
    for method in ("GET", "DELETE", "OPTIONS", "HEAD"):
        code = None if method == "HEAD" else "method_not_allowed"  # an answer to HEAD has no body
        yield Hostile(f"{method} of the chat route", 405, code, write.get(CHAT, method=method))
    for path in ("//v1/chat/completions", "/v1/%2e%2e/metrics", "/v1/../metrics", "/v1/chat/completions/", "/V1/MODELS", "/%00"):
        yield Hostile(f"path {path}", 404, "not_found", write.get(path))
    for path in ("/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/" + "x" * 5000):
        yield Hostile(f"path {path[:40]}", 404, "model_not_found", write.get(path))
    yield Hostile("an address of 20,000 bytes", 414, "uri_too_long", write.get("/v1/models?" + "x" * 20_000))
    yield Hostile(
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
        yield Hostile(f"the header {header}", 400, "unsupported_header", write.post(CHAT, good, header))
    yield Hostile("a query nobody asked for", 200, None, write.get("/v1/models?__proto__=1&limit=-1"))
    # Without keys a server on loopback answers to names of its machine alone.
    status, code = (200, None) if write.key else (403, "forbidden")
    yield Hostile("a Host that is no name", status, code, write.get("/v1/models").replace(b"Host: localhost", b"Host: [::"))
    twice = write.post(CHAT, good, "Transfer-Encoding: chunked")
    yield Hostile("two lengths, as smugglers send", 400, None, twice)
    yield Hostile("a method of its own", 400, None, write.get("/v1/models", method="HACK"))
    yield Hostile("no HTTP", 400, None, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200)
    websocket = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    yield Hostile("a WebSocket", 403, None, write.get(CHAT, *websocket))


def _keys(write: Writer) -> Iterator[Hostile]:
    """Without the key, or nearly with it."""
    (right,) = write.key
    for name, line, header in (
        ("no key", "GET /v1/models", "X: y"),
        ("a wrong key", "GET /v1/models", "Authorization: Bearer cappy-wrong"),
        ("the key less its last letter", "GET /v1/models", right[:-1]),
        ("the key under Basic", "GET /v1/models", right.replace("Bearer", "Basic")),
        ("a key of 50,000 bytes", "GET /v1/models", f"Authorization: Bearer {'x' * 50_000}"),
        ("a key in the address", f"GET /v1/models?api_key={right.split()[-1]}", "X: y"),
        ("/metrics without a key", "GET /metrics", "X: y"),
        ("//health, which is not /health", "GET //health", "X: y"),
        ("a path with a key that is not known", "GET /no/such/path", "X: y"),
    ):
        yield Hostile(name, 401, "invalid_api_key", write.bare(line, header))


def table(rows: Sequence[tuple[Hostile, Answer]]) -> str:
    """Return requests and answers as Markdown."""
    lines = ["| request | answer | code | seconds |", "| --- | --: | --- | --: |"]
    for hostile, answer in rows:
        code = f"`{answer.code}`" if answer.code else ""
        lines.append(f"| {hostile.name} | {answer.status} | {code} | {answer.seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="a running server; `cappy serve demo` with a drawn scorer is started by default")
    parser.add_argument("--key")
    arguments = parser.parse_args()
    if arguments.url is None and arguments.key is not None:
        parser.error("--key without a url: the server started here takes no key; give the url of yours")
    if arguments.url is not None:
        check(arguments.url, arguments.key)
        return
    # Only here: a check of a server elsewhere needs no model.
    from benchmarks import servers

    with tempfile.TemporaryDirectory(prefix="cappy-hostile-") as name:
        servers.write_scorer(Path(name) / "scorer", 0)
        with servers.ours(load("demo", [f"workspace={name}"]), Path(name)) as server:
            check(server.url)


def check(url: str, key: str | None = None) -> None:
    """Send all requests, print the answers, and exit with an error where one is not the promised one."""
    asked = requests(ServingConfig(), key)
    with ThreadPoolExecutor(4) as pool:
        rows = list(zip(asked, pool.map(lambda each: ask(url, each), asked), strict=True))
    print(table(rows))
    wrong = [
        f"{each.name}: {answer.status} {answer.code}" for each, answer in rows if (answer.status, answer.code) != (each.status, each.code)
    ]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} answers are not as promised: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
