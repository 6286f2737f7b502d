import asyncio
import json

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import Config, ServingConfig
from serving.backend import ApiError
from serving.gateway import build_api
from tests.serving.standin import BODY, Echo, client
from training.selection import Selection, Variant


async def test_candidates_are_scored_as_they_finish_at_low_load_and_never_without_a_scorer():
    class Asked(Echo):
        def __init__(self):
            super().__init__(wait=0.1)
            self.early = []

        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            self.early.append(on_finished is not None)
            return await super().sample(prompt, decodings, seeds, logprobs, on_finished)

    backend = Asked()
    async with client(backend, max_concurrency=8) as http:
        await asyncio.gather(*(http.post("/v1/chat/completions", json=BODY) for _ in range(4)))
        assert backend.early == [True, True, False, False]
        await http.post("/v1/chat/completions", json=BODY)
        await http.post("/v1/chat/completions", json={**BODY, "model": "cappy-llm"})
        assert backend.early[4:] == [True, False]


async def test_the_best_candidate_answers_and_each_response_is_scored_once():
    backend = Echo()
    async with client(backend) as http:
        answer = (await http.post("/v1/chat/completions", json=BODY)).json()
    assert answer["choices"][0]["message"]["content"] == "xxx"
    assert "cappy" not in answer
    assert backend.read == [(["hi"] * 4, ["", "x", "xx", "xxx"])]


@pytest.mark.parametrize(
    ("serving", "extra", "wanted"),
    [
        ({}, {}, False),
        ({}, {"cappy": {"candidates": 3}}, False),
        ({}, {"cappy": {"return_candidates": True}}, True),
        ({}, {"stream": True, "cappy": {"progress": True}}, True),
        ({}, {"cappy": {"fallback": "self_score"}}, True),
        ({}, {"cappy": {"min_gain": 0.01}}, True),
        ({"fallback": "self_score"}, {}, True),
        ({"fallback": "self_score"}, {"cappy": {"fallback": "first"}}, False),
        ({"selection": "blend"}, {}, True),
        ({"selection": "fitted"}, {}, True),
        ({"selection": "consensus"}, {}, False),
        ({"selection": "blend"}, {"model": "cappy-llm"}, False),
        ({"adaptive": {"min_gain": 0.01}}, {}, True),
        ({"adaptive": {"target_score": 0.9}}, {}, False),
        ({"adaptive": {"min_gain": 0.01}}, {"cappy": {"target_score": 0.9}}, False),
    ],
)
async def test_the_llm_computes_log_probabilities_only_if_a_step_reads_them(serving, extra, wanted):
    backend = Echo()
    async with client(backend, **serving) as http:
        assert (await http.post("/v1/chat/completions", json=BODY | extra)).status_code == 200
    assert backend.logprobs is wanted


async def test_a_request_with_cappy_options_gets_latencies_and_on_request_the_candidates():
    async with client(Echo()) as http:
        extras = (await http.post("/v1/chat/completions", json={**BODY, "cappy": {"candidates": 3}})).json()["cappy"]
        assert "cappy" not in (await http.post("/v1/chat/completions", json={**BODY, "cappy": {}})).json()
    assert extras["drawn"] == 3 and extras["candidates"] == [] and set(extras["latency"]) == {"sampling_s", "scoring_s"}


@pytest.mark.parametrize(("selection", "best"), [("blend", "xx"), ("scorer", "xxx")])
async def test_a_fitted_weight_blends_the_log_probability_with_selection_blend(selection, best):
    class Surer(Echo):
        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
            for each in sampled["candidates"]:
                each |= {"tokens": 2, "logprob": -4.0 if each["response"] == "xxx" else -1.0}
            return sampled

    async with client(Surer(weight=1.0), selection=selection) as http:
        body = {**BODY, "cappy": {"return_candidates": True}}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == best
    assert {each["response"]: each["score"] for each in answer["cappy"]["candidates"]} == {"": 0, "x": 1, "xx": 2, "xxx": 3}


SHORTEST = Selection((Variant(("score", "logprob_mean"), (-1.0, 0.0), (1.0, 1.0)), Variant(("score",), (1.0,), (1.0,))))


@pytest.mark.parametrize(
    ("server", "requested", "fitted", "best", "selected_by"),
    [
        ({}, None, None, "xxx", "score"),
        ({}, None, SHORTEST, "x", "fitted"),
        ({"selection": "fitted"}, None, SHORTEST, "x", "fitted"),
        ({"selection": "fitted"}, None, None, "xxx", "score"),
        ({"selection": "score"}, None, SHORTEST, "xxx", "score"),
        ({"selection": "score"}, "fitted", SHORTEST, "x", "fitted"),
        ({}, "score", SHORTEST, "xxx", "score"),
        ({}, "blend", SHORTEST, "xxx", "score"),
    ],
)
async def test_the_fitted_selection_of_the_scorer_selects(server, requested, fitted, best, selected_by):
    async with client(Echo(selection=fitted), **server) as http:
        body = {**BODY, "cappy": {"return_candidates": True, "selection": requested}}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert (answer["choices"][0]["message"]["content"], answer["cappy"]["selection"]) == (best, selected_by)
    assert answer["cappy"]["candidates"][0]["response"] == best


