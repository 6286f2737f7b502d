import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from cluster.config import EndpointConfig, SamplerConfig
from cluster.errors import CappyError, UsageError
from generation.budget import Budget
from generation.engines import actor_resources, load_engine
from generation.engines.contract import PromptTooLong, RowError
from generation.engines.endpoint import EndpointEngine
from generation.sampler import Sampler
from tests.generation.engines.endpoint_calls import ONE, TURNS, WARM, endpoint, sample, samples
from tests.generation.engines.openai_server import error, good
from tests.generation.test_sampler import table


def test_a_chat_request_has_all_options_of_the_decoding(server, monkeypatch):
    monkeypatch.setenv("FOX_KEY", "very-secret")
    pool = sample(endpoint(server, api_key_env="FOX_KEY"), WARM)
    (body,) = server.bodies
    assert body == {
        **{"model": "fox-1", "messages": TURNS, "n": 3, "seed": 5, "logprobs": True},
        **{"temperature": 0.7, "top_p": 0.9, "max_tokens": 8, "stop": ["\n"]},
    }
    assert (server.paths, server.headers[0]["authorization"], server.headers[0]["x-request-id"]) == (
        ["/v1/chat/completions"],
        "Bearer very-secret",
        "row-1",
    )
    assert pool == [
        {"response": text, "text": text, "decoding": "warm", "tokens": 3, "finish_reason": "stop", "logprob": -1.5}
        for text in ("answer 5 0", "answer 5 1", "answer 5 2")
    ]


@pytest.mark.parametrize("form", ["chat", "raw"])
def test_logprobs_are_requested_only_if_the_caller_reads_them(server, form):
    ((candidate,),) = samples(endpoint(server), ONE, form=form, logprobs=False)
    assert "logprobs" not in server.bodies[0] and candidate["logprob"] is None


def test_the_raw_form_requests_a_completion_of_the_text(server):
    (candidate,) = sample(endpoint(server), form="raw")
    assert (server.paths, server.bodies[0]["prompt"]) == (["/v1/completions"], "Be brief.\n\nWhich fox?\n")
    assert (candidate["tokens"], candidate["logprob"]) == (3, -1.5)


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_pauses_all_requests_of_the_engine(server, kind):
    """The third of eight requests is answered 429 with Retry-After: no request is sent in that time, later all are answered."""

    def reply(body, number):
        if number != 2:
            return good(body)
        later = datetime.now(UTC) + timedelta(seconds=2)
        return error(429, headers={"Retry-After": "2" if kind == "seconds" else format_datetime(later, usegmt=True)})

    server.reply, server.delay_s = reply, 0.05
    llm = endpoint(server, concurrency=2)

    async def collect():
        return await asyncio.gather(*(llm.sample(TURNS, ONE, seed, f"row-{seed}") for seed in range(8)))

    start = time.monotonic()
    pools = asyncio.run(collect())
    assert [pool[0]["response"] for pool in pools] == [f"answer {seed} 0" for seed in range(8)]
    answered = server.times[2] + 0.05
    before, after = [at for at in server.times if at < answered], [at for at in server.times if at >= answered]
    assert len(server.times) == 9
    # A date has whole seconds, so it may be up to one second too early.
    assert min(after) - answered >= (1.95 if kind == "seconds" else 1.0)
    print(
        f"\n429 with Retry-After ({kind}) at {answered - start:.2f} s; requests before at {[round(at - start, 2) for at in before]}, "
        f"after at {[round(at - start, 2) for at in after]} s"
    )


@pytest.mark.parametrize(
    ("failures", "charged_without_answer"),
    [
        ([error(500)], 0),
        ([error(503), error(429)], 0),
        ([error(503, headers={"Retry-After": "1"})], 0),
        ([(0, {}, {"half": "an answer"})], 1),
        ([(200, {}, b"<html>")], 1),
        ([(200, {}, {"choices": []})], 1),
    ],
)
def test_a_temporary_failure_is_retried_and_an_unanswered_request_counts_as_charged(server, failures, charged_without_answer):
    server.reply = lambda body, number: failures[number] if number < len(failures) else good(body)
    llm = endpoint(server, price_per_million_prompt=1.0, price_per_million_sampled=2.0)
    (candidate,) = sample(llm)
    assert candidate["response"] == "answer 5 0"
    assert len(server.bodies) == len(failures) + 1
    answered = (10 * 1 + 3 * 2) / 1e6
    lost = llm.max_cost(TURNS, ONE) / 2
    assert llm.pop_cost("row-1") == pytest.approx(answered + charged_without_answer * lost)
    assert llm.pop_cost("row-1") == 0


