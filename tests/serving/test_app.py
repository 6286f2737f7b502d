"""The real graph: `cappy serve` with SmolLM2 on vLLM and a MiniLM scorer (its head untrained) from S3, over HTTP."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import httpx
import numpy as np
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve as ray_serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID, DeploymentStatus, DeploymentStatusTrigger
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from benchmarks import hostile
from cluster import models, ports, storage
from cluster.config import Config, EndpointConfig, ServingConfig
from cluster.errors import CappyError, UsageError
from generation.engines.contract import PromptTooLong
from generation.engines.endpoint import EndpointEngine
from generation.prompts import messages
from serving import app, client, serve
from serving.backend import ApiError
from serving.prometheus import Metrics
from tests.conftest import CAPPY
from tests.generation.engines.test_vllm_server import GREEDY, TOP_K, TURNS, WARM, ask
from tests.serving.test_scorer_cache import publish
from tests.training import conftest

encoder = conftest.encoder
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_taken_port_or_a_strange_host_is_refused_before_anything_loads(tmp_path, no_ray):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            CappyError, match=rf"serving\.port={port} is in use on 127\.0\.0\.1; stop the other server or set serving\.port"
        ):
            serve.run_serve(Config(workspace=str(tmp_path), serving=ServingConfig(port=port)))
    with pytest.raises(UsageError, match=r"serving.host=no.such.host.invalid"):
        serve.run_serve(Config(workspace=str(tmp_path), serving=ServingConfig(host="no.such.host.invalid")))


def test_limits_that_every_request_would_break_are_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"the server would refuse every request: .*8 candidates may have 512 tokens .*serving\.max_sampled_tokens"
    ):
        serve.run_serve(Config(workspace=str(tmp_path), serving=ServingConfig(max_sampled_tokens=100)))


def test_a_scorer_that_is_missing_or_unfinished_is_refused(tmp_path):
    from training import main_scorer
    from training.scorer import CHECKPOINTS

    assert main_scorer.CHECKPOINTS_FOLDER == CHECKPOINTS
    with pytest.raises(CappyError, match="scorer is not there; run `cappy train`"):
        serve.check_scorer(Config(workspace=str(tmp_path)))
    (tmp_path / "scorer" / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / "scorer" / "config.json").write_text("{}")
    with pytest.raises(CappyError, match="did not finish; run `cappy train`"):
        serve.check_scorer(Config(workspace=str(tmp_path)))


class Handle:
    """A Serve handle whose first calls end with the items of `ends`: an exception is raised, another value is the answer."""

    app_name, deployment_name = "cappy", "Scorer"

    def __init__(self, *ends):
        self.ends, self.calls = ends, 0
        self.score = self.ready = self.sample = self.stream_sample = self

    def remote(self, *_):
        end = self.ends[min(self.calls, len(self.ends) - 1)]
        self.calls += 1

        async def reply():
            if isinstance(end, Exception):
                raise end
            return end

        return reply()

    def options(self, **_):
        return self


class Parts(Handle):
    """A handle of the LLM, whose calls yield: each its own end, or `all_at_once` all of them; None never comes."""

    def __init__(self, *ends, all_at_once=False):
        super().__init__(*ends)
        self.all_at_once, self.cancelled = all_at_once, False

    def remote(self, *_):
        ends = self.ends if self.all_at_once else self.ends[self.calls : self.calls + 1]
        self.calls += 1
        return Stream(self, ends)


class Stream:
    def __init__(self, handle, ends):
        self.handle, self.ends = handle, iter(ends)

    def __aiter__(self):
        return self

    async def __anext__(self):
        for end in self.ends:
            if isinstance(end, Exception):
                raise end
            if end is None:
                await asyncio.Event().wait()
            return end
        raise StopAsyncIteration

    def cancel(self):
        self.handle.cancelled = True


LOST = (ActorDiedError(), ActorUnavailableError("it is restarting", None), DeploymentUnavailableError(DeploymentID("Scorer")))


def backend(llm, scorer, **serving):
    return app.ServeBackend(llm, scorer, ServingConfig(**serving), Metrics())


@pytest.mark.parametrize("name", ["cappy-scorer", "another"])
async def test_a_scorers_replica_that_is_lost_under_a_call_hurts_no_request(name):
    scored = {"scores": [0.5], "tokens": [3]}
    both = backend(Handle(True), Handle(*LOST, scored))
    assert await both.score(name, ["q"], ["a"]) == scored
    assert both.scorer.calls == 4
    assert "cappy_serving_scorer_retries_total 3.0" in both.metrics.text().decode()


async def test_a_scorer_that_stays_unavailable_is_a_503_in_time_and_a_bug_is_not_retried():
    away = backend(Handle(True), Handle(LOST[0]), scorer_timeout_s=0.3)
    with pytest.raises(ApiError, match="the scorer stopped during the request") as caught:
        await away.score("cappy-scorer", ["q"], ["a"])
    assert (caught.value.status, caught.value.code) == (503, "unavailable") and 1 < away.scorer.calls <= 8
    broken = backend(Handle(True), Handle(KeyError("a bug")))
    with pytest.raises(KeyError):
        await broken.score("cappy-scorer", ["q"], ["a"])
    assert broken.scorer.calls == 1


@pytest.mark.parametrize("in_parts", [False, True])
async def test_a_lost_llm_fails_only_its_own_request_and_its_error_reaches_the_client_unchanged(in_parts):
    told = RayTaskError("sample", "a traceback", ApiError("later", 503, code="overloaded", retry_s=30.0))
    ends = (LOST[0], told.as_instanceof_cause(), {"candidates": []})
    both = backend(Parts(*ends) if in_parts else Handle(*ends), Handle(True))
    asked = ([], [], [], False, [].append if in_parts else None)
    with pytest.raises(ApiError, match="the LLM stopped during the request") as caught:
        await both.sample(*asked)
    assert caught.value.status == 503 and both.llm.calls == 1
    with pytest.raises(ApiError, match="later") as caught:
        await both.sample(*asked)
    assert caught.value.headers == {"Retry-After": "30"}
    assert await both.sample(*asked) == {"candidates": []}


async def test_finished_responses_are_passed_on_early_and_a_cancelled_request_is_cancelled_in_the_replica():
    heard = []
    assert await backend(Parts(["x", "xx"], {"candidates": []}, all_at_once=True), Handle(True)).sample(
        [], [], [], False, heard.append
    ) == {"candidates": []}
    assert heard == [["x", "xx"]]
    stuck = backend(Parts(["x"], None, all_at_once=True), Handle(True))
    sampling = asyncio.create_task(stuck.sample([], [], [], False, heard.append))
    await asyncio.sleep(0.05)
    sampling.cancel()
    await asyncio.wait([sampling])
    assert sampling.cancelled() and stuck.llm.cancelled and heard == [["x", "xx"], ["x"]]


@pytest.mark.parametrize(("status", "well"), [("HEALTHY", True), ("UPSCALING", True), ("UNHEALTHY", False), ("DEPLOY_FAILED", False)])
async def test_a_health_check_does_not_start_a_deployment_that_is_scaled_to_zero(status, well, monkeypatch):
    deployment = DeploymentStatusOverview(DeploymentStatus[status], DeploymentStatusTrigger.UNSPECIFIED, {}, "")
    overview = ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0.0, {"Scorer": deployment})
    monkeypatch.setattr(app.serve, "status", lambda: ServeStatus(applications={"cappy": overview}))
    both = backend(Handle(True), Handle(True), scorer_replicas={"min": 0, "max": 1})
    assert await both.ready() == {"llm": True, "scorer": well}
    assert (both.llm.calls, both.scorer.calls) == (1, 0)
    await both.ready()
    assert both.llm.calls == 1  # the status is cached for a moment


class Model:
    """A model without weights, as LLM and as scorer. `error` is raised by a call."""

    def __init__(self, error=None):
        self.error = error

    async def sample(self, *_):
        if self.error:
            raise self.error
        candidate = {"response": "a", "decoding": "x", "tokens": 1, "finish_reason": "stop", "logprob": None}
        return {"candidates": [candidate] * 2, "prompt_tokens": 1}

    async def score(self, *_):
        return {"scores": [0.5], "tokens": [3]}


@pytest.mark.parametrize(("error", "answers"), [(None, True), (KeyError("a bug"), False)])
def test_the_start_sends_a_test_request_through_the_deployments(error, answers):
    model = ray_serve.deployment(Model)
    gateway = ray_serve.deployment(ray_serve.ingress()(app.Gateway)).options(name="Gateway")
    graph = gateway.bind(Config(), (), model.options(name="LLM").bind(error), model.options(name="Scorer").bind())
    handle = ray_serve.run(graph, name="local", route_prefix="/", _local_testing_mode=True)
    assert handle.answers_test_request.remote().result() is answers


def test_every_deployment_has_a_bounded_queue(tmp_path):
    gateway = app.build_application(Config(workspace=str(tmp_path), serving=ServingConfig(max_concurrency=2, max_queue=2)))
    bound = gateway._bound_deployment
    others = [argument._bound_deployment for argument in bound.init_args if isinstance(argument, ray_serve.Application)]
    queues = {each.name: (each.max_ongoing_requests, each.max_queued_requests) for each in (bound, *others)}
    assert queues == {"Gateway": (32, 32), "LLM": (10, 128), "Scorer": (10, 2000)}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, s3_server) -> Iterator[str]:
    """A scorer folder in object storage, which this process can reach."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "scorer"
    encoder = models.resolve("minilm-l6", "scorer.encoder")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1, problem_type="regression").save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="served")
        for name in storage.list_files(str(folder)):
            storage.write_bytes(f"s3://served/scorer/{name}", storage.read_bytes(f"{folder}/{name}"))
        yield "s3://served/scorer"


