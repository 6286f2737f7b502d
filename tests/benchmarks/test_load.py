"""The load generator, against a server in this process."""

import math
import time
from dataclasses import replace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.load import Answer, arrivals, closed_loop, closed_loop_rate, duration_s, open_loop, quantiles


def test_arrivals_have_their_rate_and_repeat_with_their_seed():
    moments = arrivals(5, 400, seed=1)
    assert moments == sorted(moments) and moments[0] > 0 and moments[-1] < 400
    # 2,000 expected; a Poisson count is within five standard deviations of that.
    assert abs(len(moments) - 2000) < 5 * math.sqrt(2000)
    assert arrivals(5, 400, seed=1) == moments != arrivals(5, 400, seed=2)


def test_quantiles_are_interpolated():
    assert quantiles([1.0, 2.0, 3.0, 4.0], 0, 0.5, 1) == [1.0, 2.5, 4.0]
    assert all(math.isnan(value) for value in quantiles([], 0.5, 0.99))


@pytest.fixture
async def server():
    """A server whose answer repeats the body; for `busy` seconds it blocks the event loop, which the client shares."""
    here = most = 0

    async def answer(request):
        nonlocal here, most
        here += 1
        most = max(most, here)
        asked = await request.json()
        time.sleep(asked.get("busy", 0))
        here -= 1
        return web.json_response({"most": most, **asked}, status=asked.get("status", 200))

    app = web.Application()
    app.router.add_post("/", answer)
    async with TestServer(app) as running:
        yield str(running.make_url("/"))


async def test_latency_counts_from_when_a_request_was_due(server):
    answers = await open_loop(server, [{"busy": 0.2}, {"busy": 0.2}, {"status": 503}], [0.0, 0.01, 0.02])
    assert [each.due for each in answers] == [0.0, 0.01, 0.02]
    assert [each.status for each in answers] == [200, 200, 503]
    # The second request is sent late, because the first blocks the event loop. Its latency counts from its due time.
    assert max(each.latency for each in answers[:2]) > 0.38
    assert duration_s(answers) >= 0.4


async def test_clients_without_a_pause_send_every_body_once(server):
    answers = await closed_loop(server, [{"number": number} for number in range(20)], clients=3)
    assert sorted(each.tree["number"] for each in answers) == list(range(20))
    assert 1 <= max(each.tree["most"] for each in answers) <= 3


async def test_a_broken_connection_counts_as_an_answer_with_status_0():
    (answer,) = await open_loop("http://127.0.0.1:9/", [{}], [0.0])
    assert answer.status == 0 and "Connect" in answer.tree["error"]["message"]


def test_a_rate_counts_only_while_all_clients_are_busy():
    """Two clients get one answer per second each; the last answer takes a minute."""
    answers = [Answer(float(turn), 1.0, 200) for turn in range(6) for _ in range(2)]
    answers[-1] = replace(answers[-1], latency=60.0)
    assert closed_loop_rate(answers, 2) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="12 answers to 5 clients are too few for a rate; send at least 15 requests"):
        closed_loop_rate(answers, 5)