def test_a_timed_out_request_is_retried_only_once_because_it_may_be_charged(server):
    server.delay_s = 1.0
    llm = endpoint(server, timeout_s=0.2, price_per_million_prompt=1.0, price_per_million_sampled=2.0)
    with pytest.raises(RowError, match="may have charged for them; the row is not retried"):
        sample(llm)
    assert len(server.bodies) == 2
    assert llm.pop_cost("row-1") == pytest.approx(llm.max_cost(TURNS, ONE))


def test_a_server_that_always_fails_fails_the_row_and_not_the_run(server):
    server.reply = lambda body, number: error(500, "boom")
    with pytest.raises(RowError, match=r"endpoint gave no answer in 2 tries, last: it answered 500: boom"):
        sample(endpoint(server, tries=2))
    assert len(server.bodies) == 2
    with pytest.raises(RowError, match=r"no answer in 1 tries, last: ConnectError"):
        asyncio.run(
            EndpointEngine("m", EndpointConfig(kind="endpoint", base_url="http://127.0.0.1:9/v1", tries=1)).sample(TURNS, ONE, 1, "r")
        )


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("body", [False, True])
def test_a_rejected_key_ends_the_run_with_the_name_of_its_variable(server, status, body, monkeypatch):
    monkeypatch.setenv("FOX_KEY", "very-secret")
    answer = error(status, "Incorrect API key provided: very-secret", code=str(status))
    server.reply = lambda _, number: (200, *answer[1:]) if body else answer
    with pytest.raises(CappyError, match=rf"base_url={server.url} answered {status}: it rejected the key in api_key_env=FOX_KEY") as caught:
        sample(endpoint(server, api_key_env="FOX_KEY"))
    assert not isinstance(caught.value, RowError) and "very-secret" not in str(caught.value) and len(server.bodies) == 1


def test_an_error_never_contains_the_key(server, monkeypatch):
    monkeypatch.setenv("FOX_KEY", "very-secret")
    server.reply = lambda body, number: error(400, "strange request with very-secret")
    with pytest.raises(RowError, match=r"endpoint refused: 400 strange request with \*\*\*"):
        sample(endpoint(server, api_key_env="FOX_KEY"))


def test_a_key_that_is_not_set_is_an_error_before_any_request(server, monkeypatch):
    monkeypatch.delenv("FOX_KEY", raising=False)
    with pytest.raises(UsageError, match=r"sampler\.engine\.api_key_env=FOX_KEY: the variable is not set"):
        endpoint(server, api_key_env="FOX_KEY")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (error(404, "no model fox-1"), r"answered 404 \(no model fox-1\); check base_url and sampler.model=fox-1"),
        (error(429, "pay first", code="insufficient_quota"), r"the account has no credit left \(pay first\); add credit"),
        (error(308, headers={"Location": "http://elsewhere"}), r"a redirect to http://elsewhere; set base_url"),
    ],
)
def test_a_failure_of_all_rows_ends_the_run(server, answer, message):
    server.reply = lambda body, number: answer
    with pytest.raises(CappyError, match=message) as caught:
        sample(endpoint(server))
    assert not isinstance(caught.value, RowError) and len(server.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (error(400, "it has 9 tokens", code="context_length_exceeded"), PromptTooLong, "too long for fox-1: it has 9 tokens"),
        (error(400, "This model's maximum context length is 8 tokens, max_tokens=8"), PromptTooLong, "maximum context length"),
        (error(413, "large"), PromptTooLong, "large"),
        (error(400, "policy", code="content_filter"), RowError, "endpoint refused: 400 policy"),
        (error(400, "top_k is not supported"), RowError, "endpoint refused: 400 top_k is not supported"),
        ((200, {}, {"choices": [{"finish_reason": "content_filter", "message": {"content": ""}}]}), RowError, "content filter"),
        ((200, {}, {"choices": [{"message": {"content": None, "refusal": "I will not"}}]}), RowError, "endpoint refused"),
    ],
)
def test_a_row_that_the_server_will_never_answer_fails_without_a_retry(server, answer, kind, message):
    server.reply = lambda body, number: answer
    with pytest.raises(kind, match=message):
        sample(endpoint(server))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "reply",
    [
        lambda body, number: error(400, "n=3 is not supported", param="n") if "n" in body else good(body),
        lambda body, number: error(422, "unexpected: 'n' must be 1") if "n" in body else good(body),
    ],
)
def test_one_request_per_candidate_is_sent_if_the_server_rejects_n(server, reply):
    server.reply = reply
    llm = endpoint(server)
    first, second = samples(llm, WARM, WARM)
    assert len({candidate["response"] for candidate in first}) == 3 and first == second
    assert [body.get("n") for body in server.bodies] == [3] + 6 * [None]
    assert {each["x-request-id"] for each in server.headers} == {"row-1", "row-1-0", "row-1-1", "row-1-2"}


def test_missing_candidates_are_requested_one_by_one(server):
    server.reply = lambda body, number: good(body, [f"seed {body['seed']}"])
    pool = sample(endpoint(server), WARM)
    assert [body.get("n") for body in server.bodies] == [3, None, None]
    assert len({candidate["response"] for candidate in pool}) == 3


