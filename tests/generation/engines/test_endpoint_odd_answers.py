"""Answers of an endpoint that are odd, as real servers send them; `test_endpoint_answers.py` has the single layouts."""

import asyncio

import pytest

from cluster.config import DecodingConfig, SamplerConfig
from cluster.errors import CappyError
from generation.engines.contract import ContentFiltered, EngineUnavailable, PromptTooLong, RowError
from generation.sampler import Sampler
from tests.generation.engines.endpoint_calls import ONE, TURNS, WARM, endpoint, sample, samples
from tests.generation.engines.openai_server import error, good
from tests.generation.test_sampler import table


def changed(answer, *changes):
    """Return an answer whose choices have changes: fields of the choice, and fields of its message in `message`."""
    for choice, change in zip(answer[2]["choices"], changes, strict=True):
        choice["message"] |= change.get("message", {})
        choice |= {name: value for name, value in change.items() if name != "message"}
    return answer


def outcomes(llm, *decodings):
    """Return the candidates or the exception of each decoding, from consecutive calls."""

    async def collect():
        return [(await asyncio.gather(llm.sample(TURNS, decoding, 5, "row-1"), return_exceptions=True))[0] for decoding in decodings]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    ("change", "response", "finish_reason", "logprob"),
    [
        ({"message": {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fox"}]}}, "fox", "stop", -1.5),
        ({"message": {"content": {"type": "text", "text": "fox"}}}, "fox", "stop", -1.5),
        ({"message": {"content": "<think>hm</think> fox"}}, "fox", "stop", -1.5),
        ({"finish_reason": "MAX_TOKENS"}, "answer 5 0", "length", -1.5),
        ({"finish_reason": "model_length"}, "answer 5 0", "length", -1.5),
        ({"index": None}, "answer 5 0", "stop", -1.5),
        ({"logprobs": {"content": [{"logprob": None}]}}, "answer 5 0", "stop", None),
        ({"logprobs": {"content": [{"logprob": float("nan")}]}}, "answer 5 0", "stop", None),
        ({"logprobs": {"content": [{"logprob": float("-inf")}, {"logprob": -1}]}}, "answer 5 0", "stop", None),
        ({"message": {"content": None, "reasoning_content": "hm"}}, "", "stop", -1.5),
    ],
)
def test_an_odd_answer_becomes_the_right_candidate_without_a_retry(server, change, response, finish_reason, logprob):
    server.reply = lambda body, number: changed(good(body), change)
    (candidate,) = sample(endpoint(server))
    assert (candidate["response"], candidate["finish_reason"], candidate["logprob"]) == (response, finish_reason, logprob)
    assert len(server.bodies) == 1


def test_reasoning_is_kept_on_request(server):
    server.reply = lambda body, number: good(body, ["<think>hm</think> fox"])
    (candidate,) = sample(endpoint(server, keep_reasoning=True))
    assert candidate["response"] == candidate["text"] == "<think>hm</think> fox"


@pytest.mark.parametrize(
    "failure",
    [
        lambda body: changed(good(body), {"finish_reason": "error"}),
        lambda body: changed(good(body), {"finish_reason": "abort"}),
        lambda body: changed(good(body), {"finish_reason": "insufficient_system_resource"}),
        lambda body: changed(good(body), {"error": {"code": 502, "message": "provider failed"}}),
        lambda body: (200, {}, {"error": {"message": "overloaded", "code": 503}}),
        lambda body: (200, {}, {"error": {"message": "strange"}}),
        lambda body: (200, {}, b"[" * 100_000),
    ],
)
def test_an_answer_that_the_server_broke_off_is_retried(server, failure):
    server.reply = lambda body, number: good(body) if number else failure(body)
    (candidate,) = sample(endpoint(server))
    assert (candidate["response"], len(server.bodies)) == ("answer 5 0", 2)


def test_the_message_of_an_error_body_is_in_the_reason_of_the_row(server):
    server.reply = lambda body, number: (200, {}, {"error": {"message": "no provider is up", "code": 502}})
    with pytest.raises(EngineUnavailable, match="no answer in 2 tries, last: it answered 502: no provider is up"):
        sample(endpoint(server, tries=2))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error(403, "Your chosen model requires moderation and your input was flagged", code="403"), ContentFiltered),
        (error(403, "blocked: the text violates the content policy"), ContentFiltered),
        ((200, {}, {"error": {"message": "your input was flagged", "code": 403}}), ContentFiltered),
        ((200, {}, {"choices": [{"message": {"content": ""}, "finish_reason": "SAFETY"}]}), ContentFiltered),
        ((200, {}, {"choices": [{"message": {"content": "half \ud83d"}, "finish_reason": "stop"}]}), ContentFiltered),
        ((400, {}, b'{"error": {"message": "bad \\ud83d"}}'), RowError),
        ((400, {"X-Server": "caf\xe9"}, b'{"error": "caf\xe9"}'), RowError),
        (error(429, "Request too large on tokens per min: Limit 10, Requested 20", {"Retry-After": "86400"}), PromptTooLong),
    ],
)
def test_an_answer_for_one_row_fails_the_row_without_a_retry(server, answer, kind):
    server.reply = lambda body, number: answer
    with pytest.raises(kind) as caught:
        sample(endpoint(server))
    str(caught.value).encode()
    assert len(server.bodies) == 1


