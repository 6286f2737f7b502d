"""Readiness by test requests, with a clock of the test; `test_app.py` has the whole server."""

import asyncio

import pytest

from cluster.config import Config, SamplerConfig, ServingConfig
from serving import readiness
from serving.backend import ApiError
from serving.gateway import build_api
from serving.readiness import RequestProbe
from tests.serving.standin import BODY, Echo, client


class Server:
    """Sends test requests that end with `error`, or that hang."""

    def __init__(self):
        self.error, self.hangs, self.sent, self.now = None, False, 0, 0.0
        self.probe = RequestProbe(self.send, interval_s=60, timeout_s=0.05, clock=lambda: self.now)

    async def send(self):
        self.sent += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.error:
            raise self.error


async def test_a_success_counts_for_the_interval_and_then_a_test_request_decides():
    server = Server()
    assert await server.probe.check() and server.sent == 1
    server.now = 59.0
    server.hangs = True
    assert await server.probe.check() and server.sent == 1
    server.now = 61.0
    assert not await server.probe.check() and server.sent == 2
    server.hangs = False
    assert await server.probe.check() and server.sent == 3


@pytest.mark.parametrize("error", [ApiError("down", 503), KeyError("a bug"), OSError("lost")])
async def test_any_failure_of_the_test_request_is_not_ready(error):
    server = Server()
    server.error = error
    assert not await server.probe.check()


async def test_requests_of_clients_replace_test_requests():
    server = Server()
    server.hangs = True
    server.probe.record_success()
    assert await server.probe.check() and server.sent == 0


async def test_while_a_test_request_runs_the_last_result_holds_and_no_second_one_starts():
    ended, sent = asyncio.Event(), []

    async def send():
        sent.append(1)
        await ended.wait()
        raise ApiError("down", 503)

    probe = RequestProbe(send, interval_s=1e-9, timeout_s=600)
    probe.record_success()
    assert [await probe.check(0), await probe.check(0)] == [True, True]
    ended.set()
    assert not await probe.check() and len(sent) == 1


async def test_test_requests_are_sent_on_a_timer_without_calls_of_ready():
    backend = Echo(wait=30)
    api = build_api(Config(serving=ServingConfig(probe_s=0.01, probe_timeout_s=0.05)), backend)
    async with api.router.lifespan_context(api):
        async with asyncio.timeout(60):
            while len(backend.prompts) < 2:
                await asyncio.sleep(0.01)
    ended = len(backend.prompts)
    await asyncio.sleep(0.2)
    assert len(backend.prompts) <= ended + 1


async def test_a_server_that_is_up_while_every_request_hangs_is_not_ready():
    async with client(Echo(wait=30), probe_timeout_s=0.05) as http:
        assert (await http.get("/health")).status_code == 200
        answer = await http.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "busy", "llm": True, "scorer": True, "answers": False, "room": True})


@pytest.mark.parametrize("trouble", [{"scorer_wait": 30}, {"scorer_error": ApiError("down", 503)}, {"error": KeyError("a bug")}])
async def test_the_test_request_needs_the_llm_and_the_scorer_even_with_a_fallback(trouble):
    async with client(Echo(**trouble), fallback="first", scorer_timeout_s=0.05) as http:
        assert (await http.get("/ready")).json()["answers"] is False


async def test_the_test_request_is_a_small_boosted_request_outside_the_metrics():
    backend = Echo()
    async with client(backend) as http:
        assert (await http.get("/ready")).json()["answers"] is True
        assert (await http.get("/ready")).status_code == 200
        assert "cappy_serving_candidates_total 0.0" in (await http.get("/metrics")).text
        assert (await http.post("/v1/chat/completions", json=BODY)).status_code == 200
    assert len(backend.prompts) == 2 and backend.scorers == ["cappy-scorer"] * 2
    assert len(backend.read[0][1]) == 2


@pytest.mark.parametrize(
    ("serving", "sampler"),
    [
        ({"probe_s": None}, {}),
        ({"llm_replicas": {"min": 0, "max": 1}}, {}),
        ({"scorer_replicas": {"min": 0, "max": 1}}, {}),
        ({}, {"model": "x", "engine": {"kind": "endpoint", "base_url": "http://127.0.0.1:1/v1"}}),
    ],
)
def test_an_endpoint_and_a_server_that_scales_to_zero_get_no_test_requests(serving, sampler):
    assert readiness.build_probe(Config(serving=ServingConfig(**serving), sampler=SamplerConfig(**sampler)), Echo()) is None
