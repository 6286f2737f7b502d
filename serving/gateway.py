"""The web application: OpenAI's routes, the routes of rerankers, and health and metrics, over a `Backend`. Imports no Ray.

Every error has OpenAI's format. Up to `serving.max_concurrency` requests run, up to `serving.max_queue` wait, and others are
rejected immediately with 503.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from cluster import ports
from cluster.config import Config
from generation.labels import describe_metric
from serving import boosted, openapi, readiness, request_body, sampling_policy, scoring_api, streaming
from serving.admission import AdmissionQueue, Place
from serving.api_keys import Keyring
from serving.backend import ApiError, Backend, Scored
from serving.candidate_log import CandidateLog
from serving.completions_api import ChatRequest, SampleRequest, TextRequest, parse_chat_request, parse_text_request
from serving.middleware import AuthMiddleware, RequestLimitsMiddleware, RequestLogMiddleware, internal_error
from serving.model_registry import ModelRegistry
from serving.prometheus import Metrics
from serving.responses import ChatCompletion, Completion, Model, ModelList, TextCompletion
from serving.web_ui import build_page
from training.consensus import consensus, consensus_metric

_EARLY_SCORING_LOAD = 0.25
"""Share of `serving.max_concurrency` up to which a request's candidates are scored as they finish.

