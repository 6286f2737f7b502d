"""Train a scorer for an LLM that you reach only through an OpenAI-compatible API, with a limit on the cost.

    python examples/closed_llm.py

Set OPENAI_BASE_URL, OPENAI_MODEL and OPENAI_API_KEY to use a real service. Without OPENAI_BASE_URL the example starts vLLM's
OpenAI server with a small model on this machine, and uses it through HTTP like any other service.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import openai

import cappy
from cluster import models, ports

LOG = Path("runs/vllm.log")


@contextmanager
def local_server() -> Iterator[str]:
    """Start vLLM's OpenAI server with the embedded model; yield its base URL."""
    port = ports.free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}"]
    command += [f"--model={models.resolve('smollm2-135m-instruct', 'sampler.model')}", "--served-model-name=small"]
    # The last two options avoid a crash of vLLM 0.32 on CPU with seeded requests.
    command += ["--enforce-eager", "--max-model-len=512", "--max-num-batched-tokens=2048", "--no-enable-chunked-prefill"]
    environment = {"VLLM_API_KEY": "local", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        server = subprocess.Popen(command, env={**environment, **os.environ}, stdout=log, stderr=log)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None:
                sys.exit(f"the vLLM server stopped during its start; see {LOG}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    """Return whether `url` answers with status 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


address = os.environ.get("OPENAI_BASE_URL")
if not address:
    os.environ |= {"OPENAI_API_KEY": "local", "OPENAI_MODEL": "small"}

with nullcontext(address) if address else local_server() as base_url:
    # The key stays in the environment: the config and the published manifest hold only the name of the variable.
    engine = {"kind": "endpoint", "base_url": base_url, "api_key_env": "OPENAI_API_KEY", "concurrency": 8}
    # Prices in dollars per million tokens. The run stops before its cost could pass `max_cost`, even if every request is retried
    # and every answer has the maximum length.
    engine |= {"price_per_million_prompt": 0.5, "price_per_million_sampled": 1.5, "max_cost": 1}
    sampler = {"sampler.model": os.environ["OPENAI_MODEL"], "sampler.prompt.form": "chat", "sampler.engine": engine}
    config = cappy.load_config("examples/tiny.yaml", {"workspace": "runs/examples-closed", **sampler})
    made = cappy.generate(config)
    dollars = cappy.RegressionSet(made["uri"]).manifest["cost"]["dollars"]
    print(f"set      {made['uri']}: {made['sources']['sampled']} sampled responses for ${dollars:.4f}")
    cappy.train(config)

    # Best-of-4: sample from the service, choose with the scorer.
    question = "What is the capital of Belgium?"
    client = openai.OpenAI(base_url=base_url, api_key=os.environ["OPENAI_API_KEY"])
    reply = client.chat.completions.create(
        model=os.environ["OPENAI_MODEL"], messages=[{"role": "user", "content": question}], n=4, max_tokens=16
    )
    candidates = [choice.message.content or "" for choice in reply.choices]
    best = cappy.Scorer.load(config.scorer_uri).best(question, candidates)
    print(f"best     {best.response!r} with score {best.score:.3f}, of {candidates}")
