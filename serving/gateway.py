"""The HTTP side: OpenAI's routes over two functions, one that samples and one that scores. Knows no Ray.

Every answer that is an error has OpenAI's shape. At most `serving.max_concurrency` requests are worked on and
`serving.max_queue` wait; the next is told to come back instead of waiting for its timeout.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cluster.config import Config, DecodingConfig
from generation.engines import request_seed
from generation.prompts import Message
from serving import protocol
from serving.protocol import ApiError, Sampled

logger = logging.getLogger("ray.serve")
MAX_BODY = 1 << 20
"""Largest request body, in bytes."""


class Backend(Protocol):
    """The models as the gateway sees them; each call raises `ApiError` for what the client should be told."""

    def sample(self, turns: Sequence[Message], decodings: Sequence[DecodingConfig], seeds: Sequence[int]) -> Awaitable[Sampled]:
        """Return the candidates of a prompt."""

    def score(self, instruction: str, responses: Sequence[str]) -> Awaitable[list[float]]:
        """Return one raw logit for each response."""

    def logprob_weight(self) -> Awaitable[float | None]:
        """Return the blend's weight that was fitted with the scorer, None where there is none."""

    def ready(self) -> Awaitable[dict[str, bool]]:
        """Return whether each model can answer, by its name."""


class Doorman:
    """Lets `working` requests in, keeps `waiting` more at the door and turns the rest away."""

    def __init__(self, working: int, waiting: int) -> None:
        self._slots = asyncio.Semaphore(working)
        self._room = working + waiting
        self._here = 0

    async def __aenter__(self) -> None:
        if self._here >= self._room:
            raise ApiError(f"the server has {self._here} requests in work or waiting; try again", 503, code="overloaded")
        self._here += 1
        try:
            await self._slots.acquire()
        except BaseException:
            self._here -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._slots.release()
        self._here -= 1


def build_api(config: Config, backend: Backend) -> FastAPI:
    """Return the web application that answers with `backend`'s models under the name `serving.model_name`."""
    api = FastAPI(title="Cappy on Ray", docs_url=None, redoc_url=None)
    started = int(time.time())
    name = config.serving.model_name
    model = {"id": name, "object": "model", "created": started, "owned_by": "cappy-ray"}
    door = Doorman(config.serving.max_concurrency, config.serving.max_queue)

    @api.post("/v1/chat/completions", response_model=protocol.ChatCompletion)
    async def chat(http: Request) -> JSONResponse:
        """Sample candidates for the last message, score them, return the best."""
        request = protocol.parse(await _read(http))
        _known(request.model, name)
        decodings = protocol.decodings_for(request, config)
        try:
            async with asyncio.timeout(config.serving.timeout_s), door:
                answer = await _complete(request, decodings, config, backend)
        except TimeoutError:
            raise ApiError(
                f"no answer within serving.timeout_s={config.serving.timeout_s:g}; ask for fewer candidates or tokens", 504, code="timeout"
            ) from None
        return JSONResponse(answer.model_dump(exclude={"cappy"} if answer.cappy is None else None))

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List what `model` may be."""
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        """Describe one model."""
        _known(asked, name)
        return model

    @api.get("/health")
    async def health() -> JSONResponse:
        """Answer 200 only while the LLM and the scorer can both answer."""
        ready = await backend.ready()
        healthy = all(ready.values())
        return JSONResponse({"status": "ok" if healthy else "unavailable", **ready}, 200 if healthy else 503)

    api.add_exception_handler(ApiError, _api_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _bug)
    return api


async def _complete(
    request: protocol.ChatRequest, decodings: list[DecodingConfig], config: Config, backend: Backend
) -> protocol.ChatCompletion:
    start = time.monotonic()
    turns = protocol.turns_for(request, config.sampler.prompt.system)
    sampled = await backend.sample(turns, decodings, _seeds(request.seed, decodings))
    candidates = sampled["candidates"]
    drawn = time.monotonic()
    responses = protocol.distinct(candidates)
    score_of = dict(zip(responses, await backend.score(request.instruction, responses), strict=True))
    scores = [score_of[candidate["response"]] for candidate in candidates]
    weight = await backend.logprob_weight() if config.serving.selection == "blend" else None
    scored = time.monotonic()
    return protocol.completion(
        request,
        candidates,
        scores,
        protocol.preferences(candidates, scores, weight),
        prompt_tokens=sampled["prompt_tokens"],
        scorer=config.scorer_uri,
        latency=protocol.Latency(sampling_s=round(drawn - start, 4), scoring_s=round(scored - drawn, 4)),
        identity=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
    )


def _seeds(seed: int | None, decodings: Sequence[DecodingConfig]) -> list[int]:
    """One 31-bit seed a decoding: from the request's own seed, else by chance."""
    if seed is None:
        return [random.getrandbits(31) for _ in decodings]
    return [request_seed(seed, "", decoding.name) for decoding in decodings]


def _known(name: str, known: str) -> None:
    if name != known:
        raise ApiError(f"model={name!r} is not served here; known: {known}", 404, param="model", code="model_not_found")


async def _read(http: Request) -> bytes:
    """Return the body, refusing one above the limit before it is held in memory."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ApiError(f"the body is larger than {MAX_BODY:,} bytes; shorten the messages", 413, code="body_too_large")
    return bytes(body)


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def _http_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"{http.url.path} is not here; known: POST /v1/chat/completions, GET /v1/models, GET /health"
    if error.status_code == 405:
        message = f"{http.method} is not what {http.url.path} takes"
    return await _api_error(http, ApiError(message, error.status_code, code="not_found" if error.status_code == 404 else None))


async def _bug(http: Request, error: Exception) -> JSONResponse:
    """Hide a failure of ours behind a number that finds it in the log."""
    number = uuid.uuid4().hex[:12]
    logger.error("%s %s failed, error %s", http.method, http.url.path, number, exc_info=error)
    return await _api_error(http, ApiError(f"the server failed; its log has the reason under error {number}", 500, code="internal_error"))