async def test_log_probabilities_are_requested_once_the_scorer_is_known_to_have_a_selection():
    backend = Echo(selection=SHORTEST)
    async with client(backend) as http:
        wanted = []
        for selection in (SHORTEST, SHORTEST, None, None):
            backend.selection = selection
            assert (await http.post("/v1/chat/completions", json=BODY)).status_code == 200
            wanted.append(backend.logprobs)
    assert wanted == [False, True, True, False]


class Voters(Echo):
    """A backend whose candidates agree on the shortest, which the scorer ranks last."""

    async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
        sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
        for at, each in enumerate(sampled["candidates"]):
            each |= {"response": "a" if at % 2 else f"something else {at}", "logprob": None}
        return sampled


@pytest.mark.parametrize(
    ("server", "cappy", "best", "selected_by"),
    [
        ({"selection": "consensus"}, {}, "a", "consensus"),
        ({}, {"selection": "consensus"}, "a", "consensus"),
        ({"selection": "consensus"}, {"selection": "score"}, "something else 0", "score"),
    ],
)
async def test_the_consensus_selects_the_candidate_with_the_most_agreement(server, cappy, best, selected_by):
    backend = Voters()
    async with client(backend, **server) as http:
        body = {**BODY, "cappy": {"candidates": 4, **cappy}}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert (answer["choices"][0]["message"]["content"], answer["cappy"]["selection"]) == (best, selected_by)
    assert bool(backend.read) == (selected_by == "score")


async def test_the_consensus_selects_for_the_llm_alone_and_the_other_selections_need_a_scorer():
    async with client(Voters()) as http:
        body = {**BODY, "model": "cappy-llm"}
        answer = (await http.post("/v1/chat/completions", json=body | {"cappy": {"selection": "consensus"}})).json()
        assert answer["choices"][0]["message"]["content"] == "a" and answer["cappy"]["drawn"] == 8
        refused = await http.post("/v1/chat/completions", json=body | {"cappy": {"selection": "fitted"}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "cappy.selection"


@pytest.mark.parametrize("cappy", [{"fallback": "consensus"}, {"selection": "consensus", "return_candidates": True}])
async def test_the_consensus_selects_when_the_scorer_fails_without_log_probabilities(cappy):
    async with client(Voters(scorer_error=ApiError("down", 503))) as http:
        answer = (await http.post("/v1/chat/completions", json={**BODY, "cappy": cappy})).json()
    assert answer["choices"][0]["message"]["content"] == "a"
    assert (answer["cappy"]["fallback"], answer["cappy"]["selection"]) in {("consensus", None), (None, "consensus")}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "message"),
    [
        ("POST", "/v1/chat/completions", {**BODY, "model": "gpt-4"}, 404, "model_not_found", "use one of: cappy"),
        ("POST", "/v1/chat/completions", {**BODY, "n": 0}, 400, "invalid_value", "n=0"),
        ("POST", "/v1/chat/completions", {**BODY, "user": "x" * ServingConfig().max_body_bytes}, 413, "body_too_large", "larger than"),
        ("POST", "/v1/score", {"model": "gpt-4", "text_1": "a", "text_2": "b"}, 404, "model_not_found", "use one of: cappy, cappy-scorer"),
        ("POST", "/v2/rerank", {"model": "cappy", "query": "q", "documents": []}, 400, "invalid_value", "documents=[]"),
        ("POST", "/v1/classify", {"model": "cappy", "instruction": "q"}, 400, "invalid_value", "choices is missing"),
        ("POST", "/v1/chat/completions", {**BODY, "model": "cappy-scorer"}, 404, "model_not_found", "use one of: cappy, cappy-llm"),
        ("POST", "/v1/chat/completions", {**BODY, "cappy": {"scorer": "x"}}, 404, "model_not_found", "use one of: cappy-scorer"),
        ("POST", "/v1/completions", {"model": "cappy", "prompt": [1, 2]}, 400, "invalid_value", "token ids are not supported"),
        (
            "POST",
            "/v1/classify",
            {"model": "cappy-llm", "instruction": "q", "choices": ["a", "b"]},
            404,
            "model_not_found",
            "use one of: cappy, ",
        ),
        ("GET", "/v1/models/gpt-4", None, 404, "model_not_found", "use one of: cappy"),
        ("GET", "/v2/nothing", None, 404, "not_found", "POST /v1/chat/completions"),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed", "/v1/chat/completions does not support GET"),
    ],
)
async def test_errors_have_openais_shape(method, path, body, status, code, message):
    async with client(Echo()) as http:
        response = await http.request(method, path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (status, "invalid_request_error", code)
    assert message in error["message"]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_pairs_are_scored_in_order_and_split_over_calls_of_the_scorer(path):
    backend, texts = Echo(), ["x" * (n % 7) for n in range(150)]
    async with client(backend) as http:
        answer = (await http.post(path, json={"model": "cappy-scorer", "text_1": "q", "text_2": texts})).json()
    assert [(each["index"], each["score"]) for each in answer["data"]] == [(n, n % 7) for n in range(150)]
    assert [len(responses) for _, responses in backend.read] == [64, 64, 22]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts)) and answer["object"] == "list"