@pytest.fixture(scope="module")
def server(scorer, tmp_path_factory):
    """The URL of a running server and its process."""
    port = ports.free_port()
    further = "[{name: tense, path: s3://served/tense}, {name: gone, path: s3://served/gone}]"
    settings = [
        f"serving.port={port}",
        f"scorer_path={scorer}",
        f"serving.scorers={further}",
        "serving.reload_s=0.5",
        "serving.scorer_dtype=float32",
        "serving.body_timeout_s=2",
    ]
    settings += ["sampler.engine.max_model_len=1024"]
    command = [*CAPPY, "serve", *(word for each in settings for word in ("--set", each)), "--json"]
    log = tmp_path_factory.mktemp("log") / "stderr"
    with log.open("w") as stderr:
        # With the engine's processes as a user has them.
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while "ready at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield url, process, log
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.fixture
def ai(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=180)


@pytest.mark.slow
def test_openais_client_gets_the_candidates_with_the_highest_scores(ai, scorer):
    from training.scorer import Scorer

    answer = ai.chat.completions.create(
        model="cappy", messages=QUESTION, n=2, max_tokens=24, extra_body={"cappy": {"candidates": 6, "return_candidates": True}}
    )
    cappy = answer.model_extra["cappy"]
    candidates = cappy["candidates"]
    assert len(candidates) == 6
    assert [candidate["decoding"] for candidate in candidates].count("greedy") == 1
    scores = [candidate["score"] for candidate in candidates]
    assert scores == sorted(scores, reverse=True)
    best = list(dict.fromkeys(candidate["response"] for candidate in candidates))[:2]
    assert [choice.message.content for choice in answer.choices] == best
    responses = [candidate["response"] for candidate in candidates]
    own = Scorer.load(scorer).score([QUESTION[0]["content"]] * 6, responses)
    np.testing.assert_allclose(scores, own, atol=1e-4)
    assert cappy["sampled_tokens"] == sum(candidate["tokens"] for candidate in candidates)
    assert answer.usage.completion_tokens == sum(candidate["tokens"] for candidate in candidates if candidate["chosen"])
    assert all(candidate["tokens"] <= 24 and candidate["logprob"] < 0 for candidate in candidates)
    print(f"\n6 candidates: {cappy['latency']}")


