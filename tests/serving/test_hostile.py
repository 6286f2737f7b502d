import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.hostile import HI, HostileRequest, hostile_requests, send
from cluster.config import Config, ServingConfig
from serving.api_keys import create_key
from serving.gateway import build_api
from tests.serving.standin import Echo, running

KEY, SHA256 = create_key()
SERVING = ServingConfig(api_keys=[{"name": "a", "sha256": SHA256}], body_timeout_s=0.5)


class Counting(Echo):
    """Counts the calls of the models."""

    calls = 0

    async def sample(self, *arguments):
        self.calls += 1
        return await super().sample(*arguments)

    async def score(self, *arguments):
        self.calls += 1
        return await super().score(*arguments)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Counting]]:
    backend = Counting()
    with running(build_api(Config(serving=SERVING), backend)) as url:
        yield url, backend


@pytest.mark.parametrize("hostile", hostile_requests(SERVING, KEY), ids=lambda each: each.name.replace("/", "|")[:40])
def test_a_hostile_request_gets_its_error_and_does_not_reach_a_model(hostile: HostileRequest, server):
    url, backend = server
    before = backend.calls
    answer = send(url, hostile)
    assert (answer.status, answer.code) == (hostile.status, hostile.code), answer.body
    assert answer.status < 300 or backend.calls == before
    # The answer repeats no large input of the client and exposes nothing of the server.
    assert answer.status < 300 or (len(answer.body) < 1000 and b"Traceback" not in answer.body and b".py" not in answer.body)


def test_after_all_hostile_requests_the_server_still_answers(server):
    url, backend = server
    before = backend.calls
    answer = httpx.post(
        f"{url}/v1/chat/completions", json={"model": "cappy", "messages": HI}, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
    )
    assert answer.status_code == 200 and backend.calls == before + 2


def test_an_incomplete_body_is_counted_as_a_client_error(server):
    url, _ = server
    mine = {"Authorization": f"Bearer {KEY}"}

    def answered() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics", headers=mine).text)
        samples = [each for family in families for each in family.samples if each.name == "cappy_serving_requests_total"]
        return {each.labels["status"]: each.value for each in samples if each.labels["route"] == "/v1/classify"}

    before = answered()
    host, port = url.removeprefix("http://").split(":")
    lines = (
        "POST /v1/classify HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        "Content-Length: 99",
    )
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(("\r\n".join(lines) + "\r\n\r\n{").encode())
    deadline = time.monotonic() + 30
    while (after := answered()) == before:
        assert time.monotonic() < deadline
    assert after == {**before, "400": before.get("400", 0) + 1}