@pytest.mark.parametrize(("path", "documents"), [("/rerank", True), ("/v1/rerank", True), ("/v2/rerank", False)])
async def test_documents_are_ranked_on_each_rerankers_route(path, documents):
    async with client(Echo()) as http:
        body = {"model": "cappy-scorer", "query": "q", "documents": ["x", "xxx", "xx"], "top_n": 2}
        answer = (await http.post(path, json=body)).json()
    assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == [(1, 3.0), (2, 2.0)]
    assert all(("document" in each) is documents for each in answer["results"])


async def test_classify_selects_with_the_scorer_alone():
    async with client(Echo()) as http:
        answer = (await http.post("/v1/classify", json={"model": "cappy", "instruction": "q", "choices": ["x", "xxx"]})).json()
    assert (answer["choice"], answer["index"], answer["scores"]) == ("xxx", 1, [1.0, 3.0])


async def test_the_models_are_the_llm_with_each_scorer_the_llm_and_the_scorers():
    async with client(Echo(), further=["tense", "a/b"]) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [(each["id"], each["cappy"]["llm"], each["cappy"]["scorer"]) for each in listed] == [
            ("cappy", True, "cappy-scorer"),
            ("cappy+tense", True, "tense"),
            ("cappy+a/b", True, "a/b"),
            ("cappy-llm", True, None),
            ("cappy-scorer", False, "cappy-scorer"),
            ("tense", False, "tense"),
            ("a/b", False, "a/b"),
        ]
        assert (await http.get("/v1/models/cappy+a/b")).json() == listed[2]


@pytest.mark.parametrize(
    ("model", "requested", "selected"),
    [
        ("cappy", None, "cappy-scorer"),
        ("cappy+tense", None, "tense"),
        ("cappy", "tense", "tense"),
        ("cappy+tense", "cappy-scorer", "cappy-scorer"),
        ("cappy-llm", "tense", "tense"),
    ],
)
async def test_cappy_scorer_takes_precedence_over_the_scorer_of_the_model(model, requested, selected):
    backend = Echo()
    async with client(backend, further=["tense"]) as http:
        body = {**BODY, "model": model, "cappy": {"scorer": requested, "return_candidates": True}}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert backend.scorers == [answer["cappy"]["scorer"]] == [selected]
    assert answer["cappy"]["scorer_version"] == "v1" and answer["model"] == model


async def test_the_llm_alone_samples_n_candidates_without_scores():
    backend = Echo()
    async with client(backend) as http:
        body = {**BODY, "model": "cappy-llm", "n": 3, "cappy": {"return_candidates": True}}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        metrics = (await http.get("/metrics")).text
        floor = await http.post("/v1/chat/completions", json={**body, "cappy": {"min_score": 0.5}})
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["x", "xx", ""]
    assert (answer["cappy"]["scorer"], answer["cappy"]["scorer_version"], answer["cappy"]["fallback"]) == (None, None, None)
    assert {each["score"] for each in answer["cappy"]["candidates"]} == {None}
    assert backend.read == [] and "cappy_serving_score_count 0.0" in metrics and 'how="first"' not in metrics
    assert floor.status_code == 400 and "the LLM alone" in floor.json()["error"]["message"]


@pytest.mark.parametrize(("model", "scorer"), [("tense", "tense"), ("cappy+tense", "tense"), ("cappy", "cappy-scorer")])
async def test_a_scorer_scores_by_its_name_and_by_that_of_its_pair(model, scorer):
    backend = Echo()
    async with client(backend, further=["tense"]) as http:
        for path, body in (
            ("/v1/score", {"text_1": "q", "text_2": "x"}),
            ("/v1/rerank", {"query": "q", "documents": ["x"]}),
            ("/v1/classify", {"instruction": "q", "choices": ["x", "xx"]}),
        ):
            assert (await http.post(path, json={"model": model, **body})).status_code == 200
    assert backend.scorers == [scorer] * 3


async def test_a_list_of_names_in_an_error_is_cut():
    async with client(Echo(), further=[f"t{n}" for n in range(200)]) as http:
        message = (await http.post("/v1/score", json={"model": "x" * 999, "text_1": "q", "text_2": "x"})).json()["error"]["message"]
    assert "cappy+t6 and 394 more, see /v1/models" in message and len(message) < 300


TEXT = {"model": "cappy", "prompt": " Once upon a"}


