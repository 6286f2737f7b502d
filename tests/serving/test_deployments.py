"""The class of the LLM deployment, in this process: with a tiny T5 of random weights and with an endpoint on loopback."""

import asyncio
import collections
import math
import pickle

import httpx
import pytest

from cluster.config import Config, DecodingConfig, SamplerConfig, ServingConfig
from cluster.errors import CappyError
from generation.engines.contract import EngineUnavailable
from generation.engines.seq2seq import Seq2SeqEngine
from generation.prompts import messages
from serving.backend import ApiError
from serving.deployments import LLM
from serving.gateway import build_api
from tests.generation.engines.conftest import write_seq2seq
from tests.generation.engines.openai_server import OpenAIServer, error, good
from tests.serving.standin import BODY, Echo

TURNS = messages("say a red fox")
BEAM = DecodingConfig(name="beam", temperature=0, beams=2, max_tokens=8)
WARM = DecodingConfig(name="warm", n=3, max_tokens=8)
PRICES = {"price_per_million_prompt": 1000.0, "price_per_million_sampled": 2000.0}
# Each request has 10 prompt tokens, each candidate 3 sampled ones; see `good`.
ONE_OF_BEAM_THREE_OF_WARM = (2 * 10 * 1000 + 4 * 3 * 2000) / 1e6


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    write_seq2seq(folder, "t5")
    return str(folder)


def seq2seq(folder, form="raw", **engine):
    kind = {"kind": "transformers", "dtype": "float32", "max_prompt_tokens": 16, **engine}
    return LLM(SamplerConfig(model=folder, engine=kind, prompt={"form": form}), math.inf, "unused")


async def test_an_encoder_decoder_samples_the_pools_of_waiting_requests_in_one_batch(t5, monkeypatch):
    batches = []
    own = Seq2SeqEngine._sample_batch
    monkeypatch.setattr(Seq2SeqEngine, "_sample_batch", lambda self, batch: batches.append(len(batch)) or own(self, batch))
    llm = seq2seq(t5)
    pools = await asyncio.gather(*(llm.sample(TURNS, [BEAM, WARM], [1, seed]) for seed in range(4)))
    assert batches == [8]
    for pool in pools:
        assert [each["decoding"] for each in pool["candidates"]] == ["beam", "warm", "warm", "warm"]
        assert (pool["prompt_tokens"], pool["cost"]) == (5, None)
    assert len({each["response"] for pool in pools for each in pool["candidates"]}) > 3


async def test_a_conversation_too_long_for_the_model_is_a_400_and_never_truncated(t5):
    turns = messages("say a red fox", [{"instruction": "a fox " * 9, "response": "a"}])
    with pytest.raises(ApiError, match="max_prompt_tokens=16") as caught:
        await seq2seq(t5).sample(turns, [WARM], [1])
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_a_prompt_form_that_the_model_lacks_is_an_error_at_load_time(t5):
    with pytest.raises(CappyError, match=r"has no chat template; set sampler\.prompt\.form=raw"):
        seq2seq(t5, form="chat")


@pytest.fixture(scope="module")
def running():
    server = OpenAIServer()
    yield server
    server.close()


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setenv("FOX_KEY", "very-secret")
    running.reset()
    running.reply, running.delay_s = (lambda body, number: good(body)), 0.0
    return running


def endpoint(server, max_wait_s=1.0, ledger="unused", **engine):
    kind = {"kind": "endpoint", "base_url": server.url, "api_key_env": "FOX_KEY", "tries": 1, **engine}
    return LLM(SamplerConfig(model="fox-1", engine=kind), max_wait_s, str(ledger))


class Behind(Echo):
    """A backend whose LLM is an instance of the deployment's class."""

    def __init__(self, llm):
        super().__init__()
        self.sample = llm.sample


async def ask(llm, **fields):
    """Return the answer of a gateway in front of `llm`, and the metrics after it."""
    api = build_api(Config(serving=ServingConfig()), Behind(llm))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as http:
        answer = await http.post("/v1/chat/completions", json={**BODY, **fields})
        return answer, (await http.get("/metrics")).text


