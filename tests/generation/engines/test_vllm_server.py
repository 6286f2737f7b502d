"""The endpoint engine against vLLM's own server with the real small model. `tests/serving/test_app.py` uses `cappy serve` instead."""

import asyncio
import os
import subprocess
import sys
import time

import httpx
import pytest

from cluster import models, ports
from cluster.config import DecodingConfig, EndpointConfig
from cluster.errors import CappyError
from generation.engines.contract import PromptTooLong
from generation.engines.endpoint import EndpointEngine
from generation.prompts import messages

# Prompts whose greedy tokens are by far the most likely ones up to "Paris", so that rounding on another CPU does not change them.
TURNS = messages("Where is the Eiffel Tower? Answer with the city.")
LINES = messages("\n".join(6 * ["The Eiffel Tower is in Paris."]))
GREEDY = DecodingConfig(name="greedy", temperature=0, max_tokens=12)
WARM = DecodingConfig(name="warm", n=3, max_tokens=12)
TOP_K = DecodingConfig(name="top-k", n=2, top_k=1, min_tokens=12, max_tokens=12)


def ask(llm, form, *requests):
    """Return the candidates, or the error, of each (turns, decoding, seed) from concurrent calls."""

    async def collect():
        return await asyncio.gather(
            *(llm.sample(llm.encode(turns, form, 12), decoding, seed, f"row-{at}") for at, (turns, decoding, seed) in enumerate(requests)),
            return_exceptions=True,
        )

    return asyncio.run(collect())


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """Start vLLM's own OpenAI server, which requires an API key; return its URL."""
    port, log = ports.free_port(), tmp_path_factory.mktemp("vllm") / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(models.resolve("smollm2-135m-instruct", "sampler.model")), "--served-model-name", "smollm2"),
        *("--max-model-len", "512", "--max-num-batched-tokens", "2048", "--no-enable-chunked-prefill", "--enforce-eager"),
    ]
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": "very-secret"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 300
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def count_equal(left, right):
    """Return the number of equal responses at equal positions."""
    return sum(one["response"] == two["response"] for one, two in zip(left, right, strict=True))


@pytest.mark.slow
def test_the_endpoint_engine_samples_from_vllms_own_server_and_reports_its_errors(vllm_server, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "very-secret")
    settings = {"kind": "endpoint", "base_url": vllm_server, "price_per_million_prompt": 1.0, "price_per_million_sampled": 2.0}

    def endpoint(name="smollm2", **more):
        return EndpointEngine(name, EndpointConfig(**{**settings, "api_key_env": "LOCAL_KEY", **more}))

    long = messages("word " * 2000)
    for form in ("chat", "raw"):
        llm, sure = endpoint(), TURNS if form == "chat" else LINES
        greedy, warm, again, other, ranked, refused = ask(
            llm, form, (sure, GREEDY, 1), (TURNS, WARM, 1), (TURNS, WARM, 1), (TURNS, WARM, 2), (sure, TOP_K, 1), (long, GREEDY, 1)
        )
        assert len(greedy) == 1 and "Paris" in greedy[0]["response"]
        # One of three may differ by a tie in bfloat16: other requests in the batch of the server change its rounding.
        assert count_equal(warm, again) >= 2 > count_equal(warm, other)
        assert len({each["response"] for each in warm}) == 3
        # The server applied top_k=1 (the candidates are greedy, except for ties in bfloat16) and min_tokens.
        assert all("Paris" in each["response"] and each["tokens"] == 12 for each in ranked)
        assert all(each["logprob"] < 0 and 1 <= each["tokens"] <= 12 for each in [*greedy, *warm, *ranked])
        assert isinstance(refused, PromptTooLong) and "512" in str(refused)
        assert 0 < llm.pop_cost("row-0") < llm.max_cost(sure, GREEDY)
        print(f"\n{form}: {greedy[0]}")
    monkeypatch.setenv("LOCAL_KEY", "wrong-secret")
    (refused,) = ask(endpoint(), "chat", (TURNS, GREEDY, 1))
    assert isinstance(refused, CappyError) and "api_key_env=LOCAL_KEY" in str(refused) and "secret" not in str(refused)
    monkeypatch.setenv("LOCAL_KEY", "very-secret")
    (unknown,) = ask(endpoint("gpt"), "chat", (TURNS, GREEDY, 1))
    assert isinstance(unknown, CappyError) and "answered 404" in str(unknown) and "sampler.model=gpt" in str(unknown)