def test_a_403_without_a_reason_fails_its_row_if_other_rows_are_answered(server):
    """Firewalls answer so. Five in a row end the run, because then the key may be revoked."""
    server.reply = lambda body, number: (403, {}, b"<html>blocked</html>") if number else good(body)
    found = outcomes(endpoint(server), *[ONE] * 6)
    assert isinstance(found[0], list)
    assert [(type(each), str(each)) for each in found[1:5]] == [(RowError, "endpoint refused: 403 <html>blocked</html>")] * 4
    assert type(found[5]) is CappyError and "answered 403: it requires an API key" in str(found[5])


def test_the_choices_that_a_filter_did_not_stop_are_kept(server):
    server.reply = lambda body, number: changed(good(body), {}, {"finish_reason": "content_filter"}, {})
    assert [each["response"] for each in sample(endpoint(server), WARM)] == ["answer 5 0", "answer 5 2"]
    assert len(server.bodies) == 1


def test_the_choices_that_the_server_broke_off_are_requested_again(server):
    server.reply = lambda body, number: changed(good(body), {}, {"finish_reason": "error"}, {}) if "n" in body else good(body)
    llm = endpoint(server)
    first, again = samples(llm, WARM, WARM)
    assert [len(first), len(again)] == [3, 3] and first == again
    assert [body.get("n") for body in server.bodies] == [3, None, 3, None]


def test_a_row_keeps_the_decodings_that_the_filter_did_not_stop(server):
    def reply(body, number):
        if body["temperature"] == 0:
            return changed(good(body), {"finish_reason": "content_filter"})
        return error(400, "no", code="content_filter") if body["messages"][-1]["content"] == "bad" else good(body)

    server.reply = reply
    greedy = DecodingConfig(name="greedy", temperature=0, max_tokens=8)
    config = SamplerConfig(model="fox-1", engine={"kind": "endpoint", "base_url": server.url}, decodings=(greedy, ONE))

    async def collect():
        return [part async for part in Sampler(config, 7)(table("good", "bad"))]

    (result,) = asyncio.run(collect())
    kept, lost = result.to_pylist()
    assert kept["error"] is None and [each["decoding"] for each in kept["sampled"]] == ["one"]
    assert lost["error"].startswith("endpoint refused") and lost["sampled"] == []


def test_a_choice_without_text_is_reported_once_with_the_fix(server, capsys):
    server.reply = lambda body, number: changed(good(body), {"message": {"content": None, "reasoning_content": "hm"}})
    samples(endpoint(server), ONE, ONE)
    printed = capsys.readouterr().err
    assert printed.count("answers without text: it has reasoning_content only") == 1
    assert "raise max_tokens of decoding 'one'" in printed