@pytest.mark.parametrize("logprobs", [True, False])
async def test_an_answer_from_an_endpoint_has_tokens_and_cost(server, logprobs):
    server.reply = lambda body, number: good(body, logprobs=logprobs)
    answer, metrics = await ask(endpoint(server, **PRICES), cappy={"candidates": 4, "return_candidates": True})
    answered = answer.json()
    cost = sum((10 * 1000 + 3 * body.get("n", 1) * 2000) / 1e6 for body in server.bodies)
    assert answered["cappy"]["cost"] == pytest.approx(cost)
    assert answered["usage"]["prompt_tokens"] == 10
    assert {each["logprob"] for each in answered["cappy"]["candidates"]} == ({-1.5} if logprobs else {None})
    assert f"cappy_serving_cost_dollars_total {cost:g}"[:40] in metrics
    assert server.headers[0]["authorization"] == "Bearer very-secret"


async def test_an_answer_has_the_cost_whenever_the_endpoint_has_prices(server):
    body = (await ask(endpoint(server, **PRICES), cappy={"candidates": 1}))[0].json()
    assert body["cappy"]["cost"] > 0 and body["cappy"]["candidates"] == []
    assert "cappy" not in (await ask(endpoint(server)))[0].json()


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (error(401, "no such key: very-secret"), 502, "bad_gateway"),
        (error(404, "no model fox-1"), 502, "bad_gateway"),
        (error(429, "pay first", code="insufficient_quota"), 502, "bad_gateway"),
        (error(429, "slow down", headers={"Retry-After": "30"}), 503, "overloaded"),
        (error(429, "slow down"), 503, "overloaded"),
        (error(500, "secret plan"), 503, "overloaded"),
        (error(400, "it has 9 tokens", code="context_length_exceeded"), 400, "context_length_exceeded"),
        (error(400, "max_tokens is too large", param="max_tokens"), 400, "refused_by_endpoint"),
    ],
)
async def test_an_endpoints_error_reaches_the_client_without_addresses_and_keys(server, answer, status, code):
    server.reply = lambda body, number: answer
    response, _ = await ask(endpoint(server))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "secret" not in response.text and server.url not in response.text and "FOX_KEY" not in response.text
    if status == 503:
        assert int(response.headers["retry-after"]) == (30 if "Retry-After" in answer[1] else 1)


async def test_a_content_filter_takes_only_the_candidates_that_it_stopped(server):
    server.reply = lambda body, number: good(body) if body["temperature"] else error(400, "no", code="content_filter")
    answer, _ = await ask(endpoint(server), cappy={"candidates": 4, "return_candidates": True})
    assert {body["temperature"] > 0 for body in server.bodies} == {True, False}
    assert answer.status_code == 200 and "greedy" not in {each["decoding"] for each in answer.json()["cappy"]["candidates"]}
    server.reply = lambda body, number: error(403, "your input was flagged")
    answer, _ = await ask(endpoint(server), cappy={"candidates": 4})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "refused_by_endpoint")


async def test_during_a_cool_down_the_next_request_is_a_503_without_a_call_and_a_late_endpoint_is_a_504(server):
    server.reply = lambda body, number: error(429, headers={"Retry-After": "30"})
    llm = endpoint(server)
    await ask(llm, temperature=0)
    assert (await ask(llm))[0].status_code == 503 and len(server.bodies) == 1
    server.delay_s = 1.0
    late, _ = await ask(endpoint(server, timeout_s=0.1))
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")


async def test_requests_that_the_rate_limit_would_delay_too_long_are_rejected(server):
    llm = endpoint(server, requests_per_minute=2, max_wait_s=20.0)
    answers = await asyncio.gather(*(ask(llm, temperature=0) for _ in range(5)))
    assert sorted(answer.status_code for answer, _ in answers) == [200, 503, 503, 503, 503] and len(server.bodies) == 1
    # The rate limit allows the next call after 30 s.
    assert all(20 < int(answer.headers["retry-after"]) <= 30 for answer, _ in answers if answer.status_code == 503)


