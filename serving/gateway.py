"""The web application: OpenAI's routes, the routes of rerankers, and health and metrics, over a `Backend`. Imports no Ray.

Every error has OpenAI's format. Up to `serving.max_concurrency` requests run, up to `serving.max_queue` wait, and others are
rejected immediately with 503.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from cluster import ports
from cluster.config import Config, DecodingConfig, Fallback
from serving import best_of_n, openapi, request_body, sampling_policy, scoring_api
from serving.admission import AdmissionQueue
from serving.api_keys import Keyring
from serving.backend import ApiError, Backend, Scored, merge_scored
from serving.completions_api import ChatRequest, SampleRequest, TextRequest, build_prompt, parse_chat_request, parse_text_request
from serving.middleware import AuthMiddleware, RequestLimitsMiddleware, RequestLogMiddleware, internal_error
from serving.model_registry import ModelRegistry
from serving.prometheus import Metrics
from serving.responses import (
    ChatCompletion,
    Completion,
    Latency,
    Model,
    ModelList,
    TextCompletion,
    build_chunks,
    build_completion,
    build_progress_chunk,
    fallback_ranking_scores,
    ranking_scores,
)
from serving.web_ui import build_page

logger = logging.getLogger("ray.serve")
_PAIRS_PER_CALL = 64
"""Pairs in one call of the scorer. A long list is spread over the replicas, and pairs of other requests are scored in between."""
_EARLY_SCORING_LOAD = 0.25
"""Share of `serving.max_concurrency` up to which a request's candidates are scored as they finish.

