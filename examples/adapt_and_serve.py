"""Adapt a scorer to single tasks, then serve the LLM with each task's own scorer behind an OpenAI-compatible endpoint.

    python examples/adapt_and_serve.py

It starts from the set and the scorer of `examples/own_jsonl.py`; run that first.
"""

import subprocess
import sys
import time

import httpx
import openai

import cappy
from cluster import ports

# Low-rank adapters (LoRA) for each task, with the settings of section `adapt` in the file.
adapted = cappy.adapt("examples/tiny.yaml")
for task in adapted["tasks"]:
    print(f"adapted  {task['task']}: {task['state']}")

# The same as `cappy serve examples/tiny.yaml --set serving.adapted=true` in a terminal.
port = ports.free_port()
command = [sys.executable, "-m", "cappy.cli", "serve", "examples/tiny.yaml"]
server = subprocess.Popen([*command, "--set", "serving.adapted=true", "--set", f"serving.port={port}"])
try:
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        if server.poll() is not None:
            sys.exit("the server stopped while it started; the reason is above")
        time.sleep(1)

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    print(f"models   {[model.id for model in client.models.list()]}")
    # Two worked examples help a small LLM. The scorer reads the last question only.
    conversation = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "Rome"},
        {"role": "user", "content": "What is the capital of Belgium?"},
    ]
    # `cappy` answers with the main scorer, `cappy+capitals` with the scorer of that task.
    for model in ("cappy", "cappy+capitals"):
        answer = client.chat.completions.create(
            model=model,
            messages=conversation,
            extra_body={"cappy": {"candidates": 5}},
        )
        print(f"answer   {model}: {answer.choices[0].message.content!r}")
finally:
    server.terminate()
    server.wait()