@pytest.mark.slow
def test_the_same_seed_draws_the_same_candidates(ai):
    def draw(seed):
        body = {"cappy": {"candidates": 3, "return_candidates": True}}
        answer = ai.chat.completions.create(model="cappy", messages=QUESTION, max_tokens=12, seed=seed, extra_body=body)
        return sorted(candidate["response"] for candidate in answer.model_extra["cappy"]["candidates"])

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.slow
def test_openais_client_reads_a_stream(ai):
    told = {"model": "cappy", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = ai.chat.completions.create(**told)
    stream = list(ai.chat.completions.create(**told, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.slow
def test_rounds_sample_until_the_target_and_a_stream_reports_each(ai):
    def draw(stream=False, **cappy):
        extra = {"candidates": 7, "return_candidates": True, "progress": stream, **cappy}
        return ai.chat.completions.create(model="cappy", messages=QUESTION, max_tokens=8, stream=stream, extra_body={"cappy": extra})

    plain, easy, hard = draw(), draw(target_score=-1e9), draw(target_score=1e9)
    assert (easy.model_extra["cappy"]["drawn"], easy.model_extra["cappy"]["stopped"]) == (1, "target_score")
    assert [each["decoding"] for each in easy.model_extra["cappy"]["candidates"]] == ["greedy"]
    assert (hard.model_extra["cappy"]["drawn"], hard.model_extra["cappy"]["stopped"]) == (7, "candidates")
    assert plain.usage.prompt_tokens == easy.usage.prompt_tokens == hard.usage.prompt_tokens
    for options in ({}, {"target_score": 1e9}):
        stream = list(draw(stream=True, **options))
        steps = [chunk.model_extra["cappy"]["progress"] for chunk in stream if not chunk.choices]
        assert len(steps) > 2 and len(steps[0]) < len(steps[-1]) == 7
        shown = stream[-1].model_extra["cappy"]["candidates"]
        assert sorted((each["score"], each["response"]) for each in steps[-1]) == sorted(
            (each["score"], each["response"]) for each in shown
        )


@pytest.mark.slow
def test_openais_client_gets_text_completions_whole_and_streamed(ai):
    told = {"model": "cappy", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    whole = ai.completions.create(**told)
    assert "Paris" in whole.choices[0].text and whole.choices[0].text.startswith(" ") and whole.object == "text_completion"
    assert whole.usage.prompt_tokens == 5 and whole.usage.completion_tokens == 8
    stream = list(ai.completions.create(**told, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
    assert (stream[-2].choices[0].finish_reason, stream[-1].usage.completion_tokens) == ("length", 8)
    with pytest.raises(openai.BadRequestError, match="token ids are not supported"):
        ai.completions.create(model="cappy", prompt=[1, 2])
    with pytest.raises(openai.BadRequestError, match="max_model_len=1024") as caught:
        ai.completions.create(model="cappy", prompt="word " * 2000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert len(ai.completions.create(**{**told, "model": "cappy-llm", "temperature": 1}, n=2).choices) == 2


@pytest.mark.slow
def test_further_scorers_answer_by_name_reload_after_a_new_publication_and_fail_alone(ai, server, encoder):
    from training.scorer import Scorer

    texts, versions = ["a red fox", "the white me", "a cow"], []
    pairs = {"text_1": "say after me red fox", "text_2": texts}
    with httpx.Client(base_url=server[0], timeout=60) as http:
        for seed in (1, 2):
            own = Scorer.load(publish(encoder, "s3://served/tense", seed)).score([pairs["text_1"]] * 3, texts)
            time.sleep(0.6)
            scored = http.post("/v1/score", json={"model": "tense", **pairs}).json()
            np.testing.assert_allclose([each["score"] for each in scored["data"]], own, atol=1e-6)
            asked = {"model": "cappy+tense", "messages": QUESTION, "max_tokens": 8}
            answer = ai.chat.completions.create(**asked, extra_body={"cappy": {"candidates": 2, "return_candidates": True}})
            assert answer.model_extra["cappy"]["scorer"] == "tense"
            versions.append(answer.model_extra["cappy"]["scorer_version"])
        assert None not in versions and len(set(versions)) == 2
        refused = http.post("/v1/score", json={"model": "cappy+gone", **pairs})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "scorer_unavailable") and "s3://" not in refused.text
        assert http.post("/v1/score", json={"model": "cappy-scorer", **pairs}).status_code == 200
        assert http.get("/health").status_code == 200


@pytest.mark.slow
def test_the_scorer_alone_scores_ranks_and_classifies_as_it_does_in_this_process(server, scorer):
    from training.scorer import Scorer

    texts = ["Paris", "London is a city", "a blue fox", "", "42"]
    instruction = QUESTION[0]["content"]
    own = Scorer.load(scorer).score([instruction] * len(texts), texts)
    order = np.argsort(-own, kind="stable").tolist()
    with httpx.Client(base_url=server[0], timeout=60) as http:
        scored = http.post("/v1/score", json={"model": "cappy-scorer", "text_1": instruction, "text_2": texts}).json()
        ranked = http.post("/v2/rerank", json={"model": "cappy-scorer", "query": instruction, "documents": texts, "top_n": 3}).json()
        chosen = http.post("/v1/classify", json={"model": "cappy-scorer", "instruction": instruction, "choices": texts[:3]}).json()
    np.testing.assert_allclose([each["score"] for each in scored["data"]], own, atol=1e-5)
    assert scored["usage"]["prompt_tokens"] > len(texts)
    assert [each["index"] for each in ranked["results"]] == order[:3]
    assert chosen["index"] == int(np.argmax(own[:3])) and chosen["choice"] == texts[chosen["index"]]


@pytest.mark.slow
def test_constraints_hold_for_every_candidate_and_invalid_ones_are_a_400(server):
    def ask(status, **fields):
        body = {"messages": QUESTION, "max_tokens": 12, "cappy": {"candidates": 2, "return_candidates": True}, **fields}
        answer = httpx.post(f"{server[0]}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == status, answer.text
        return answer.json()["error"] if status != 200 else [each["response"] for each in answer.json()["cappy"]["candidates"]]

    assert set(ask(200, structured_outputs={"choice": ["yes", "no"]})) <= {"yes", "no"}
    assert all(re.fullmatch("[0-9]{3}", each) for each in ask(200, structured_outputs={"regex": "[0-9]{3}"}))
    assert all(json.loads(each) in ([], [1]) for each in ask(200, structured_outputs={"json": {"enum": [[], [1]]}}))
    long = {"messages": [{"role": "user", "content": "Say yes."}], "min_tokens": 12, "temperature": 0, "cappy": {"return_candidates": True}}
    (candidate,) = httpx.post(f"{server[0]}/v1/chat/completions", json={**long, "max_tokens": 12}, timeout=120).json()["cappy"][
        "candidates"
    ]
    assert candidate["tokens"] == 12
    for fields in (
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"grammar": "xxx ::= ("}},
        {"structured_outputs": {"json": {"type": "nonsense"}}},
        {"structured_outputs": {"json": {"$ref": "#"}}},  # no text satisfies it
        {"stop_token_ids": [10**6]},
    ):
        error = ask(400, **fields)
        assert (error["param"], error["code"]) == (next(iter(fields)), "invalid_value") and "\n" not in error["message"]
    assert httpx.get(f"{server[0]}/health", timeout=60).status_code == 200
    assert httpx.get(f"{server[0]}/ready", timeout=60).json()["answers"] is True


@pytest.mark.slow
def test_models_health_and_errors_through_openais_client(ai, server):
    listed = [model.id for model in ai.models.list()]
    assert listed == ["cappy", "cappy+tense", "cappy+gone", "cappy-llm", "cappy-scorer", "tense", "gone"]
    assert ai.models.retrieve("cappy").id == "cappy"
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok", "llm": True, "scorer": True}
    with pytest.raises(openai.NotFoundError, match="use one of: cappy"):
        ai.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="n=0"):
        ai.chat.completions.create(model="cappy", messages=QUESTION, n=0)
    with pytest.raises(openai.BadRequestError, match="logprobs=true is not supported") as caught:
        ai.chat.completions.create(model="cappy", messages=QUESTION, logprobs=True)
    assert caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="max_model_len=1024") as caught:
        ai.chat.completions.create(model="cappy", messages=[{"role": "user", "content": "word " * 2000}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_cappys_client_and_curl_get_an_answer(server):
    url = server[0]
    answer = client.ask(url, QUESTION, 2, "cappy")
    assert len(answer["cappy"]["candidates"]) == 2
    with pytest.raises(CappyError, match=r"answered 404: model='x' is not served here"):
        client.ask(url, QUESTION, 2, "x")
    command = client.curl_command(url, client.request_body(QUESTION, 2, "cappy"))
    told = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["object"] == "chat.completion"


@pytest.mark.slow
def test_hostile_requests_do_not_reach_the_engine_and_the_server_still_answers(server):
    def drawn() -> float:
        families = text_string_to_metric_families(httpx.get(f"{server[0]}/metrics").text)
        return sum(each.value for family in families for each in family.samples if each.name == "cappy_serving_candidates_total")

    def ask(rows: list[hostile.HostileRequest]) -> list[tuple[hostile.HostileRequest, hostile.Answer]]:
        with ThreadPoolExecutor(8) as pool:
            return list(zip(rows, pool.map(lambda each: hostile.send(server[0], each), rows), strict=True))

    every = hostile.hostile_requests(ServingConfig())
    before = drawn()
    refused = ask([each for each in every if each.status != 200])
    assert drawn() == before
    answered = refused + ask([each for each in every if each.status == 200])
    print(f"\n{hostile.table(answered)}")
    assert {each.name: (answer.status, answer.code) for each, answer in answered} == {each.name: (each.status, each.code) for each in every}
    assert client.ask(server[0], QUESTION, 2)["cappy"]["candidates"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", None),
        ("/health", None),
        ("/ready", None),
        ("/metrics", None),
        ("/openapi.json", None),
        ("/v1/completions", {"model": "cappy", "prompt": "q", "max_tokens": 4, "cappy": {"candidates": 2}}),
        ("/v1/score", {"model": "cappy-scorer", "text_1": "q", "text_2": "a"}),
        ("/v1/rerank", {"model": "cappy-scorer", "query": "q", "documents": ["a", "b"]}),
        ("/v2/rerank", {"model": "cappy-scorer", "query": "q", "documents": ["a", "b"]}),
        ("/v1/classify", {"model": "cappy-scorer", "instruction": "q", "choices": ["a", "b"]}),
    ],
)
def test_curl_reaches_each_route(server, path, body):
    send = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body else []
    told = subprocess.run(["curl", "-sf", f"{server[0]}{path}", *send], capture_output=True, text=True, check=True)
    assert told.stdout


@pytest.mark.slow
def test_the_server_has_the_page_and_each_answer_is_one_line_of_json_in_rays_log(server):
    url, process, _ = server
    shown = httpx.get(url, headers={"X-Request-Id": "page-1"})
    assert shown.status_code == 200 and "<title>Cappy on Ray</title>" in shown.text
    assert shown.headers.get_list("x-request-id") == ["page-1"]
    (number,) = httpx.get(f"{url}/v1/models").headers.get_list("x-request-id")
    assert number
    family = psutil.Process(process.pid).children(recursive=True)
    (file,) = {each.path for child in family for each in child.open_files() if "replica_cappy_Gateway" in each.path}
    deadline = time.monotonic() + 30
    while "page-1" not in (log := Path(file).read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    # Every line: Serve's own access log, which is not JSON, is off.
    (line,) = [line for line in map(json.loads, log.splitlines()) if line.get("request_id") == "page-1"]
    print(f"\n{line}")
    assert (line["method"], line["route"], line["status"], line["key"]) == ("GET", "/", 200, None)
    assert line["bytes"] == len(shown.content) and line["seconds"] >= 0


@pytest.mark.slow
async def test_concurrent_requests_are_all_answered_and_a_disconnected_client_frees_the_engine(server):
    # 64 x 900 tokens would keep the engine busy for minutes.
    endless = client.request_body(QUESTION, 64, "cappy") | {"max_tokens": 900, "temperature": 1.5, "stop": ["\0"]}
    short = client.request_body(QUESTION, 2, "cappy") | {"max_tokens": 8}
    async with httpx.AsyncClient(base_url=f"{server[0]}/v1", timeout=60) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/chat/completions", json=endless, timeout=3)
        answers = await asyncio.gather(*(http.post("/chat/completions", json=short) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8


@pytest.mark.slow
def test_the_endpoint_engine_samples_from_the_server(server, capsys):
    llm = EndpointEngine("cappy", EndpointConfig(kind="endpoint", base_url=f"{server[0]}/v1"))
    long = messages("word " * 2000)
    greedy, warm, ranked, refused = ask(llm, "chat", (TURNS, GREEDY, 1), (TURNS, WARM, 1), (TURNS, TOP_K, 1), (long, GREEDY, 1))
    assert "Paris" in greedy[0]["response"]
    assert len({each["response"] for each in warm}) == 3
    # The server gives no log-probabilities, and refuses fields that it does not support, so the engine leaves them out and logs it.
    assert {each["logprob"] for each in [*greedy, *warm]} == {None}
    assert len(ranked) == 2
    assert "rejects top_k, so no request has it" in capsys.readouterr().err
    assert isinstance(refused, PromptTooLong)
    print(f"\n{greedy[0]}")


@pytest.mark.slow
def test_only_loopback_is_bound_and_sigterm_ends_server_and_engine(server):
    url, process, log = server
    port = int(url.rsplit(":", 1)[1])
    family = psutil.Process(process.pid).children(recursive=True)
    names = [child.name() for child in family]
    assert any("Engine" in name for name in names), names
    bound = {
        connection.laddr.ip
        for child in family
        for connection in child.net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
    }
    assert bound == {"127.0.0.1"}
    os.kill(process.pid, signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(stdout)["uri"] == url
    assert stdout.count("\n") == 1
    _, left = psutil.wait_procs(family, timeout=10)
    assert left == []
    assert "Traceback" not in log.read_text()