async def test_a_text_completion_continues_the_unmodified_prompt_and_the_scorer_reads_it():
    class Spaced(Echo):
        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
            for each in sampled["candidates"]:
                each["text"] = f" {each['response']}"
            return sampled

    backend = Spaced()
    async with client(backend) as http:
        answer = (await http.post("/v1/completions", json={**TEXT, "n": 2, "cappy": {"return_candidates": True}})).json()
        data, _ = events(
            (await http.post("/v1/completions", json={**TEXT, "stream": True, "stream_options": {"include_usage": True}})).text
        )
    assert backend.prompts == [" Once upon a"] * 2 and backend.read[0] == (["Once upon a"] * 4, ["", "x", "xx", "xxx"])
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"][0] == {"index": 0, "text": " xxx", "finish_reason": "stop", "logprobs": None}
    assert answer["usage"]["prompt_tokens"] == 4 and len(answer["cappy"]["candidates"]) == 8
    chunks = [json.loads(each) for each in data[:-1]]
    assert {each["object"] for each in chunks} == {"text_completion"} and data[-1] == "[DONE]"
    assert [each["choices"][0]["text"] for each in chunks[:-1]] == [" xxx", ""]
    assert [each["choices"][0]["finish_reason"] for each in chunks[:-1]] == [None, "stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "requested", "field"),
    [
        ("/v1/completions", {"prompt": "one", "max_tokens": 100}, "max_tokens"),
        ("/v1/chat/completions", {"messages": BODY["messages"], "max_tokens": 100}, "max_tokens"),
        ("/v1/chat/completions", {"messages": BODY["messages"], "max_completion_tokens": 100}, "max_completion_tokens"),
    ],
)
async def test_tokens_above_max_sampled_tokens_are_refused_under_the_name_of_the_field(path, requested, field):
    backend = Echo()
    async with client(backend, max_sampled_tokens=700) as http:
        answer = await http.post(path, json={"model": "cappy", **requested})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], backend.prompts) == (400, field, []) and "serving.max_sampled_tokens" in error["message"]


async def test_a_text_completion_below_min_score_is_empty_and_reports_it():
    async with client(Echo()) as http:
        answer = (await http.post("/v1/completions", json={**TEXT, "cappy": {"min_score": 9}})).json()
    assert answer["choices"] == [{"index": 0, "text": "", "finish_reason": "stop", "logprobs": None}]
    assert answer["cappy"]["abstained"] and answer["usage"]["completion_tokens"] == 0


async def test_an_unavailable_engine_is_a_503_with_retry_after_and_an_exception_a_500_without_details():
    async with client(Echo(error=ApiError("down", 503, code="unavailable"))) as http:
        response = await http.post("/v1/chat/completions", json=BODY)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    async with client(Echo(error=KeyError("secret"))) as http:
        response = await http.post("/v1/chat/completions", json=BODY)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error" and "secret" not in response.text


def events(text):
    """Return the data of a stream's events, and the number of comments between them."""
    blocks = text.strip().split("\n\n")
    return [each.removeprefix("data: ") for each in blocks if not each.startswith(":")], sum(each.startswith(":") for each in blocks)


async def test_a_stream_sends_keep_alives_during_sampling_then_the_best_in_chunks_then_the_usage():
    class Wordy(Echo):
        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
            for each in sampled["candidates"]:
                each["response"] = " ".join(each["response"]) + "\nend"
            return sampled

    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}, "cappy": {"return_candidates": True}}
    async with client(Wordy(wait=0.4), keep_alive_s=0.1) as http:
        response = await http.post("/v1/chat/completions", json=body)
        whole = (await http.post("/v1/chat/completions", json={**BODY})).json()
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    data, comments = events(response.text)
    assert comments >= 1 and data[-1] == "[DONE]"
    chunks = [json.loads(each) for each in data[:-1]]
    assert {each["object"] for each in chunks} == {"chat.completion.chunk"} and len({each["id"] for each in chunks}) == 1
    pieces = [each["choices"][0]["delta"].get("content", "") for each in chunks[:-1]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"] == "x x x\nend"
    assert [piece for piece in pieces if piece] == ["x", " x", " x", "\nend"]
    assert [each["choices"][0]["finish_reason"] for each in chunks[:-1]] == [None] * 5 + ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] == 4 and chunks[0]["usage"] is None
    assert len(chunks[-1]["cappy"]["candidates"]) == 8


async def test_a_stream_sends_its_choices_in_order_and_usage_only_on_request():
    async with client(Echo()) as http:
        data, _ = events((await http.post("/v1/chat/completions", json={**BODY, "n": 2, "stream": True})).text)
    chunks = [json.loads(each) for each in data[:-1]]
    assert [each["choices"][0]["index"] for each in chunks] == [0, 0, 0, 1, 1, 1]
    assert all("usage" not in each and "cappy" not in each for each in chunks)


@pytest.mark.parametrize(
    ("error", "code"), [(ApiError("down", 503, code="unavailable"), "unavailable"), (KeyError("secret"), "internal_error")]
)
async def test_a_late_failure_of_a_stream_is_an_event_and_an_early_one_a_status(error, code):
    async with client(Echo(error=error, wait=0.3), keep_alive_s=0.05) as http:
        late = await http.post("/v1/chat/completions", json={**BODY, "stream": True})
    (data,), comments = events(late.text)
    assert late.status_code == 200 and comments >= 1
    assert json.loads(data)["error"]["code"] == code and "secret" not in data
    async with client(Echo(error=error)) as http:
        early = await http.post("/v1/chat/completions", json={**BODY, "stream": True})
    assert early.status_code >= 500 and early.json()["error"]["code"] == code


async def test_a_client_that_disconnects_from_a_stream_cancels_its_sampling():
    backend = Echo(wait=30)
    api = build_api(Config(serving=ServingConfig(keep_alive_s=0.05)), backend)
    gone = asyncio.Event()
    body = [json.dumps({**BODY, "stream": True}).encode()]

    async def receive():
        if body:
            return {"type": "http.request", "body": body.pop()}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if b"sampling" in message.get("body", b""):
            gone.set()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    await asyncio.wait_for(api(scope, receive, send), 10)
    await asyncio.sleep(0)
    assert backend.cancelled == 1


