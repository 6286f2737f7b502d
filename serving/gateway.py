"""The HTTP side: OpenAI's routes, and those of rerankers, over two functions, one that samples and one that scores. Knows no Ray.

Every answer that is an error has OpenAI's shape. At most `serving.max_concurrency` requests are worked on and
`serving.max_queue` wait; the next is told to come back instead of waiting for its timeout.
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
from serving import best_of_n, completions_api, middleware, openapi, request_body, sampling_policy, scoring_api
from serving import responses as bodies
from serving.admission import AdmissionQueue
from serving.api_keys import Keyring
from serving.backend import ApiError, Backend, Scored, merge_scored
from serving.middleware import AuthMiddleware, RequestLogMiddleware, internal_error
from serving.model_registry import ModelRegistry
from serving.prometheus import Metrics
from serving.web_ui import build_page

logger = logging.getLogger("ray.serve")
_PAIRS_AT_ONCE = 64
"""Pairs a call of the scorer takes: a long list is spread over its replicas, and others' requests are scored between."""
_QUIET = 0.25
"""Share of `serving.max_concurrency` up to which a request's candidates are scored as they end. Above it requests wait for each other, and
what more and smaller batches cost them is more than what they save."""
_POSTS = "POST /v1/chat/completions, /v1/completions, /v1/score, /v1/rerank, /v2/rerank, /v1/classify"
T = TypeVar("T")


