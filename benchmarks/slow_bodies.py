"""Time of `GET /v1/models` while clients send their bodies slowly, against the time without them.

    python -m benchmarks.slow_bodies                                             # starts a server with a small queue
    python -m benchmarks.slow_bodies http://127.0.0.1:8000 --key "$CAPPY_API_KEY"

Each slow client opens a connection, announces a body of 1,000 bytes and sends one byte every half second. Prints a table with the times
of the GET requests, and the status codes of chat requests in the same time.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks.hostile import CHAT, HI, RequestWriter
from cluster.config import load

_PAUSE_S = 0.5
_BODY_BYTES = 1000


@dataclass(frozen=True)
class Times:
    """Seconds of GET requests, and the status codes of chat requests."""

    seconds: list[float]
    chats: Counter[int]

    def row(self, name: str) -> str:
        """Return the figures as a row of a Markdown table."""
        codes = ", ".join(f"{count} x {status}" for status, count in sorted(self.chats.items()))
        return f"| {name} | {statistics.median(self.seconds):.3f} | {max(self.seconds):.3f} | {codes} |"


@contextmanager
def slow_clients(url: str, count: int, key: str | None = None) -> Iterator[None]:
    """Keep `count` clients connected that send their bodies slowly; a client whose connection closes connects again."""
    target, stop = urlsplit(url), threading.Event()
    head = RequestWriter(key).post(CHAT, b"{", length=_BODY_BYTES)

    def send_slowly() -> None:
        while not stop.is_set():
            with suppress(OSError), socket.create_connection((target.hostname or "127.0.0.1", target.port or 80), timeout=60) as wire:
                wire.sendall(head)
                for _ in range(_BODY_BYTES):
                    if stop.wait(_PAUSE_S):
                        return
                    wire.sendall(b" ")

    threads = [threading.Thread(target=send_slowly, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def measure(url: str, seconds: float, key: str | None = None) -> Times:
    """Send GET requests, one after another, for some seconds, and a chat request after every tenth."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    times, chats = [], Counter[int]()
    end = time.monotonic() + seconds
    with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
        while time.monotonic() < end:
            start = time.monotonic()
            assert http.get("/v1/models").status_code == 200
            times.append(time.monotonic() - start)
            if len(times) % 10 == 1:
                chats[http.post(CHAT, json={"messages": HI, "model": "cappy", "max_tokens": 1}).status_code] += 1
    return Times(times, chats)


def compare(url: str, clients: int, seconds: float, key: str | None = None) -> str:
    """Return a table with the times without and with slow clients."""
    alone = measure(url, seconds, key)
    with slow_clients(url, clients, key):
        time.sleep(1.0)  # all slow clients are connected
        crowded = measure(url, seconds, key)
    lines = ["| slow clients | GET median s | GET max s | chat requests |", "| --- | --: | --: | --- |"]
    return "\n".join([*lines, alone.row("0"), crowded.row(str(clients))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="a running server; default: the benchmark starts `cappy serve demo` with a random scorer")
    parser.add_argument("--key")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    arguments = parser.parse_args()
    if arguments.url is not None:
        print(compare(arguments.url, arguments.clients, arguments.seconds, arguments.key))
        return
    from benchmarks import servers

    with tempfile.TemporaryDirectory(prefix="cappy-slow-") as name:
        servers.write_scorer(Path(name) / "scorer", 0)
        small = ["serving.max_concurrency=2", "serving.max_queue=2"]  # 32 calls of the gateway's replica at a time
        with servers.ours(load("demo", [f"workspace={name}", *small]), Path(name)) as server:
            print(compare(server.url, arguments.clients, arguments.seconds))


if __name__ == "__main__":
    main()