def test_a_prompt_with_a_lone_surrogate_fails_its_row(server):
    with pytest.raises(RowError, match="the prompt cannot be sent as UTF-8"):
        endpoint(server).encode([{"role": "user", "content": "half \ud83d"}], "chat", 8)


# Options that a server rejects.


def refuse(names, message):
    """Return a reply that rejects requests which have all of some options."""
    return lambda body, number: error(400, message) if names <= body.keys() else good(body)


@pytest.mark.parametrize(
    ("temperature", "top_p", "left_out"),
    [(0.7, 1.0, "top_p"), (0.0, 1.0, "top_p"), (1.0, 0.95, "temperature"), (0.7, 0.9, "top_p"), (1.0, 1.0, "top_p")],
)
def test_of_temperature_and_top_p_the_one_without_effect_is_left_out(server, temperature, top_p, left_out):
    server.reply = refuse({"temperature", "top_p"}, "`temperature` and `top_p` cannot both be specified for this model. Use only one.")
    decoding = DecodingConfig(name="d", temperature=temperature, top_p=top_p)
    llm = endpoint(server)
    samples(llm, decoding, decoding)
    assert [{"temperature", "top_p"} - body.keys() for body in server.bodies] == [set(), {left_out}, {left_out}]


@pytest.mark.parametrize(
    ("option", "said"),
    [("temperature", True), ("top_p", True), ("top_k", True), ("min_tokens", True), ("seed", False), ("logprobs", False)],
)
def test_a_refused_option_is_left_out_of_all_requests_and_reported_if_it_changes_the_candidates(server, option, said, capsys):
    server.reply = refuse({option}, f"Unsupported parameter: '{option}' is not supported with this model.")
    decoding = DecodingConfig(name="d", temperature=0.7, top_p=0.9, top_k=4, min_tokens=1)
    assert all(isinstance(pool, list) for pool in outcomes(endpoint(server), decoding, decoding))
    assert [option in body for body in server.bodies] == [True, False, False]
    assert capsys.readouterr().err.count(f"rejects {option}, so no request has it") == said


@pytest.mark.parametrize("how", ["learned", "omit"])
def test_without_stop_the_engine_cuts_the_candidates(server, how):
    message = "Unsupported parameter: 'stop' is not supported with this model."
    server.reply = lambda body, number: error(400, message) if "stop" in body else good(body, ["red\nfox"] * body.get("n", 1))
    pool = sample(endpoint(server, omit=("stop",) if how == "omit" else ()), WARM)
    assert [(each["response"], each["finish_reason"], each["logprob"]) for each in pool] == [("red", "stop", None)] * 3


def test_a_value_that_the_server_rejects_fails_the_row_and_keeps_the_option(server):
    server.reply = refuse({"temperature"}, "temperature must be at most 2")
    found = outcomes(endpoint(server), *[DecodingConfig(name="d", temperature=3.0)] * 2)
    assert [str(each) for each in found] == ["endpoint refused: 400 temperature must be at most 2"] * 2
    assert all("temperature" in body for body in server.bodies)


@pytest.mark.parametrize("option", ["n", "logprobs", "seed", "max_tokens", "min_tokens", "top_k", "stop", "top_p", "temperature"])
def test_an_omitted_option_is_in_no_request(server, option):
    decoding = DecodingConfig(name="d", n=2, top_k=4, min_tokens=1, stop=("!",))
    assert len(sample(endpoint(server, omit=(option,)), decoding)) == 2
    assert all(option not in body for body in server.bodies)
    assert len(server.bodies) == (2 if option == "n" else 1)
    assert all("max_completion_tokens" in body for body in server.bodies) == (option == "max_tokens")


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_variables_of_the_chat_template_are_sent_with_chats(server, form):
    sample(endpoint(server, template_kwargs={"enable_thinking": False}), form=form)
    assert server.bodies[0].get("chat_template_kwargs") == ({"enable_thinking": False} if form == "chat" else None)