async def test_a_request_above_the_time_limit_is_a_504_and_its_sampling_is_cancelled():
    backend = Echo(wait=30)
    async with client(backend, timeout_s=0.05) as http:
        response = await http.post("/v1/chat/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert backend.cancelled == 1


async def test_requests_above_the_queue_are_rejected_and_the_rest_is_answered():
    async with client(Echo(wait=0.3), max_concurrency=2, max_queue=1) as http:
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=BODY) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 503, 503]
        assert (await http.post("/v1/chat/completions", json=BODY)).status_code == 200


async def test_the_body_of_a_rejected_request_is_not_read():
    read = []

    async def body():
        read.append("started")
        yield json.dumps(BODY).encode()

    async with client(Echo(wait=0.3), max_concurrency=1, max_queue=0) as http:
        http.headers["Content-Type"] = "application/json"
        busy = asyncio.ensure_future(http.post("/v1/chat/completions", json=BODY))
        await asyncio.sleep(0.1)
        assert (await http.post("/v1/chat/completions", content=body())).status_code == 503 and read == []
        assert (await busy).status_code == 200
        assert (await http.post("/v1/chat/completions", content=body())).status_code == 200 and read == ["started"]


class Sure(Echo):
    """Gives shorter responses a higher log-probability, and no empty ones."""

    async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
        sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
        for each in sampled["candidates"]:
            each["response"] += "x"
            each |= {"tokens": 2, "logprob": -2.0 * len(each["response"])}
        return sampled


DOWN = {"scorer_error": ApiError("the scorer is down", 503, code="unavailable")}
LATE = {"scorer_wait": 5.0}


@pytest.mark.parametrize("trouble", [DOWN, LATE])
@pytest.mark.parametrize(("server", "requested"), [("self_score", None), ("none", "self_score"), ("first", "self_score")])
async def test_without_the_scorer_the_fallback_selects_and_the_answer_names_it(trouble, server, requested):
    body = {**BODY, "cappy": {"fallback": requested}}
    async with client(Sure(**trouble), fallback=server, scorer_timeout_s=0.05) as http:
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        metrics = (await http.get("/metrics")).text
    assert answer["choices"][0]["message"]["content"] == "x"
    assert answer["cappy"]["fallback"] == "self_score" and answer["cappy"]["candidates"] == []
    assert 'cappy_serving_fallbacks_total{how="self_score"} 1.0' in metrics


async def test_the_fallback_first_selects_the_first_sampled_candidate_without_a_score():
    body = {**BODY, "cappy": {"fallback": "first", "return_candidates": True, "min_score": 0.9}}
    async with client(Sure(**DOWN)) as http:
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert [each["response"] for each in answer["cappy"]["candidates"]] == ["x", "xx", "xxx", "xxxx"] * 2
    assert {each["score"] for each in answer["cappy"]["candidates"]} == {None} and not answer["cappy"]["abstained"]