def build_api(
    config: Config, backend: Backend, further: Sequence[str] = (), metrics: Metrics | None = None, *, proxied: bool = False
) -> FastAPI:
    """Return the web application that answers with `backend`'s models: the LLM, the main scorer and the `further` ones, by name.

    `proxied` says whether Ray Serve's proxy is in front of it.
    """
    # No redirects: where to is made of the client's own Host header.
    api = FastAPI(title="Cappy on Ray", docs_url=None, redoc_url=None, redirect_slashes=False)
    started = int(time.time())
    catalogue = ModelRegistry(config.serving, further)
    admission = AdmissionQueue(config.serving.max_concurrency, config.serving.max_queue)
    metrics = metrics or Metrics()
    metrics.requests_in_progress.set_function(lambda: admission.active)

    async def working(work: Callable[[], Awaitable[T]]) -> T:
        start = time.monotonic()
        try:
            async with asyncio.timeout(config.serving.timeout_s), admission:
                metrics.observe_seconds("queue", time.monotonic() - start)
                return await work()
        except TimeoutError:
            raise ApiError(
                f"no answer within serving.timeout_s={config.serving.timeout_s:g}; ask for less in one request", 504, code="timeout"
            ) from None
        finally:
            metrics.observe_seconds("total", time.monotonic() - start)

    async def read(http: Request) -> bytes:
        # Not a thing is done for a request that will be turned away: when there are many, each takes from those that are not.
        admission.check_capacity()
        return await request_body.read_body(http, config.serving)

    async def completed(http: Request, request: completions_api.SampleRequest) -> Response:
        scorer = catalogue.find_selection_scorer(request)
        decodings = sampling_policy.select_decodings(request, config, scored=scorer is not None)
        http.scope["caller"].count_candidates(sum(decoding.n for decoding in decodings))
        news: asyncio.Queue[str | None] = asyncio.Queue()

        def complete() -> Awaitable[bodies.Completion]:
            quiet = admission.active <= _QUIET * config.serving.max_concurrency
            return _complete(request, scorer, decodings, config, backend, metrics, news, early=quiet)

        answering = asyncio.ensure_future(working(complete))
        answering.add_done_callback(lambda _: news.put_nowait(None))
        try:
            # A stream begins as late as may be: what is refused at once then has a status of its own.
            first = await _next(news, config.serving.keep_alive_s if request.stream else None)
        except asyncio.CancelledError:
            answering.cancel()
            raise
        if request.stream and not (answering.done() and answering.exception()):
            events = _events(first, news, answering, request, config.serving.keep_alive_s, http)
            return StreamingResponse(events, media_type="text/event-stream")
        answer = answering.result()
        return JSONResponse(answer.model_dump(exclude={"cappy"} if answer.cappy is None else None))

    @api.post("/v1/chat/completions", **openapi.describe_route(completions_api.ChatRequest, bodies.ChatCompletion, streams=True))
    async def chat(http: Request) -> Response:
        """Sample candidates for the last message, score them, return the best."""
        request = completions_api.parse_chat_request(await read(http))
        sampling_policy.check_prompt_length((message.content for message in request.messages), config, "messages")
        return await completed(http, request)

    @api.post("/v1/completions", **openapi.describe_route(completions_api.TextRequest, bodies.TextCompletion, streams=True))
    async def text(http: Request) -> Response:
        """Sample continuations of a prompt as it stands, score them, return the best."""
        request = completions_api.parse_text_request(await read(http))
        sampling_policy.check_prompt_length([request.prompt], config, "prompt")
        return await completed(http, request)

    async def judged(kind: type[scoring_api.RequestT], http: Request) -> tuple[scoring_api.RequestT, Scored]:
        request = scoring_api.parse_scoring_request(kind, await read(http), config.serving)
        scorer = catalogue.find_scorer(request.model)
        return request, await working(lambda: _score(backend, scorer, *request.pairs()))

    @api.post("/v1/score", **openapi.describe_route(scoring_api.ScoreRequest, scoring_api.ScoreAnswer))
    @api.post("/score", response_model=scoring_api.ScoreAnswer, include_in_schema=False)
    async def score(http: Request) -> scoring_api.ScoreAnswer:
        """Score pairs of an instruction and a response (vLLM's route)."""
        request, scored = await judged(scoring_api.ScoreRequest, http)
        return scoring_api.build_score_answer(request, scored, uuid.uuid4().hex, int(time.time()))

    async def ranked(http: Request, version: Literal[1, 2]) -> JSONResponse:
        request, scored = await judged(scoring_api.RerankRequest, http)
        return JSONResponse(
            scoring_api.build_rerank_answer(request, scored, uuid.uuid4().hex, version=version).model_dump(exclude_none=True)
        )

    @api.post("/v1/rerank", **openapi.describe_route(scoring_api.RerankRequest, scoring_api.RerankAnswer))
    @api.post("/rerank", response_model=scoring_api.RerankAnswer, include_in_schema=False)
    async def rerank(http: Request) -> JSONResponse:
        """Rank documents as responses to a query (Jina's and vLLM's route)."""
        return await ranked(http, 1)

    @api.post("/v2/rerank", **openapi.describe_route(scoring_api.RerankRequest, scoring_api.RerankAnswer))
    async def rerank_2(http: Request) -> JSONResponse:
        """Rank documents as responses to a query (Cohere's route)."""
        return await ranked(http, 2)

    @api.post("/v1/classify", **openapi.describe_route(scoring_api.ClassifyRequest, scoring_api.Classification))
    async def classify(http: Request) -> scoring_api.Classification:
        """Choose among answers to an instruction: the scorer alone (paper, section 3.2)."""
        request, scored = await judged(scoring_api.ClassifyRequest, http)
        return scoring_api.build_classification(request, scored, uuid.uuid4().hex, int(time.time()))

    @api.get("/v1/models", responses=openapi.error_responses())
    async def models() -> bodies.ModelList:
        """List what `model` may be."""
        return bodies.ModelList(data=[catalogue.describe(name, started) for name in catalogue.models])

    @api.get("/v1/models/{asked:path}", responses=openapi.error_responses(404))
    async def one_model(asked: Annotated[str, Path(examples=["cappy"])]) -> bodies.Model:
        """Describe one model."""
        return catalogue.describe(asked, started)

    shown = build_page(config.serving)

    @api.get("/", include_in_schema=False)
    async def front() -> Response:
        """Show the page that asks from a browser."""
        return shown

    up_or_not: dict[int | str, dict[str, Any]] = {503: {"model": dict[str, str | bool], "description": "One of these is false"}}

    @api.get("/health", response_model=dict[str, str | bool], responses=openapi.error_responses() | up_or_not)
    async def health() -> JSONResponse:
        """Answer 200 only while the LLM and the scorer can both answer."""
        ready = await backend.ready()
        healthy = all(ready.values())
        return JSONResponse({"status": "ok" if healthy else "unavailable", **ready}, 200 if healthy else 503)

    @api.get("/ready", response_model=dict[str, str | bool], responses=openapi.error_responses() | up_or_not)
    async def ready() -> JSONResponse:
        """Answer 200 only while a request sent now would be worked on: both models are up, and there is room."""
        up = {**await backend.ready(), "room": admission.has_capacity}
        return JSONResponse({"status": "ready" if all(up.values()) else "busy", **up}, 200 if all(up.values()) else 503)

    @api.get("/metrics", response_class=PlainTextResponse, responses=openapi.error_responses())
    async def exposed() -> Response:
        """Tell Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    serving = config.serving
    own_names = frozenset({*ports.LOOPBACK, serving.host}) if not serving.api_keys and ports.is_loopback(serving.host) else None
    openapi.complete_schema(api, keys=bool(serving.api_keys), own_names=own_names is not None)
    api.add_middleware(AuthMiddleware, keyring=Keyring(serving.api_keys), own_names=own_names)
    api.add_middleware(middleware.RequestLimitsMiddleware)
    api.add_middleware(RequestLogMiddleware, metrics=metrics, access_log=config.serving.access_log, proxied=proxied)
    api.add_exception_handler(ApiError, _api_error)
    api.add_exception_handler(HTTPException, _http_error)
    return api


async def _complete(
    request: completions_api.SampleRequest,
    scorer: str | None,
    decodings: list[DecodingConfig],
    config: Config,
    backend: Backend,
    metrics: Metrics,
    news: asyncio.Queue[str | None],
    *,
    early: bool,
) -> bodies.Completion:
    """Draw and score the candidates and answer with the best; `news` gets the events of a stream's progress, where asked for.

    `early`: see `best_of_n.draw_pool`.
    """
    identity, created = uuid.uuid4().hex, int(time.time())
    prompt = completions_api.build_prompt(request, config.sampler.prompt.system)

    def tell(pool: best_of_n.Pool) -> None:
        news.put_nowait(_event(bodies.build_progress_chunk(request, pool.candidates, pool.scores, identity=identity, created=created)))

    def score(responses: Sequence[str]) -> Awaitable[Scored]:
        assert scorer is not None
        return _score(backend, scorer, [request.instruction] * len(responses), responses)

    logprobs = sampling_policy.needs_logprobs(request, config, scored=scorer is not None)
    pool = await best_of_n.draw_pool(
        decodings,
        lambda drawn, seeds, early: backend.sample(prompt, drawn, seeds, logprobs, early),
        score if scorer else None,
        seed=request.seed,
        n=request.n,
        stopping=sampling_policy.select_stopping_rule(request, config) if scorer else None,
        scorer_timeout_s=config.serving.scorer_timeout_s,
        early=early,
        on_progress=tell if request.cappy.progress else None,
    )
    metrics.observe_pool(pool)
    fallback = _fallback(request, pool, config)
    if fallback:
        metrics.count_fallback(fallback)
    if fallback or scorer is None:
        preferences = bodies.fallback_ranking_scores(pool.candidates, fallback or "first")
    else:
        weight = pool.logprob_weight if config.serving.selection == "blend" else None
        preferences = bodies.ranking_scores(pool.candidates, pool.scores, weight)
    answer = bodies.build_completion(
        request,
        pool.candidates,
        pool.scores,
        preferences,
        prompt_tokens=pool.prompt_tokens,
        scorer=scorer,
        version=pool.version,
        latency=bodies.Latency(sampling_s=round(pool.sampling_s, 4), scoring_s=round(pool.scoring_s, 4)),
        identity=identity,
        created=created,
        fallback=fallback,
        cost=pool.cost,
        stopped=pool.stop_reason,
    )
    if answer.cappy and answer.cappy.abstained:
        metrics.count_abstention()
    return answer


def _fallback(request: completions_api.SampleRequest, pool: best_of_n.Pool, config: Config) -> Fallback | None:
    """Return what chooses where the scorer failed before it scored any, else None. Raises `ApiError` (503) where nothing is declared."""
    if pool.scorer_error is None or pool.has_scores:
        return None
    fallback = sampling_policy.select_fallback(request, config)
    if fallback != "none":
        return fallback
    if isinstance(pool.scorer_error, ApiError):
        raise pool.scorer_error
    late = f"the scorer gave no answer within serving.scorer_timeout_s={config.serving.scorer_timeout_s:g}; try again"
    raise ApiError(late, 503, code="scorer_late")


async def _next(news: asyncio.Queue[str | None], keep_alive_s: float | None) -> str | None:
    """Return the next event of a stream, a comment as a sign of life where none comes in time, None once the answer is there."""
    try:
        async with asyncio.timeout(keep_alive_s):
            return await news.get()
    except TimeoutError:
        return ": sampling\n\n"


async def _events(
    first: str | None,
    news: asyncio.Queue[str | None],
    answering: asyncio.Task[bodies.Completion],
    request: completions_api.SampleRequest,
    keep_alive_s: float,
    http: Request,
) -> AsyncIterator[str]:
    """Yield server-sent events: progress and signs of life until the answer is there, its chunks, and the end mark."""
    try:
        event = first
        while event is not None:
            yield event
            event = await _next(news, keep_alive_s)
        try:
            answer = answering.result()
        except Exception as error:
            told = error if isinstance(error, ApiError) else internal_error(http, error)
            yield _event(told.body)
            return
        for chunk in bodies.build_chunks(answer, usage=request.include_usage):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    finally:  # the client may have gone
        answering.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _score(backend: Backend, scorer: str, instructions: Sequence[str], responses: Sequence[str]) -> Scored:
    """Score pairs, some of them in each call; what else is told of the scorer is from the last."""
    cuts = [slice(start, start + _PAIRS_AT_ONCE) for start in range(0, len(responses), _PAIRS_AT_ONCE)]
    parts = await asyncio.gather(*(backend.score(scorer, instructions[cut], responses[cut]) for cut in cuts))
    return merge_scored(parts)


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    # Not `http.url`, which is made of the client's Host header and fails with it.
    message, path = error.detail, http.scope["path"][:80]
    if error.status_code == 404:
        message = f"{path} is not here; known: {_POSTS}, GET /, /v1/models, /health, /ready, /metrics"
    if error.status_code == 405:
        message = f"{http.method} is not what {path} takes"
    told = ApiError(message, error.status_code, code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code))
    return JSONResponse(told.body, told.status, error.headers)