# Retry-After.


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_server_that_always_sends_retry_after_fails_the_row(server, value):
    server.reply = lambda body, number: error(429, "busy", {"Retry-After": value}) if number < 4 else good(body)
    with pytest.raises(EngineUnavailable, match="no answer in 3 tries, last: it answered 429: busy"):
        sample(endpoint(server, tries=3))
    assert len(server.bodies) == 3
    # The pauses grow.
    assert server.times[1] - server.times[0] >= 0.99 and server.times[2] - server.times[1] >= 1.99


def test_a_busy_server_that_answers_other_requests_does_not_use_up_the_tries(server):
    """The server answers one request per second, so the last row gets a `Retry-After` four times."""
    free_at = 0.0

    def reply(body, number):
        nonlocal free_at
        if server.times[-1] < free_at:
            return error(429, "busy", {"Retry-After": "1"})
        free_at = server.times[-1] + 0.9
        return good(body)

    server.reply = reply
    llm = endpoint(server, tries=2)

    async def collect():
        rows = (llm.sample(TURNS, ONE, seed, f"row-{seed}") for seed in range(5))
        return await asyncio.gather(*rows, return_exceptions=True)

    assert all(isinstance(pool, list) for pool in asyncio.run(collect()))
    assert len(server.bodies) >= 5 + 4 + 3 + 2 + 1


@pytest.mark.parametrize("pauses", [1, 2])
def test_a_row_fails_after_its_last_pause_although_others_are_answered(server, pauses):
    refused = []

    def reply(body, number):
        if body["messages"][-1]["content"] == "fine" or len(refused) > pauses:
            return good(body)
        refused.append(number)
        return error(429, "busy", {"Retry-After": "0"})

    server.reply = reply
    llm = endpoint(server, max_pauses=pauses)

    async def collect():
        fine = [{"role": "user", "content": "fine"}]
        return await asyncio.gather(
            llm.sample(TURNS, ONE, 1, "poison"), *(llm.sample(fine, ONE, seed, f"fine-{seed}") for seed in range(3)), return_exceptions=True
        )

    poison, *fine = asyncio.run(collect())
    assert isinstance(poison, EngineUnavailable) and f"no answer in {pauses} tries" in str(poison)
    assert all(isinstance(pool, list) for pool in fine)


def test_a_retry_after_above_the_limit_does_not_apply_and_ends_the_run_if_it_stays(server, capsys):
    server.reply = lambda body, number: error(429, "quota of the day", {"Retry-After": "3"}) if number < 2 else good(body)
    assert sample(endpoint(server, tries=3, max_retry_after_s=1))[0]["response"] == "answer 5 0"
    assert "answered 429, Retry-After 3 s: above max_retry_after_s=1, so retrying sooner" in capsys.readouterr().err
    server.reply = lambda body, number: error(429, "quota of the day", {"Retry-After": "86400"})
    message = r"accepts no request for 86400 s \(it answered 429: quota of the day\), above sampler.engine.max_retry_after_s=300"
    with pytest.raises(CappyError, match=message) as caught:
        sample(endpoint(server, tries=1))
    assert not isinstance(caught.value, RowError)


def test_a_long_pause_is_reported_once_for_all_requests(server, capsys):
    llm = endpoint(server, max_retry_after_s=11)
    replies = [error(429, "busy", {"Retry-After": "11"})] * 3

    async def collect():
        waiting = asyncio.gather(*(llm.sample(TURNS, ONE, seed, f"row-{seed}") for seed in range(3)))
        while len(server.bodies) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        waiting.cancel()

    server.reply = lambda body, number: replies[number]
    asyncio.run(collect())
    assert capsys.readouterr().err.count("answered 429, Retry-After 11 s: no request for 11 s") == 1


def test_a_server_of_clients_reports_the_pause_and_does_not_wait(server):
    server.reply = lambda body, number: error(429, "busy", {"Retry-After": "86400"})
    with pytest.raises(EngineUnavailable, match="accepts no request for 300 s") as caught:
        sample(endpoint(server, max_wait_s=5))
    assert caught.value.retry_after_s == pytest.approx(300, abs=1) and len(server.bodies) == 1