@pytest.mark.parametrize(("trouble", "code"), [(DOWN, "unavailable"), (LATE, "scorer_late")])
async def test_without_a_fallback_a_request_without_the_scorer_is_a_503(trouble, code):
    async with client(Sure(**trouble), scorer_timeout_s=0.05) as http:
        response = await http.post("/v1/chat/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(("least", "refused"), [(3.0, False), (3.5, True)])
async def test_below_min_score_the_answer_is_a_refusal(least, refused):
    body = {**BODY, "n": 2, "cappy": {"min_score": least}}
    async with client(Echo()) as http:
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        data, _ = events((await http.post("/v1/chat/completions", json={**body, "stream": True})).text)
    if not refused:
        assert [each["message"]["content"] for each in answer["choices"]] == ["xxx", "xx"]
        assert answer["cappy"]["abstained"] is False
        return
    (choice,) = answer["choices"]
    assert choice["message"]["content"] is None and answer["usage"]["completion_tokens"] == 0
    assert choice["message"]["refusal"] == "no candidate scored 3.5 (cappy.min_score); the best of 8 scored 3.000"
    assert answer["cappy"]["abstained"]
    assert [json.loads(each)["choices"][0]["delta"].get("refusal") for each in data[:-1]] == [None, choice["message"]["refusal"], None]


# Echo's pool of five, in rounds of two: "", "x" and "xx", "" and "x".
ROUNDS = {"candidates": 5, "adaptive": {"round_size": 2, "prior_mean": 1.0}}


@pytest.mark.parametrize(
    ("cappy", "drawn", "stopped"),
    [
        ({}, 5, None),
        ({"target_score": 1}, 3, "target_score"),
        ({"target_score": 9}, 5, "candidates"),
        ({"min_gain": 5.0}, 3, "min_gain"),
        ({"min_gain": 1e-9}, 5, "candidates"),
        ({"min_gain": 5.0, "candidates": 1}, 1, "candidates"),
    ],
)
async def test_an_adaptive_request_stops_early_and_reports_the_reason(cappy, drawn, stopped):
    class Counting(Echo):
        count = 0

        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            """Number the candidates over all calls."""
            sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
            for number, each in enumerate(sampled["candidates"], self.count):
                each |= {"response": "x" * (number % 4), "tokens": number, "logprob": -9.0}
            self.count += len(sampled["candidates"])
            return sampled

    backend = Counting()
    async with client(backend, **ROUNDS) as http:
        answer = (await http.post("/v1/chat/completions", json={**BODY, "cappy": cappy})).json()
        metrics = (await http.get("/metrics")).text
    assert backend.count == drawn and answer["choices"][0]["message"]["content"] == "x" * min(drawn - 1, 3)
    assert answer["usage"]["prompt_tokens"] == 4
    if stopped:
        fields = answer["cappy"]
        assert (fields["drawn"], fields["stopped"], fields["sampled_tokens"], fields["candidates"]) == (
            drawn,
            stopped,
            sum(range(drawn)),
            [],
        )
        assert f'cappy_serving_stopped_total{{why="{stopped}"}} 1.0' in metrics
    else:
        assert "cappy" not in answer and "cappy_serving_stopped_total{" not in metrics
    assert f"cappy_serving_candidates_total {drawn}.0" in metrics and 'cappy_serving_tokens_total{kind="prompt"} 4.0' in metrics
    assert 'cappy_serving_seconds_count{stage="sampling"} 1.0' in metrics


@pytest.mark.parametrize(("cappy", "drawn"), [({}, 3), ({"min_gain": 0}, 5), ({"target_score": 9.0}, 5), ({"min_gain": 9}, 3)])
async def test_the_servers_adaptive_settings_apply_unless_the_request_sets_its_own(cappy, drawn):
    settings = {**ROUNDS, "adaptive": {**ROUNDS["adaptive"], "target_score": 0}}
    async with client(Echo(), **settings) as http:
        body = {**BODY, "cappy": {**cappy, "return_candidates": True}}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert answer["cappy"]["drawn"] == len(answer["cappy"]["candidates"]) == drawn


async def test_a_pool_sampled_in_rounds_can_abstain_or_fall_back():
    async with client(Echo(), **ROUNDS) as http:
        body = {**BODY, "cappy": {"target_score": 1.0, "min_score": 2.0}}
        extras = (await http.post("/v1/chat/completions", json=body)).json()["cappy"]
    assert (extras["abstained"], extras["stopped"], extras["drawn"]) == (True, "target_score", 3)
    async with client(Sure(**DOWN), fallback="self_score", **ROUNDS) as http:
        answer = (await http.post("/v1/chat/completions", json={**BODY, "n": 3, "cappy": {"target_score": 1.0}})).json()
    assert [each["message"]["content"] for each in answer["choices"]] == ["x", "xx", "xxx"]
    assert (answer["cappy"]["fallback"], answer["cappy"]["stopped"], answer["cappy"]["drawn"]) == ("self_score", "scorer", 3)


def ai(backend, **serving):
    """Return OpenAI's client over the application, without a network."""
    return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=client(backend, **serving))


class Seeded(Echo):
    """Samples by the seed of each decoding, so that the split into calls changes nothing."""

    async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
        sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
        numbers = [seed + number for decoding, seed in zip(decodings, seeds, strict=True) for number in range(decoding.n)]
        for number, each in zip(numbers, sampled["candidates"], strict=True):
            each |= {"response": "x" * (1 + number % 9), "tokens": number % 5, "logprob": -9.0}
        return sampled


@pytest.mark.parametrize("cappy", [{}, {"target_score": 99}])
async def test_openais_client_reads_a_stream_with_progress(cappy):
    fields = {"model": "cappy", "messages": BODY["messages"], "seed": 1}
    extra = {"candidates": 5, "return_candidates": True, **cappy}
    async with ai(Seeded(wait=0.05), keep_alive_s=0.01) as openai_client:
        plain = await openai_client.chat.completions.create(**fields, extra_body={"cappy": extra})
        stream = await openai_client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}, extra_body={"cappy": {**extra, "progress": True}}
        )
        chunks = [chunk async for chunk in stream]
    *before, last = [chunk for chunk in chunks if not chunk.choices]
    steps = [chunk.model_extra["cappy"]["progress"] for chunk in before]
    assert chunks[: len(before)] == before and len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert [len(step) for step in steps] == sorted(len(step) for step in steps) and len(steps[-1]) == 5
    assert steps[0][0]["score"] is None and all(each["score"] == len(each["response"]) for each in steps[-1])
    assert not any(each["chosen"] for step in steps for each in step)
    assert steps[0][0].keys() == plain.model_extra["cappy"]["candidates"][0].keys()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == plain.choices[0].message.content
    assert last.usage == plain.usage
    streamed, complete = ({k: v for k, v in each.model_extra["cappy"].items() if k != "latency"} for each in (last, plain))
    assert streamed == complete and streamed["drawn"] == 5


async def test_progress_is_streamed_during_sampling_and_a_late_error_follows_it():
    class Slow(Echo):
        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            self.wait = 0 if decodings[0].temperature == 0 else 30
            return await super().sample(prompt, decodings, seeds, logprobs, on_finished)

    body = {**BODY, "stream": True, "cappy": {"progress": True}}
    async with client(Slow(), timeout_s=0.5) as http:
        data, _ = events((await http.post("/v1/chat/completions", json=body)).text)
    *steps, error = map(json.loads, data)
    assert [[each["decoding"] for each in step["cappy"]["progress"]] for step in steps] == [["greedy"]] * len(steps) and steps
    assert error["error"]["code"] == "timeout"


