"""Ray Serve's proxy in front of the real gateway: the effect of clients' headers. The LLM is a model that waits."""

import asyncio
import json
import socket
import time
import uuid
from pathlib import Path

import httpx
import pytest
from ray import serve
from ray.serve._private import constants

from benchmarks import hostile, slow_bodies
from cluster import ports
from cluster.config import Config, ServingConfig
from cluster.errors import CappyError
from serving import app, middleware
from serving import serve as serving_command

CONTROL_REQUESTS = [each for each in hostile.hostile_requests(ServingConfig()) if each.code == "unsupported_header"]
GOOD = hostile.RequestWriter(None).post(hostile.CHAT, {"model": "cappy", "messages": hostile.HI})


class Slow:
    """A model that writes a file when a call starts, and another when the call is cancelled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def sample(self, *_: object) -> dict[str, object]:
        mark = uuid.uuid4().hex
        (self.folder / f"{mark}.started").touch()
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            (self.folder / f"{mark}.cancelled").touch()
            raise
        return {"candidates": []}

    async def stream_sample(self, *call: object):
        yield await self.sample(*call)

    async def ready(self) -> bool:
        return True


@pytest.fixture(scope="module")
def served(ray_here, tmp_path_factory):
    """Yield the URL of a gateway behind Serve's proxy, and the folder of its models' files."""
    folder, port = tmp_path_factory.mktemp("calls"), ports.free_port()
    serve.start(http_options=app.http_options(ServingConfig(port=port)))
    model = serve.deployment(Slow)
    gateway = serve.deployment(serve.ingress()(app.Gateway)).options(
        name="Gateway", ray_actor_options={"num_cpus": 0}, **app.gateway_limits(ServingConfig())
    )
    slow = {"ray_actor_options": {"num_cpus": 0}}
    models = [model.options(name=name, **slow).bind(folder) for name in ("LLM", "Scorer")]
    serve.run(gateway.bind(Config(), (), *models), name="proxied", route_prefix="/")
    try:
        yield f"http://127.0.0.1:{port}", folder
    finally:
        serve.shutdown()


def abandon(url: str, request: bytes) -> None:
    """Send a request and close the connection immediately."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(request)


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


def test_a_request_of_a_disconnected_client_is_cancelled(served):
    url, folder = served
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(GOOD)
        wait_for(folder, "*.started")
    wait_for(folder, "*.cancelled")


@pytest.mark.parametrize("hostile_request", CONTROL_REQUESTS, ids=lambda each: each.name)
def test_a_header_that_controls_the_proxy_is_refused_and_no_work_starts(hostile_request, served):
    url, folder = served
    before = sorted(folder.iterdir())
    answer = hostile.send(url, hostile_request)
    print(f"\n{hostile.table([(hostile_request, answer)])}")
    assert (answer.status, answer.code) == (400, "unsupported_header"), answer.body
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
    abandon(url, hostile_request.sent)
    # The answer to a later request shows that the gateway has read both.
    assert hostile.send(url, hostile.HostileRequest("", 200, None, hostile.RequestWriter(None).get("/health"))).status == 200
    assert sorted(folder.iterdir()) == before


def test_a_config_with_another_address_than_the_running_serve_is_refused(served):
    running = serving_command.running_http_options()
    assert f"http://{running.host}:{running.port}" == served[0]
    serving_command.check_proxy_address(ServingConfig(port=running.port), running)
    for other in ({"port": running.port + 1}, {"port": running.port, "host": "0.0.0.0"}):
        with pytest.raises(CappyError, match=f"its proxy listens on 127.0.0.1:{running.port}; set serving.host"):
            serving_command.check_proxy_address(ServingConfig(**other), running)


@pytest.mark.parametrize("sent", ["a b" * 30, "", "my-1"])
def test_an_answer_has_one_request_id(served, sent):
    returned = httpx.get(f"{served[0]}/v1/models", headers={"X-Request-Id": sent}).headers.get_list("x-request-id")
    assert returned == [sent]


def test_slow_bodies_leave_get_requests_fast_and_further_requests_refused(served):
    """Without places for bodies the slow ones would occupy the gateway's replica, and GET requests would wait for their time limit."""
    url, _ = served
    places = ServingConfig().max_concurrency + ServingConfig().max_queue
    with slow_bodies.slow_clients(url, places):
        deadline = time.monotonic() + 60
        while (refused := httpx.post(f"{url}/v1/chat/completions", json={}, timeout=60)).status_code != 503:
            assert time.monotonic() < deadline, refused.text
        assert refused.json()["error"]["code"] == "overloaded"
        assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 200


def test_every_client_header_that_serve_reads_is_covered():
    """Fails if a new Ray version reads another header. The list is from `_private/proxy.py`, `http_util.py` and `constants.py`."""
    named = {
        name: value for name, value in vars(constants).items() if isinstance(value, str) and name.endswith(("_HEADER", "_HEADER_PREFIX"))
    }
    named |= {name: getattr(constants, name) for name in ("SERVE_MULTIPLEXED_MODEL_ID", "SERVE_SESSION_ID")}
    harmless = {"x-request-id"}
    assert {value.replace("_", "-") for value in named.values()} == {
        *middleware.PROXY_CONTROL_HEADERS,
        middleware.PROXY_CONTROL_PREFIX,
        *harmless,
    }