Above it the more and smaller batches delay other requests by more than they save.
"""
_ROUTES = (
    "POST /v1/chat/completions, /v1/completions, /v1/score, /v1/rerank, /v2/rerank, /v1/classify, "
    "GET /, /v1/models, /health, /ready, /metrics"
)
_PROBE_WAIT_S = 5.0
"""Time that `/ready` waits for a test request."""
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
    fitted_scorers: set[str] = set()
    probe = readiness.build_probe(config, backend, fitted_scorers)

    @asynccontextmanager
    async def run_beside_requests(_: FastAPI) -> AsyncIterator[None]:
        """Send test requests on a slow timer while the application runs, and load the code of the consensus."""
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(probe.check_regularly())] if probe else []
        if serving.selection in ("scorer", "fitted", "consensus") or serving.fallback == "consensus":
            # Compiled code: the first call takes seconds.
            metric = consensus_metric(describe_metric(config.generate.label))
            tasks.append(asyncio.ensure_future(asyncio.to_thread(consensus, ["a", "b"], metric)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            if candidate_log:
                await asyncio.to_thread(candidate_log.close)

    # Redirects are off: their target would contain the client's Host header.
    api = FastAPI(title="Cappy on Ray", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=run_beside_requests)
    started = int(time.time())
    serving = config.serving
    registry = ModelRegistry(serving, further)
    admission = AdmissionQueue(serving.max_concurrency, serving.max_queue)
    metrics = metrics or Metrics()
    metrics.requests_in_progress.set_function(lambda: admission.active)
    candidate_log = CandidateLog(serving.log_candidates, metrics) if serving.log_candidates else None
    decoding = boosted.BoostedDecoding(config, backend, metrics, fitted_scorers, candidate_log)

    async def run_admitted(place: Place, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` when the queue allows it and within the time limit, and measure both times."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(serving.timeout_s), place.run():
                metrics.observe_seconds("queue", time.monotonic() - start)
                return await work()
        except TimeoutError:
            message = f"no answer within serving.timeout_s={serving.timeout_s:g}; send a smaller request"
            raise ApiError(message, 504, code="timeout") from None
        finally:
            metrics.observe_seconds("total", time.monotonic() - start)

    async def complete(http: Request, place: Place, request: SampleRequest, prompts: int = 1) -> Response:
        """Answer a chat or text completion with one body or a stream."""
        scorer = registry.find_selection_scorer(request)
        selects = scorer is not None or request.cappy.selection == "consensus"
        decodings = sampling_policy.select_decodings(request, config, scored=selects, prompts=prompts)
        http.scope["caller"].count_candidates(prompts * sum(each.n for each in decodings))
        events: asyncio.Queue[str | None] = asyncio.Queue()

        async def run() -> Completion:
            early = admission.active <= _EARLY_SCORING_LOAD * serving.max_concurrency
            answer = await decoding.complete(
                request, scorer, decodings, lambda chunk: events.put_nowait(streaming.format_event(chunk)), early=early
            )
            if probe and scorer and sampling_policy.needs_scores(request, config):
                probe.record_success()
            return answer

        task = asyncio.ensure_future(run_admitted(place, run))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            # The stream starts with its first event, so that an error before it still has its own HTTP status.
            first = await streaming.next_event(events, serving.keep_alive_s if request.stream else None)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if request.stream and not (task.done() and task.exception()):
            stream = streaming.stream_events(first, events, task, request, serving.keep_alive_s, lambda error: internal_error(http, error))
            return StreamingResponse(stream, media_type="text/event-stream")
        answer = task.result()
        return JSONResponse(answer.model_dump(exclude={"cappy"} if answer.cappy is None else None))

    @api.post("/v1/chat/completions", **openapi.describe_route(ChatRequest, ChatCompletion, streams=True))
    async def chat(http: Request) -> Response:
        """Sample candidates for the last message, score them, and return the best."""
        # The place comes before the body, so that a rejected request costs the running ones no time.
        with admission.reserve() as place:
            request = parse_chat_request(await request_body.read_body(http, serving), serving.model_name)
            sampling_policy.check_prompt_length((message.content for message in request.messages), config, "messages")
            return await complete(http, place, request)

    @api.post("/v1/completions", **openapi.describe_route(TextRequest, TextCompletion, streams=True))
    async def text(http: Request) -> Response:
        """Sample continuations of each prompt, score them, and return the best."""
        with admission.reserve() as place:
            request = parse_text_request(await request_body.read_body(http, serving), serving.model_name)
            sampling_policy.check_prompt_length(request.prompts, config, "prompt")
            return await complete(http, place, request, prompts=len(request.prompts))

    async def score_request(kind: type[scoring_api.RequestT], http: Request) -> tuple[scoring_api.RequestT, Scored]:
        with admission.reserve() as place:
            request = scoring_api.parse_scoring_request(kind, await request_body.read_body(http, serving), serving)
            scorer = registry.find_scorer(request.model)
            return request, await run_admitted(place, lambda: boosted.score_pairs(backend, scorer, *request.pairs()))

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
        """Return 200 if both models can answer, requests succeed (`serving.probe_s`), and the queue accepts another request."""
        models_ready = await backend.ready()
        # A model that is down is reported immediately, without a test request that would wait for it.
        answers = all(models_ready.values()) and (probe is None or await probe.check(_PROBE_WAIT_S))
        up = {**models_ready, "answers": answers, "room": admission.has_capacity}
        return JSONResponse({"status": "ready" if all(up.values()) else "busy", **up}, 200 if all(up.values()) else 503)

    @api.get("/metrics", response_class=PlainTextResponse, responses=openapi.error_responses())
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    _add_head_and_options(api)
    own_names = frozenset({*ports.LOOPBACK, serving.host}) if not serving.api_keys and ports.is_loopback(serving.host) else None
    public = ("/", "/health", *(("/ready",) if serving.probes_without_key else ()))
    openapi.complete_schema(api, keys=bool(serving.api_keys), own_names=own_names is not None, public=public)
    api.add_middleware(AuthMiddleware, keyring=Keyring(serving.api_keys), own_names=own_names, public=public)
    api.add_middleware(RequestLimitsMiddleware)
    if serving.cors_origins:
        # Before the authentication: a browser sends a preflight without the key.
        api.add_middleware(
            CORSMiddleware,
            allow_origins=serving.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    api.add_middleware(RequestLogMiddleware, metrics=metrics, access_log=serving.access_log, proxied=proxied)
    api.add_exception_handler(ApiError, _handle_api_error)
    api.add_exception_handler(HTTPException, _handle_http_error)
    return api


def _add_head_and_options(api: FastAPI) -> None:
    """Answer HEAD and OPTIONS on every GET route, as HTTP requires and as probes and load balancers send."""

    async def options() -> Response:
        return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS"})

    for route in list(api.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            api.add_api_route(route.path, route.endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
            api.add_api_route(route.path, options, methods=["OPTIONS"], include_in_schema=False)


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
