"""A loopback server with the OpenAI API and configurable failures: real HTTP over real sockets, without a model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn

from cluster import ports

Answer = tuple[int, dict[str, str], Any]
"""Status, headers and body (JSON). Status 0 closes the connection in the middle of an answer."""


def error(status: int, message: str = "no", headers: dict[str, str] | None = None, **fields: str) -> Answer:
    """Return an error answer; `fields` are added to its `error` object."""
    return status, headers or {}, {"error": {"message": message, "type": "invalid_request_error", **fields}}


def good(body: dict[str, Any], texts: list[str] | None = None, tokens: int = 3, logprobs: bool = True) -> Answer:
    """Return an answer of `n` choices with `tokens` tokens of log-probability -0.5 each; the prompt has 10 tokens."""
    chosen = texts or [f"answer {body.get('seed')} {draw}" for draw in range(body.get("n", 1))]
    choices: list[dict[str, Any]] = []
    for index, text in enumerate(chosen):
        choice: dict[str, Any] = {"index": index, "finish_reason": "stop", "logprobs": None}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": text}
            if logprobs and body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}] * tokens}
        else:
            choice["text"] = text
            if logprobs and body.get("logprobs"):
                choice["logprobs"] = {"token_logprobs": [-0.5] * tokens}
        choices.append(choice)
    usage = {"prompt_tokens": 10, "completion_tokens": tokens * len(chosen), "total_tokens": 10 + tokens * len(chosen)}
    return 200, {}, {"object": "chat.completion", "choices": choices, "usage": usage}


class OpenAIServer:
    """A server that answers request `number` (from 0) with `reply(body, number)` after `delay_s` and records all requests.

    The first answers wait until `together` requests are in flight, at most 60 s. So concurrency is measured on a slow machine too.
    """

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Answer] = lambda body, number: good(body)
        self.delay_s = 0.0
        self.reset()
        port = ports.free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        self._server = uvicorn.Server(
            uvicorn.Config(self._app, host="127.0.0.1", port=port, log_level="critical", lifespan="off", interface="asgi3")
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def reset(self) -> None:
        """Clear all records."""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.billed = [0, 0]
        """Prompt and sampled tokens of all answers without an error, as a provider would charge them."""
        self.max_in_flight = 0
        # A list, so that requests from before the reset count down another one.
        self._in_flight = [0]
        self.together = 1

    def close(self) -> None:
        """Stop the server."""
        self._server.should_exit = True
        self._thread.join()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        content = b""
        while True:
            part = await receive()
            content += part.get("body", b"")
            if not part.get("more_body"):
                break
        body = json.loads(content)
        number = len(self.bodies)
        self.times.append(time.monotonic())
        self.bodies.append(body)
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        self.paths.append(scope["path"])
        in_flight = self._in_flight
        in_flight[0] += 1
        self.max_in_flight = max(self.max_in_flight, in_flight[0])
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(60):
                    while self.max_in_flight < self.together:
                        await asyncio.sleep(0.01)
            await asyncio.sleep(self.delay_s)
            status, headers, answer = self.reply(body, number)
        finally:
            in_flight[0] -= 1
        raw = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
        if status in (0, 200) and isinstance(answer, dict) and "usage" in answer:
            self.billed[0] += answer["usage"]["prompt_tokens"]
            self.billed[1] += answer["usage"]["completion_tokens"]
        fields = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        fields += [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status or 200, "headers": fields})
        if status == 0:
            await send({"type": "http.response.body", "body": raw[: len(raw) // 2], "more_body": True})
            return  # uvicorn closes a connection whose answer is incomplete
        await send({"type": "http.response.body", "body": raw})