async def test_the_cost_limit_holds_across_servers_and_a_cancelled_request_counts_in_full(server, tmp_path):
    max_cost = endpoint(server, **PRICES).engine.max_cost(TURNS, BEAM) + endpoint(server, **PRICES).engine.max_cost(TURNS, WARM)
    settings = {**PRICES, "max_cost": 2.5 * max_cost}

    def charged():
        return (server.billed[0] * 1000 + server.billed[1] * 2000) / 1e6

    async def until_refused(llm):
        for count in range(200):
            try:
                pool = await llm.sample(TURNS, [BEAM, WARM], [1, 2])
            except ApiError as refused:
                assert (refused.status, refused.code) == (429, "insufficient_quota")
                return count
            assert pool["cost"] == pytest.approx(ONE_OF_BEAM_THREE_OF_WARM)
        raise AssertionError("no request was refused")

    first = endpoint(server, ledger=tmp_path, **settings)
    server.delay_s = 1.5
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(first.sample(TURNS, [BEAM, WARM], [1, 2]), 0.3)
    server.delay_s = 0.0
    answered = await until_refused(first)
    # Each call of the cancelled request was sent once without an answer, which may cost half of its maximum.
    spent = max_cost / 2 + answered * ONE_OF_BEAM_THREE_OF_WARM
    assert answered > 1 and settings["max_cost"] - max_cost < spent <= settings["max_cost"]
    assert charged() <= settings["max_cost"]
    assert await until_refused(endpoint(server, ledger=tmp_path, **settings)) == 0
    assert await until_refused(endpoint(server, ledger=tmp_path, **settings | {"max_cost": 4 * max_cost})) > 0


class Staggered:
    """An engine in which a decoding starts after another decoding, or an event that the test sets; `after` maps one to the other.

    The decodings in `failing` raise instead.
    """

    def __init__(self, engine, after, failing=()):
        self.engine, self.after, self.failing, self.cancelled = engine, after, failing, []
        self.ended = collections.defaultdict(asyncio.Event)

    def __getattr__(self, name):
        return getattr(self.engine, name)

    async def sample(self, prompt, decoding, *rest, **more):
        try:
            if decoding.name in self.after:
                await self.ended[self.after[decoding.name]].wait()
        except asyncio.CancelledError:
            self.cancelled.append(decoding.name)
            raise
        if decoding.name in self.failing:
            raise EngineUnavailable("not now")
        pool = await self.engine.sample(prompt, decoding, *rest, **more)
        self.ended[decoding.name].set()
        return pool


@pytest.mark.parametrize(
    ("after", "reported"),
    [({"beam": "reported"}, True), ({"warm": "beam"}, False), ({}, False)],
    ids=["three of four", "one of four", "all at once"],
)
async def test_finished_responses_are_reported_once_most_are_finished_and_the_rest_takes_longer(t5, after, reported):
    llm = seq2seq(t5)
    llm.engine = Staggered(llm.engine, after)
    parts = []
    async for part in llm.stream_sample(TURNS, [BEAM, WARM], [1, 2], True):
        parts.append(part)
        llm.engine.ended["reported"].set()
    pool = parts[-1]
    assert [each["decoding"] for each in pool["candidates"]] == ["beam", "warm", "warm", "warm"]
    assert len(parts) == 1 + reported
    if reported:
        assert parts[0] == [each["response"] for each in pool["candidates"][1:]]


async def test_a_late_failure_fails_the_request_and_closing_the_stream_cancels_the_sampling(t5):
    llm = seq2seq(t5)
    llm.engine = Staggered(llm.engine, {"beam": "reported"}, failing=("beam",))
    parts = llm.stream_sample(TURNS, [BEAM, WARM], [1, 2], True)
    assert len(await anext(parts)) == 3
    llm.engine.ended["reported"].set()
    with pytest.raises(ApiError, match="accepts no requests at the moment"):
        await anext(parts)
    llm.engine.after, llm.engine.failing = {"beam": "never"}, ()
    parts = llm.stream_sample(TURNS, [BEAM, WARM], [1, 2], True)
    await anext(parts)
    await parts.aclose()
    await asyncio.sleep(0.05)
    assert llm.engine.cancelled == ["beam"]


def test_an_api_error_keeps_its_fields_when_pickled():
    error = pickle.loads(pickle.dumps(ApiError("later", 503, param="n", code="overloaded", retry_s=30.0)))
    assert (str(error), error.status, error.param, error.code, error.headers) == ("later", 503, "n", "overloaded", {"Retry-After": "30"})
