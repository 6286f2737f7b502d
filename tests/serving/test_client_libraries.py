"""LangChain, LiteLLM, LlamaIndex and lm-eval against a real server: their answers equal those of a plain request.

The libraries need a separate environment: `CAPPY_CLIENTS_PYTHON` is its Python; see CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks import servers
from cluster.config import load

PYTHON = os.environ.get("CAPPY_CLIENTS_PYTHON")
QUESTION = "What is the capital of France?"
CALLS = Path(__file__).parent / "clients" / "calls.py"
SETTINGS = {"model": "cappy", "temperature": 0, "max_tokens": 12}

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(PYTHON is None, reason="CAPPY_CLIENTS_PYTHON is not set: the client libraries have a separate environment"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    servers.write_scorer(folder / "scorer", 0)
    # As a chat, and without the demo's stop string, which ends a chat's answer at its first line break.
    settings = ["sampler.prompt={form: chat}", "sampler.decodings=[{name: greedy, temperature: 0}, {name: warm, n: 7}]"]
    with servers.ours(load("demo", [f"workspace={folder}", *settings]), folder) as server:
        yield server.url


def run(*arguments: str, **environment: str) -> str:
    """Run a program in the environment of the clients; return its output."""
    assert PYTHON is not None
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([PYTHON, *arguments], capture_output=True, text=True, timeout=600, env={**kept, **offline, **environment})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def plain(url: str, path: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}{path}", json=SETTINGS | fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("library", ["langchain", "litellm", "llamaindex"])
def test_a_client_library_gets_the_answers_of_a_plain_request(library, url):
    messages = [{"role": "user", "content": QUESTION}]
    chat = plain(url, "/v1/chat/completions", messages=messages)
    texts = [choice["text"] for choice in plain(url, "/v1/completions", prompt=[QUESTION, "One, two,"])["choices"]]
    answer = json.loads(run(str(CALLS), library, url, QUESTION).splitlines()[-1])
    print(f"\n{library}: {answer}")
    assert answer["chat"] == answer["stream"] == chat["choices"][0]["message"]["content"]
    assert answer["texts"] == texts[: len(answer["texts"])]
    assert answer.get("usage") in (None, chat["usage"]["completion_tokens"])
    if "turns" in answer:
        assert answer["turns"]
    if library == "langchain":
        assert "tools" in answer["tools"] and "is not supported" in answer["tools"]
    if library == "litellm":
        ranked = httpx.post(f"{url}/v2/rerank", json={"query": QUESTION, "documents": ["Paris", "a fox", "London"], "top_n": 2}).json()
        assert answer["ranked"] == [each["index"] for each in ranked["results"]] and answer["billed"] == 1


@pytest.mark.parametrize(
    ("model", "path", "flags"),
    [
        ("local-chat-completions", "/v1/chat/completions", ["--apply_chat_template"]),
        ("local-completions", "/v1/completions", []),
    ],
)
def test_lm_eval_measures_the_server(model, path, flags, url, tmp_path):
    question = f"{QUESTION} Answer:"
    if model == "local-chat-completions":
        answer = plain(url, path, messages=[{"role": "user", "content": question}], stop=["\n"])["choices"][0]["message"]["content"]
    else:
        answer = plain(url, path, prompt=question, stop=["\n"])["choices"][0]["text"]
    rows = [{"question": question, "answer": answer}, {"question": question, "answer": "something else"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
    arguments = f"model=cappy,base_url={url}{path},num_concurrent=1,max_retries=1,tokenized_requests=False,tokenizer_backend=None"
    output = tmp_path / "out"
    run(
        *("-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", "tiny", "--include_path", str(tmp_path)),
        *("--output_path", str(output), *flags),
        HF_HOME=str(tmp_path / "hf"),
    )
    (results,) = output.rglob("results_*.json")
    measured = json.loads(results.read_text())["results"]["tiny"]
    print(f"\n{model}: {measured}")
    assert measured["exact_match,none"] == 0.5
