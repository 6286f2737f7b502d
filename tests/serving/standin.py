"""A backend without models, and the gateway over it: in process, or on a real socket without Ray Serve."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI

from cluster.config import Config, ServingConfig
from generation.engines.contract import Candidate
from serving.gateway import build_api


@contextmanager
def running(api: FastAPI) -> Iterator[str]:
    """Serve `api` and yield its URL."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


BODY = {"model": "cappy", "messages": [{"role": "user", "content": "hi"}]}


class Echo:
    """A backend with numbered texts as candidates and their length as score.

    `error` is raised by `sample` and `wait` delays it, in seconds; `scorer_error` and `scorer_wait` do the same for `score`.
    """

    def __init__(self, error=None, wait=0.0, up=True, weight=None, scorer_error=None, scorer_wait=0.0, selection=None):
        self.error, self.wait, self.up, self.weight = error, wait, up, weight
        self.selection = selection
        self.scorer_error, self.scorer_wait = scorer_error, scorer_wait
        self.prompts, self.read, self.scorers, self.cancelled = [], [], [], 0

    async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
        self.prompts.append(prompt)
        self.logprobs = logprobs
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        names = [decoding.name for decoding in decodings for _ in range(decoding.n)]
        drawn = [
            Candidate(response="x" * (i % 4), decoding=name, tokens=i, finish_reason="stop", logprob=-1.0) for i, name in enumerate(names)
        ]
        return {"candidates": drawn, "prompt_tokens": 4}

    async def score(self, scorer, instructions, responses):
        self.read.append((list(instructions), list(responses)))
        self.scorers.append(scorer)
        await asyncio.sleep(self.scorer_wait)
        if self.scorer_error:
            raise self.scorer_error
        fitted = {} if self.weight is None else {"logprob_weight": self.weight}
        fitted |= {} if self.selection is None else {"selection": self.selection}
        return {"scores": [float(len(each)) for each in responses], "tokens": [len(each) for each in responses], "version": "v1", **fitted}

    async def ready(self):
        return {"llm": self.up, "scorer": True}


def client(backend, further=(), **serving):
    """Return an HTTP client of the gateway over `backend`, in process."""
    transport = httpx.ASGITransport(build_api(Config(serving=ServingConfig(**serving)), backend, further), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")