Above it the more and smaller batches delay other requests by more than they save.
"""
_ROUTES = (
    "POST /v1/chat/completions, /v1/completions, /v1/score, /v1/rerank, /v2/rerank, /v1/classify, "
    "GET /, /v1/models, /health, /ready, /metrics"
)
T = TypeVar("T")


def build_api(
    config: Config, backend: Backend, further: Sequence[str] = (), metrics: Metrics | None = None, *, proxied: bool = False
) -> FastAPI:
    """Return the web application.

    Args:
        config: The settings of the server.
        backend: The LLM and the scorers.
        further: Names of the scorers beside the main one.
        metrics: The Prometheus metrics, new ones by default.
        proxied: Whether Ray Serve's proxy is in front of the application.
    """
    # Redirects are off: their target would contain the client's Host header.
    api = FastAPI(title="Cappy on Ray", docs_url=None, redoc_url=None, redirect_slashes=False)
    started = int(time.time())
    serving = config.serving
    registry = ModelRegistry(serving, further)
    admission = AdmissionQueue(serving.max_concurrency, serving.max_queue)
    metrics = metrics or Metrics()
    metrics.requests_in_progress.set_function(lambda: admission.active)

    async def run_admitted(work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` through the queue and within the time limit, and measure both times."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(serving.timeout_s), admission:
                metrics.observe_seconds("queue", time.monotonic() - start)
                return await work()
        except TimeoutError:
            message = f"no answer within serving.timeout_s={serving.timeout_s:g}; send a smaller request"
            raise ApiError(message, 504, code="timeout") from None
        finally:
            metrics.observe_seconds("total", time.monotonic() - start)

    async def read_body(http: Request) -> bytes:
        # Checked before the body is read, so that a rejected request costs the running ones no time.
        admission.check_capacity()
        return await request_body.read_body(http, serving)

    async def complete(http: Request, request: SampleRequest) -> Response:
        """Answer a chat or text completion with one body or a stream."""
        scorer = registry.find_selection_scorer(request)
        decodings = sampling_policy.select_decodings(request, config, scored=scorer is not None)
        http.scope["caller"].count_candidates(sum(decoding.n for decoding in decodings))
        events: asyncio.Queue[str | None] = asyncio.Queue()

        def run() -> Awaitable[Completion]:
            early = admission.active <= _EARLY_SCORING_LOAD * serving.max_concurrency
            return _complete(request, scorer, decodings, config, backend, metrics, events, early=early)

        task = asyncio.ensure_future(run_admitted(run))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            # The stream starts with its first event, so that an error before it still has its own HTTP status.
            first = await _next_event(events, serving.keep_alive_s if request.stream else None)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if request.stream and not (task.done() and task.exception()):
            stream = _stream_events(first, events, task, request, serving.keep_alive_s, http)
            return StreamingResponse(stream, media_type="text/event-stream")
        answer = task.result()
        return JSONResponse(answer.model_dump(exclude={"cappy"} if answer.cappy is None else None))

    @api.post("/v1/chat/completions", **openapi.describe_route(ChatRequest, ChatCompletion, streams=True))
    async def chat(http: Request) -> Response:
        """Sample candidates for the last message, score them, and return the best."""
        request = parse_chat_request(await read_body(http))
        sampling_policy.check_prompt_length((message.content for message in request.messages), config, "messages")
        return await complete(http, request)

    @api.post("/v1/completions", **openapi.describe_route(TextRequest, TextCompletion, streams=True))
    async def text(http: Request) -> Response:
        """Sample continuations of a prompt, score them, and return the best."""
        request = parse_text_request(await read_body(http))
        sampling_policy.check_prompt_length([request.prompt], config, "prompt")
        return await complete(http, request)

    async def score_request(kind: type[scoring_api.RequestT], http: Request) -> tuple[scoring_api.RequestT, Scored]:
        request = scoring_api.parse_scoring_request(kind, await read_body(http), serving)
        scorer = registry.find_scorer(request.model)
        return request, await run_admitted(lambda: _score(backend, scorer, *request.pairs()))

    @api.post("/v1/score", **openapi.describe_route(scoring_api.ScoreRequest, scoring_api.ScoreAnswer))
    @api.post("/score", response_model=scoring_api.ScoreAnswer, include_in_schema=False)
    async def score(http: Request) -> scoring_api.ScoreAnswer:
        """Score pairs of an instruction and a response (vLLM's route)."""
        request, scored = await score_request(scoring_api.ScoreRequest, http)
        return scoring_api.build_score_answer(request, scored, uuid.uuid4().hex, int(time.time()))

    async def rank(http: Request, version: Literal[1, 2]) -> JSONResponse:
        request, scored = await score_request(scoring_api.RerankRequest, http)
        answer = scoring_api.build_rerank_answer(request, scored, uuid.uuid4().hex, version=version)
        return JSONResponse(answer.model_dump(exclude_none=True))

    @api.post("/v1/rerank", **openapi.describe_route(scoring_api.RerankRequest, scoring_api.RerankAnswer))
    @api.post("/rerank", response_model=scoring_api.RerankAnswer, include_in_schema=False)
    async def rerank(http: Request) -> JSONResponse:
        """Rank documents as responses to a query (the route of Jina and vLLM)."""
        return await rank(http, 1)

    @api.post("/v2/rerank", **openapi.describe_route(scoring_api.RerankRequest, scoring_api.RerankAnswer))
    async def rerank_2(http: Request) -> JSONResponse:
        """Rank documents as responses to a query (Cohere's route)."""
        return await rank(http, 2)

    @api.post("/v1/classify", **openapi.describe_route(scoring_api.ClassifyRequest, scoring_api.Classification))
    async def classify(http: Request) -> scoring_api.Classification:
        """Select the best of several answers to an instruction with the scorer alone (paper, section 3.2)."""
        request, scored = await score_request(scoring_api.ClassifyRequest, http)
        return scoring_api.build_classification(request, scored, uuid.uuid4().hex, int(time.time()))

    @api.get("/v1/models", responses=openapi.error_responses())
    async def models() -> ModelList:
        """List the valid values of `model`."""
        return ModelList(data=[registry.describe(name, started) for name in registry.models])

    @api.get("/v1/models/{asked:path}", responses=openapi.error_responses(404))
    async def one_model(asked: Annotated[str, Path(examples=["cappy"])]) -> Model:
        """Describe one model."""
        return registry.describe(asked, started)

    page = build_page(serving)

    @api.get("/", include_in_schema=False)
    async def front() -> Response:
        """Return the web page."""
        return page

    unavailable: dict[int | str, dict[str, Any]] = {503: {"model": dict[str, str | bool], "description": "At least one value is false"}}

    @api.get("/health", response_model=dict[str, str | bool], responses=openapi.error_responses() | unavailable)
    async def health() -> JSONResponse:
        """Return 200 if the LLM and the scorer can both answer."""
        ready = await backend.ready()
        healthy = all(ready.values())
        return JSONResponse({"status": "ok" if healthy else "unavailable", **ready}, 200 if healthy else 503)

    @api.get("/ready", response_model=dict[str, str | bool], responses=openapi.error_responses() | unavailable)
    async def ready() -> JSONResponse:
        """Return 200 if both models can answer and the queue accepts another request."""
        up = {**await backend.ready(), "room": admission.has_capacity}
        return JSONResponse({"status": "ready" if all(up.values()) else "busy", **up}, 200 if all(up.values()) else 503)

    @api.get("/metrics", response_class=PlainTextResponse, responses=openapi.error_responses())
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    own_names = frozenset({*ports.LOOPBACK, serving.host}) if not serving.api_keys and ports.is_loopback(serving.host) else None
    openapi.complete_schema(api, keys=bool(serving.api_keys), own_names=own_names is not None)
    api.add_middleware(AuthMiddleware, keyring=Keyring(serving.api_keys), own_names=own_names)
    api.add_middleware(RequestLimitsMiddleware)
    api.add_middleware(RequestLogMiddleware, metrics=metrics, access_log=serving.access_log, proxied=proxied)
    api.add_exception_handler(ApiError, _handle_api_error)
    api.add_exception_handler(HTTPException, _handle_http_error)
    return api


async def _complete(
    request: SampleRequest,
    scorer: str | None,
    decodings: list[DecodingConfig],
    config: Config,
    backend: Backend,
    metrics: Metrics,
    events: asyncio.Queue[str | None],
    *,
    early: bool,
) -> Completion:
    """Sample and score the candidates and return the answer with the best.

    `events` receives the progress of a stream, if the request has `cappy.progress`. For `early` see `best_of_n.draw_pool`.
    """
    completion_id, created = uuid.uuid4().hex, int(time.time())
    prompt = build_prompt(request, config.sampler.prompt.system)

    def report_progress(pool: best_of_n.Pool) -> None:
        chunk = build_progress_chunk(request, pool.candidates, pool.scores, completion_id=completion_id, created=created)
        events.put_nowait(_format_event(chunk))

    def score(responses: Sequence[str]) -> Awaitable[Scored]:
        assert scorer is not None
        return _score(backend, scorer, [request.instruction] * len(responses), responses)

    logprobs = sampling_policy.needs_logprobs(request, config, scored=scorer is not None)
    pool = await best_of_n.draw_pool(
        decodings,
        lambda drawn, seeds, on_finished: backend.sample(prompt, drawn, seeds, logprobs, on_finished),
        score if scorer else None,
        seed=request.seed,
        n=request.n,
        stopping=sampling_policy.select_stopping_rule(request, config) if scorer else None,
        scorer_timeout_s=config.serving.scorer_timeout_s,
        early=early,
        on_progress=report_progress if request.cappy.progress else None,
    )
    metrics.observe_pool(pool)
    fallback = _fallback(request, pool, config)
    if fallback:
        metrics.count_fallback(fallback)
    if fallback or scorer is None:
        ranking = fallback_ranking_scores(pool.candidates, fallback or "first")
    else:
        weight = pool.logprob_weight if config.serving.selection == "blend" else None
        ranking = ranking_scores(pool.candidates, pool.scores, weight)
    answer = build_completion(
        request,
        pool.candidates,
        pool.scores,
        ranking,
        prompt_tokens=pool.prompt_tokens,
        scorer=scorer,
        version=pool.version,
        latency=Latency(sampling_s=round(pool.sampling_s, 4), scoring_s=round(pool.scoring_s, 4)),
        completion_id=completion_id,
        created=created,
        fallback=fallback,
        cost=pool.cost,
        stopped=pool.stop_reason,
    )
    if answer.cappy and answer.cappy.abstained:
        metrics.count_abstention()
    return answer


def _fallback(request: SampleRequest, pool: best_of_n.Pool, config: Config) -> Fallback | None:
    """Return the fallback that selects if the scorer failed before it scored any candidate, else None.

    Raises `ApiError` (503) if the scorer failed and the fallback is `none`.
    """
    if pool.scorer_error is None or pool.has_scores:
        return None
    fallback = sampling_policy.select_fallback(request, config)
    if fallback != "none":
        return fallback
    if isinstance(pool.scorer_error, ApiError):
        raise pool.scorer_error
    message = f"the scorer gave no answer within serving.scorer_timeout_s={config.serving.scorer_timeout_s:g}; retry"
    raise ApiError(message, 503, code="scorer_late")


async def _next_event(events: asyncio.Queue[str | None], keep_alive_s: float | None) -> str | None:
    """Return the next event of a stream, None after the last one, or a keep-alive comment if none arrives in time."""
    try:
        async with asyncio.timeout(keep_alive_s):
            return await events.get()
    except TimeoutError:
        return ": sampling\n\n"


async def _stream_events(
    first: str | None,
    events: asyncio.Queue[str | None],
    task: asyncio.Task[Completion],
    request: SampleRequest,
    keep_alive_s: float,
    http: Request,
) -> AsyncIterator[str]:
    """Yield server-sent events: progress and keep-alives until the answer is complete, its chunks, and the end mark.

    An error is the last event of its stream. A client that disconnects cancels `task`.
    """
    try:
        event = first
        while event is not None:
            yield event
            event = await _next_event(events, keep_alive_s)
        try:
            answer = task.result()
        except Exception as error:
            failure = error if isinstance(error, ApiError) else internal_error(http, error)
            yield _format_event(failure.body)
            return
        for chunk in build_chunks(answer, usage=request.include_usage):
            yield _format_event(chunk)
        yield "data: [DONE]\n\n"
    finally:
        task.cancel()


def _format_event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _score(backend: Backend, scorer: str, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
    """Score pairs in concurrent calls of up to `_PAIRS_PER_CALL` each; see `merge_scored` for the result."""
    slices = [slice(start, start + _PAIRS_PER_CALL) for start in range(0, len(responses), _PAIRS_PER_CALL)]
    parts = await asyncio.gather(*(backend.score(scorer, instructions[part], responses[part]) for part in slices))
    return merge_scored(parts)


async def _handle_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _handle_http_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # Not `http.url`: it contains the client's Host header and raises if that is malformed.
    message, path = error.detail, http.scope["path"][:80]
    if error.status_code == 404:
        message = f"no route {path}; routes: {_ROUTES}"
    if error.status_code == 405:
        message = f"{path} does not support {http.method}; routes: {_ROUTES}"
    failure = ApiError(message, error.status_code, code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code))
    return JSONResponse(failure.body, failure.status, error.headers)