def test_without_a_seed_no_request_has_one(server):
    server.reply = lambda body, number: good(body, [f"draw {number}"])
    (pool,) = samples(endpoint(server), WARM, seed=None)
    assert [body.get("n") for body in server.bodies] == [3, None, None] and len(pool) == 3
    assert not any("seed" in body for body in server.bodies)


def test_options_that_a_server_rejected_are_left_out_of_later_requests(server):
    def reply(body, number):
        if "logprobs" in body:
            return error(400, "logprobs=true is not supported yet; leave logprobs out", param="logprobs")
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", param="max_tokens")
        return good(body, ["a red fox", "a"][: body.get("n", 1)])

    server.reply = reply
    llm = endpoint(server)
    two, _ = samples(llm, WARM.model_copy(update={"n": 2}), ONE)
    assert [(each["logprob"], each["tokens"]) for each in two] == [(None, 5), (None, 1)]
    assert len(server.bodies) == 4 and server.bodies[-1]["max_completion_tokens"] == 8


def sample_nine(llm):
    async def collect():
        await asyncio.gather(*(llm.sample(TURNS, ONE, seed, f"{seed}") for seed in range(9)))

    asyncio.run(collect())


def test_concurrency_limits_the_requests_in_flight(server):
    server.delay_s, server.together = 0.2, 3
    sample_nine(endpoint(server, concurrency=3))
    assert server.max_in_flight == 3


def test_the_rate_limit_spaces_requests(server):
    start = time.monotonic()
    sample_nine(endpoint(server, requests_per_minute=300))
    # 300 per minute is one each 0.2 s; the first one is sent immediately.
    sent_after_s = [at - start for at in sorted(server.times)]
    assert all(after_s >= 0.2 * number - 0.01 for number, after_s in enumerate(sent_after_s))


def sampler(server, **settings):
    engine = {"kind": "endpoint", "base_url": server.url, "price_per_million_prompt": 100.0, "price_per_million_sampled": 500.0}
    return SamplerConfig(model="fox-1", engine={**engine, **settings}, decodings=(ONE, WARM))


def test_rows_have_their_cost_and_the_engine_requests_no_gpu(server):
    config = sampler(server)
    stage = Sampler(config, 7)

    async def collect():
        return [part async for part in stage(table("one", "two"))]

    (result,) = asyncio.run(collect())
    one_row = ((10 * 100 + 3 * 500) + (10 * 100 + 9 * 500)) / 1e6
    assert result["cost"].to_pylist() == pytest.approx([one_row, one_row])
    assert stage.max_cost(table("one", "two").to_pylist()) > sum(result["cost"].to_pylist())
    assert isinstance(load_engine(config), EndpointEngine) and actor_resources(config, cluster_gpus=8) == {"num_cpus": 1, "num_gpus": 0}


def test_the_cost_limit_is_never_exceeded_and_running_units_finish(server):
    """Four concurrent workers send units of two rows to a server that fails, closes connections and counts its charges."""
    faults = {1: error(500), 3: (0, *good({"messages": []})[1:]), 40: error(500), 43: (0, *good({"messages": []})[1:])}
    faults[60] = error(429, headers={"Retry-After": "1"})
    server.reply = lambda body, number: faults.get(number) or good(body)
    stage, budget = Sampler(sampler(server, tries=3), 7), Budget(1.0)
    units = {f"unit-{number}": table(f"say {number}", f"sing {number}") for number in range(60)}
    highest, finished, refused = 0.0, [], []

    def charged():
        return (server.billed[0] * 100 + server.billed[1] * 500) / 1e6

    async def work(queue):
        nonlocal highest
        for name, batch in queue:
            max_cost = stage.max_cost(batch.to_pylist())
            while not (reserved := budget.reserve(name, max_cost)) and budget.reserved:
                await asyncio.sleep(0.01)  # a unit that finishes may release a part of its reservation
            if not reserved:
                refused.append(name)
                continue
            highest = max(highest, budget.spent + budget.reserved)
            (result,) = [part async for part in stage(batch)]
            budget.settle(name, sum(result["cost"].to_pylist()))
            assert charged() <= 1.0
            finished.append(name)

    async def run():
        queue = iter(units.items())
        await asyncio.gather(*(work(queue) for _ in range(4)))

    asyncio.run(run())
    assert finished and refused and len(finished) + len(refused) == len(units)
    assert charged() <= budget.spent + 1e-9 <= 1.0 and highest <= 1.0 and budget.reserved == 0
    print(
        f"\ncost limit $1: {len(finished)} units finished, {len(refused)} not started; at most ${highest:.4f} spent and reserved, "
        f"spent ${budget.spent:.4f}, the server charged ${charged():.4f} for {len(server.bodies)} requests"
    )
