"""Fault injection: a loopback proxy that damages HTTP traffic at random by a seed, and an S3 server for unusual keys.

Both use real sockets.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit

ACCESS_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
KINDS = ("unavailable", "reset", "lost_answer", "truncated", "flipped_answer", "flipped_request")


class FaultyProxy:
    """A proxy to `url` that applies one of the fault `kinds` to each request with probability `rate`.

    A test may change `kinds` and `rate` while it runs. Attribute `url` is the address of the proxy; `spoiled` counts faults by kind.

    - unavailable: answers 503 without forwarding.
    - reset: closes the connection before forwarding.
    - lost_answer: forwards the request, then closes the connection.
    - truncated: sends half of the body of the answer.
    - flipped_answer, flipped_request: changes one bit of the body.

    `answer(method, path)` can return a status and a body instead of the server. `requests` lists the methods and paths of all requests.
    `missing` is the status instead of 404.
    """

    def __init__(
        self,
        url: str,
        kinds: tuple[str, ...] = (),
        rate: float = 0.0,
        seed: int = 0,
        answer: Callable[[str, str], tuple[int, bytes] | None] = lambda method, path: None,
        missing: int = 404,
    ) -> None:
        target = urlsplit(url)
        draw, lock, proxy = random.Random(seed), threading.Lock(), self
        self.kinds, self.rate = kinds, rate
        self.requests: list[tuple[str, str]] = []
        spoiled: Counter[str] = Counter()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                with lock:
                    kind = draw.choice(proxy.kinds) if draw.random() < proxy.rate else None
                    position = draw.random()
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, self.path))
                if own := answer(self.command, self.path):
                    return self.answer(own[0], [], b"" if self.command == "HEAD" else own[1])
                if kind == "flipped_request" and body:
                    body = _flip_bit(body, position)
                    spoiled[kind] += 1
                if kind == "unavailable":
                    spoiled[kind] += 1
                    return self.answer(503, [], b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
                if kind == "reset":
                    spoiled[kind] += 1
                    return self.reset_connection()
                connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                data = response.read()
                headers = [
                    (name, value) for name, value in response.getheaders() if name.lower() not in ("connection", "transfer-encoding")
                ]
                connection.close()
                if response.status == 404 and missing != 404:
                    return self.answer(missing, [], b"" if self.command == "HEAD" else ACCESS_DENIED)
                if kind == "lost_answer":
                    spoiled[kind] += 1
                    return self.reset_connection()
                if kind == "flipped_answer" and data:
                    data = _flip_bit(data, position)
                    spoiled[kind] += 1
                if kind == "truncated" and len(data) > 1:
                    spoiled[kind] += 1
                    self.answer(response.status, headers, data, sent=len(data) // 2)
                    return self.reset_connection()
                return self.answer(response.status, headers, data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

            def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, sent: int | None = None) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                if not any(name.lower() == "content-length" for name, _ in headers) and status != 204:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:sent])
                self.wfile.flush()

            def reset_connection(self) -> None:
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:  # the error of a connection that the proxy closed
                pass

        self.spoiled = spoiled
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _flip_bit(data: bytes, position: float) -> bytes:
    """Flip one bit of the byte at a relative position in [0, 1)."""
    index = int(position * len(data))
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


class KeyStore:
    """An S3 server with objects under any key, like AWS. SeaweedFS normalizes `a//b` and rejects `a/../b`.

    It implements HeadBucket, ListObjectsV2, GetObject and HeadObject without checking signatures. `url` is its address. `headers` are
    sent with each object. `signed` lists for each request whether it has a signature; with `public` a signed request is denied.
    """

    def __init__(self, objects: dict[str, bytes], headers: dict[str, str] | None = None, public: bool = False) -> None:
        self.signed: list[bool] = []
        signed = self.signed

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                target = urlsplit(self.path)
                _, _, key = unquote(target.path).removeprefix("/").partition("/")
                query = dict(parse_qsl(target.query))
                signed.append("Authorization" in self.headers)
                if public and signed[-1]:
                    return self.answer(403, ACCESS_DENIED)
                if key and key in objects and (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
                    data = objects[key][int(span[1]) : int(span[2] or len(objects[key])) + 1]
                    end = int(span[1]) + len(data) - 1
                    return self.answer(206, data, {**(headers or {}), "Content-Range": f"bytes {span[1]}-{end}/{len(objects[key])}"})
                if key:
                    found = key in objects
                    content = objects[key] if found else b"<Error><Code>NoSuchKey</Code></Error>"
                    return self.answer(200 if found else 404, content, headers or {} if found else {})
                names = [name for name in sorted(objects) if name.startswith(query.get("prefix", ""))]
                entries = "".join(
                    f"<Contents><Key>{quote(name, safe='')}</Key><Size>{len(objects[name])}</Size></Contents>" for name in names
                )
                body = f"<EncodingType>url</EncodingType><KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>{entries}"
                return self.answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode())

            do_HEAD = do_GET

            def answer(self, status: int, body: bytes, extra: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {**(extra or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> KeyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