async def test_the_llm_alone_draws_no_rounds_and_its_text_streams_progress_too():
    body = {**TEXT, "model": "cappy-llm", "n": 2, "stream": True, "cappy": {"progress": True}}
    backend = Echo()
    async with client(backend, adaptive={"target_score": 0}) as http:
        chunks = [json.loads(each) for each in events((await http.post("/v1/completions", json=body)).text)[0][:-1]]
        refused = (await http.post("/v1/completions", json={**body, "cappy": {"min_gain": 0.1}})).json()
    extras = [each["cappy"]["progress"] for each in chunks if not each["choices"]]
    assert {each["object"] for each in chunks} == {"text_completion"} and len({each["id"] for each in chunks}) == 1
    assert [each["score"] for each in extras[-1]] == [None, None] and backend.read == []
    assert refused["error"]["param"] == "cappy.min_gain" and "is the LLM alone" in refused["error"]["message"]


async def test_progress_without_the_scorer_shows_no_scores_and_ends_in_the_fallback():
    body = {**BODY, "stream": True, "cappy": {"progress": True, "fallback": "self_score"}}
    async with client(Sure(**DOWN)) as http:
        data, _ = events((await http.post("/v1/chat/completions", json=body)).text)
    chunks = [json.loads(each) for each in data[:-1]]
    steps = [each["cappy"]["progress"] for each in chunks if not each["choices"]]
    assert len(steps[-1]) == 8 and {each["score"] for each in steps[-1]} == {None}
    assert chunks[-1]["cappy"]["fallback"] == "self_score"


async def test_metrics_count_requests_stages_tokens_and_scores():
    async with client(Echo()) as http:
        await http.post("/v1/chat/completions", json=BODY)
        await http.post("/v1/chat/completions", json={**BODY, "n": 0})
        for path in ("/made/up", "/made/up/too"):
            await http.get(path)
        families = {each.name: each for each in text_string_to_metric_families((await http.get("/metrics")).text)}

    def values(name, **labels):
        samples = (each for family in families.values() for each in family.samples)
        return [each.value for each in samples if each.name == name and labels.items() <= each.labels.items()]

    assert values("cappy_serving_requests_total", route="/v1/chat/completions", status="200") == [1]
    assert values("cappy_serving_requests_total", route="/v1/chat/completions", status="400") == [1]
    assert values("cappy_serving_requests_total", route="other", status="404") == [2]
    for stage in ("queue", "sampling", "scoring", "total"):
        assert values("cappy_serving_seconds_count", stage=stage) == [1]
    assert values("cappy_serving_candidates_total") == [8] and values("cappy_serving_score_count") == [4]
    assert values("cappy_serving_tokens_total", kind="sampled") == [sum(range(8))]
    assert values("cappy_serving_requests_here") == [0]


async def test_ready_is_503_while_the_queue_is_full_or_a_model_is_down():
    async with client(Echo(wait=0.4), max_concurrency=1, max_queue=0) as http:
        assert (await http.get("/ready")).json() == {"status": "ready", "llm": True, "scorer": True, "answers": True, "room": True}
        busy = asyncio.ensure_future(http.post("/v1/chat/completions", json=BODY))
        await asyncio.sleep(0.1)
        full = await http.get("/ready")
        assert (full.status_code, full.json()["room"]) == (503, False)
        assert (await busy).status_code == 200 and (await http.get("/ready")).status_code == 200
    async with client(Echo(up=False)) as http:
        assert (await http.get("/ready")).status_code == 503


async def test_health_is_ok_only_while_both_models_are_ready():
    async with client(Echo()) as http:
        assert (await http.get("/health")).json() == {"status": "ok", "llm": True, "scorer": True}
    async with client(Echo(up=False)) as http:
        response = await http.get("/health")
    assert (response.status_code, response.json()["llm"]) == (503, False)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/rerank", "/v1/classify"])
async def test_a_body_that_arrives_slowly_has_a_place_in_the_queue_and_get_requests_need_none(path):
    arrives = asyncio.Event()

    async def slow():
        yield b"{"
        await arrives.wait()
        yield b"}"

    async with client(Echo(), max_concurrency=1, max_queue=1) as http:
        http.headers["Content-Type"] = "application/json"
        slow_ones = [asyncio.ensure_future(http.post(path, content=slow())) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await http.post("/v1/chat/completions", json=BODY)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/ready")).json()["room"] is False
        arrives.set()
        assert [each.status_code for each in await asyncio.gather(*slow_ones)] == [400, 400]
        assert (await http.post("/v1/chat/completions", json=BODY)).status_code == 200


async def test_several_prompts_give_their_choices_in_order_in_one_answer():
    class Continues(Echo):
        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
            for each in sampled["candidates"]:
                each["text"] = f"{prompt}{each['response']}"
            return sampled

    body = {"prompt": ["a", "b", "c"], "n": 2, "cappy": {"candidates": 4, "return_candidates": True}}
    async with client(Continues()) as http:
        answer = (await http.post("/v1/completions", json=body)).json()
        data, _ = events((await http.post("/v1/completions", json={**body, "stream": True})).text)
    assert [(each["index"], each["text"]) for each in answer["choices"]] == list(enumerate(["axxx", "axx", "bxxx", "bxx", "cxxx", "cxx"]))
    assert answer["usage"] == {"prompt_tokens": 12, "completion_tokens": 15, "total_tokens": 27}
    assert (answer["cappy"]["drawn"], len(answer["cappy"]["candidates"]), answer["model"]) == (12, 12, "cappy")
    texts = [choice for each in map(json.loads, data[:-1]) for choice in each["choices"]]
    assert [each["text"] for each in texts if each["text"]] == [each["text"] for each in answer["choices"]]
    assert {each["index"] for each in texts} == set(range(6))


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/chat/completions", {"messages": BODY["messages"]}, "cappy"),
        ("/v1/completions", {"prompt": "x", "model": None}, "cappy"),
        ("/v1/score", {"data_1": "q", "data_2": "x"}, "cappy-scorer"),
        ("/score", {"queries": "q", "items": ["x"]}, "cappy-scorer"),
        ("/v1/rerank", {"query": "q", "documents": ["x"], "max_tokens_per_doc": 4096}, "cappy-scorer"),
        ("/v2/rerank", {"query": "q", "documents": ["x"]}, "cappy-scorer"),
        ("/v1/classify", {"instruction": "q", "choices": ["x", "xx"]}, "cappy-scorer"),
    ],
)
async def test_without_a_model_the_servers_own_answers(path, body, model):
    async with client(Echo()) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200 and answer.json()["model"] == model


async def test_a_stream_has_no_line_separators_inside_an_event():
    class Odd(Echo):
        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
            for each in sampled["candidates"]:
                each["response"] = "a\u2028b\u2029c\u0085d\x1ce\x0bf"
            return sampled

    async with client(Odd()) as http:
        body = {**BODY, "stream": True, "cappy": {"progress": True, "return_candidates": True}}
        text = (await http.post("/v1/chat/completions", json=body)).text
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    answer = "".join(choice["delta"].get("content", "") for each in chunks for choice in each["choices"])
    assert answer == "a\u2028b\u2029c\u0085d\x1ce\x0bf"


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf"), None])
async def test_a_log_probability_that_is_not_a_number_is_null(logprob):
    class Odd(Echo):
        async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
            sampled = await super().sample(prompt, decodings, seeds, logprobs, on_finished)
            for each in sampled["candidates"]:
                each["logprob"] = logprob
            return sampled

    async with client(Odd()) as http:
        answer = await http.post("/v1/chat/completions", json={**BODY, "cappy": {"return_candidates": True}})
    assert answer.status_code == 200 and {each["logprob"] for each in answer.json()["cappy"]["candidates"]} == {None}


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/v1/models/cappy", "/metrics"])
async def test_head_and_options_are_answered_on_every_get_route(path):
    async with client(Echo()) as http:
        head, options = await http.head(path), await http.options(path)
    assert head.status_code == 200
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")


async def test_ready_needs_a_key_unless_probes_without_key_is_set():
    entry = {"name": "a", "sha256": "0" * 64}
    async with client(Echo(), api_keys=[entry]) as http:
        assert [(await http.request(method, "/ready")).status_code for method in ("GET", "HEAD", "OPTIONS")] == [401] * 3
    async with client(Echo(), api_keys=[entry], probes_without_key=True) as http:
        assert [(await http.request(method, "/ready")).status_code for method in ("GET", "HEAD", "OPTIONS")] == [200, 200, 204]
        assert [(await http.get(path)).status_code for path in ("/metrics", "/v1/models", "/ready/")] == [401] * 3


PREFLIGHT = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


@pytest.mark.parametrize(("origins", "allowed"), [(["https://app.example"], True), (["https://other.example"], False)])
async def test_a_preflight_is_answered_without_a_key_for_an_allowed_origin(origins, allowed):
    async with client(Echo(), cors_origins=origins, api_keys=[{"name": "a", "sha256": "0" * 64}]) as http:
        preflight = await http.options("/v1/chat/completions", headers=PREFLIGHT)
        refused = await http.post("/v1/chat/completions", json=BODY, headers={"Origin": "https://app.example"})
    assert (preflight.status_code == 200) is allowed
    assert preflight.headers.get("access-control-allow-origin") == ("https://app.example" if allowed else None)
    assert "x-request-id" in preflight.headers
    # Pages can read an error too.
    assert refused.status_code == 401 and (refused.headers.get("access-control-allow-origin") is not None) is allowed


async def test_without_cors_origins_a_preflight_is_refused():
    async with client(Echo()) as http:
        preflight = await http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_every_origin_needs_api_keys():
    with pytest.raises(ValueError, match=r"cors_origins=\['\*'\] without api_keys"):
        ServingConfig(cors_origins=["*"])
    assert ServingConfig(cors_origins=["*"], api_keys=[{"name": "a", "sha256": "0" * 64}]).cors_origins == ("*",)
    for wrong in ("app.example", "https://app.example/", "https://*.example", "ftp://x"):
        with pytest.raises(ValueError, match="cors_origins"):
            ServingConfig(cors_origins=[wrong])
