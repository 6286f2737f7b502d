"""The HTTP side: OpenAI's routes, and those of rerankers, over two functions, one that samples and one that scores. Knows no Ray.

Every answer that is an error has OpenAI's shape. At most `serving.max_concurrency` requests are worked on and
`serving.max_queue` wait; the next is told to come back instead of waiting for its timeout.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from cluster import ports
from cluster.config import Config, DecodingConfig, Fallback
from generation.prompts import Message
from serving import best_of_n, limits, openapi, protocol, scoring_api
from serving.api_keys import Caller, Keyring
from serving.model_registry import ModelRegistry
from serving.prometheus import Metrics
from serving.protocol import ApiError, Early, Sampled, Scored
from serving.web_ui import page

logger = logging.getLogger("ray.serve")
_PAIRS_AT_ONCE = 64
"""Pairs a call of the scorer takes: a long list is spread over its replicas, and others' requests are scored between."""
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = 0.25
"""Share of `serving.max_concurrency` up to which a request's candidates are scored as they end. Above it requests wait for each other, and
what more and smaller batches cost them is more than what they save."""
_POSTS = "POST /v1/chat/completions, /v1/completions, /v1/score, /v1/rerank, /v2/rerank, /v1/classify"
_OPEN = ("/", "/health")
"""Paths that want no key: they tell nothing and cost nothing."""
_SERVE_LOG = {"skip_context_filter": True, "log_to_stderr": False}
"""What Ray Serve reads in a record: leave its fields alone, and write it to the replica's log file only."""
T = TypeVar("T")


class Backend(Protocol):
    """The models as the gateway sees them; each call raises `ApiError` for what the client should be told."""

    def sample(
        self,
        prompt: Sequence[Message] | str,
        decodings: Sequence[DecodingConfig],
        seeds: Sequence[int | None],
        logprobs: bool,
        early: Early | None,
    ) -> Awaitable[Sampled]:
        """Return the candidates of a conversation, or of a text that is continued as it stands; without `logprobs` maybe without them.

        `early`, where there is one, may be told responses that have ended while others have not.
        """

    def score(self, scorer: str, instructions: Sequence[str], responses: Sequence[str]) -> Awaitable[Scored]:
        """Return the raw logit of each pair by the scorer of that name; the lists are of equal length."""

    def ready(self) -> Awaitable[dict[str, bool]]:
        """Return whether each model can answer, by its name."""


class AdmissionQueue:
    """Lets `working` requests in, keeps `waiting` more at the door and turns the rest away."""

    def __init__(self, working: int, waiting: int) -> None:
        self._slots = asyncio.Semaphore(working)
        self._room = working + waiting
        self.here = 0

    @property
    def room(self) -> bool:
        """Whether one more may come in."""
        return self.here < self._room

    def knock(self) -> None:
        """Raise `ApiError` (503) where one more may not come in."""
        if not self.room:
            raise ApiError(f"the server has {self.here} requests in work or waiting; try again", 503, code="overloaded")

    async def __aenter__(self) -> None:
        self.knock()
        self.here += 1
        try:
            await self._slots.acquire()
        except BaseException:
            self.here -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._slots.release()
        self.here -= 1


class RequestLogMiddleware:
    """Gives each request a number (`X-Request-Id`: the client's own where it is a plain one), counts its answer and logs it.

    `proxied`: in front is Ray Serve's proxy, which gives a request without a number one and puts the number it came with in the answer.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool, proxied: bool) -> None:
        self.app, self.metrics, self.access_log, self.proxied = app, metrics, access_log, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        scope["request_id"] = given if _PLAIN.fullmatch(given) else uuid.uuid4().hex
        start, status, size = time.monotonic(), 0, 0

        async def numbered(message: Event) -> None:
            nonlocal status, size
            size += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (self.proxied and scope["request_id"] == given):
                    MutableHeaders(scope=message)["X-Request-Id"] = scope["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, numbered)
        except Exception as error:
            if status:  # too late to say anything
                raise
            told = _hidden(Request(scope), error)
            await JSONResponse(told.body, told.status)(scope, receive, numbered)
        finally:
            # The pattern, not the path: that is of the client's making. nginx's 499: it went away before an answer began.
            route, status = getattr(scope.get("route"), "path", "other"), status or 499
            self.metrics.count_request(route, status)
            if self.access_log:
                caller: Caller | None = scope.get("caller")
                answered = {
                    "request_id": scope["request_id"],
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(time.monotonic() - start, 4),
                    "bytes": size,
                    "key": caller and caller.name,
                }
                logger.info("%s %s %d", scope["method"], route, status, extra=answered | _SERVE_LOG)


class AuthMiddleware:
    """Lets those with a known key in, to every path but /health and the page; the scope's `caller` says who they are.

    With `own_names` it also wants one of these in the header Host: without keys, a page of another site could otherwise ask through
    its reader's browser, once it has a name of its own resolve to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, own_names: frozenset[str] | None) -> None:
        self.app, self.keyring, self.own_names = app, keyring, own_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            headers = Headers(scope=scope)
            try:
                if self.own_names and _name(headers.get("host", "")) not in self.own_names:
                    names = ", ".join(sorted(self.own_names))
                    raise ApiError(f"without API keys this server answers to {names} alone, by the header Host", 403, code="forbidden")
                scope["caller"] = self.keyring.caller(headers.get("authorization"), headers.get("x-api-key"))
                scope["caller"].enter()
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _name(host: str) -> str:
    """Return a Host header without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).strip("[]").lower()


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
    door = AdmissionQueue(config.serving.max_concurrency, config.serving.max_queue)
    metrics = metrics or Metrics()
    metrics.requests_in_progress.set_function(lambda: door.here)

    async def working(work: Callable[[], Awaitable[T]]) -> T:
        start = time.monotonic()
        try:
            async with asyncio.timeout(config.serving.timeout_s), door:
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
        door.knock()
        return await limits.read(http, config.serving)

    async def completed(http: Request, request: protocol.SampleRequest) -> Response:
        scorer = catalogue.find_selection_scorer(request)
        decodings = protocol.decodings_for(request, config, scored=scorer is not None)
        http.scope["caller"].sample(sum(decoding.n for decoding in decodings))
        news: asyncio.Queue[str | None] = asyncio.Queue()

        def complete() -> Awaitable[protocol.Completion]:
            quiet = door.here <= _QUIET * config.serving.max_concurrency
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

    @api.post("/v1/chat/completions", **openapi.takes(protocol.ChatRequest, protocol.ChatCompletion, streams=True))
    async def chat(http: Request) -> Response:
        """Sample candidates for the last message, score them, return the best."""
        request = protocol.parse(await read(http))
        protocol.check_length((message.content for message in request.messages), config, "messages")
        return await completed(http, request)

    @api.post("/v1/completions", **openapi.takes(protocol.TextRequest, protocol.TextCompletion, streams=True))
    async def text(http: Request) -> Response:
        """Sample continuations of a prompt as it stands, score them, return the best."""
        request = protocol.parse_text(await read(http))
        protocol.check_length([request.prompt], config, "prompt")
        return await completed(http, request)

    async def judged(kind: type[scoring_api.R], http: Request) -> tuple[scoring_api.R, Scored]:
        request = scoring_api.parse(kind, await read(http), config.serving)
        scorer = catalogue.find_scorer(request.model)
        return request, await working(lambda: _score(backend, scorer, *request.pairs()))

    @api.post("/v1/score", **openapi.takes(scoring_api.ScoreRequest, scoring_api.ScoreAnswer))
    @api.post("/score", response_model=scoring_api.ScoreAnswer, include_in_schema=False)
    async def score(http: Request) -> scoring_api.ScoreAnswer:
        """Score pairs of an instruction and a response (vLLM's route)."""
        request, scored = await judged(scoring_api.ScoreRequest, http)
        return scoring_api.score_answer(request, scored, uuid.uuid4().hex, int(time.time()))

    async def ranked(http: Request, version: Literal[1, 2]) -> JSONResponse:
        request, scored = await judged(scoring_api.RerankRequest, http)
        return JSONResponse(scoring_api.rerank_answer(request, scored, uuid.uuid4().hex, version=version).model_dump(exclude_none=True))

    @api.post("/v1/rerank", **openapi.takes(scoring_api.RerankRequest, scoring_api.RerankAnswer))
    @api.post("/rerank", response_model=scoring_api.RerankAnswer, include_in_schema=False)
    async def rerank(http: Request) -> JSONResponse:
        """Rank documents as responses to a query (Jina's and vLLM's route)."""
        return await ranked(http, 1)

    @api.post("/v2/rerank", **openapi.takes(scoring_api.RerankRequest, scoring_api.RerankAnswer))
    async def rerank_2(http: Request) -> JSONResponse:
        """Rank documents as responses to a query (Cohere's route)."""
        return await ranked(http, 2)

    @api.post("/v1/classify", **openapi.takes(scoring_api.ClassifyRequest, scoring_api.Classification))
    async def classify(http: Request) -> scoring_api.Classification:
        """Choose among answers to an instruction: the scorer alone (paper, section 3.2)."""
        request, scored = await judged(scoring_api.ClassifyRequest, http)
        return scoring_api.classification(request, scored, uuid.uuid4().hex, int(time.time()))

    @api.get("/v1/models", responses=openapi.errors())
    async def models() -> protocol.ModelList:
        """List what `model` may be."""
        return protocol.ModelList(data=[catalogue.describe(name, started) for name in catalogue.models])

    @api.get("/v1/models/{asked:path}", responses=openapi.errors(404))
    async def one_model(asked: Annotated[str, Path(examples=["cappy"])]) -> protocol.Model:
        """Describe one model."""
        return catalogue.describe(asked, started)

    shown = page(config.serving)

    @api.get("/", include_in_schema=False)
    async def front() -> Response:
        """Show the page that asks from a browser."""
        return shown

    up_or_not: dict[int | str, dict[str, Any]] = {503: {"model": dict[str, str | bool], "description": "One of these is false"}}

    @api.get("/health", response_model=dict[str, str | bool], responses=openapi.errors() | up_or_not)
    async def health() -> JSONResponse:
        """Answer 200 only while the LLM and the scorer can both answer."""
        ready = await backend.ready()
        healthy = all(ready.values())
        return JSONResponse({"status": "ok" if healthy else "unavailable", **ready}, 200 if healthy else 503)

    @api.get("/ready", response_model=dict[str, str | bool], responses=openapi.errors() | up_or_not)
    async def ready() -> JSONResponse:
        """Answer 200 only while a request sent now would be worked on: both models are up, and there is room."""
        up = {**await backend.ready(), "room": door.room}
        return JSONResponse({"status": "ready" if all(up.values()) else "busy", **up}, 200 if all(up.values()) else 503)

    @api.get("/metrics", response_class=PlainTextResponse, responses=openapi.errors())
    async def exposed() -> Response:
        """Tell Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    serving = config.serving
    own_names = frozenset({*ports.LOOPBACK, serving.host}) if not serving.api_keys and ports.is_loopback(serving.host) else None
    openapi.complete(api, keys=bool(serving.api_keys), own_names=own_names is not None)
    api.add_middleware(AuthMiddleware, keyring=Keyring(serving.api_keys), own_names=own_names)
    api.add_middleware(limits.RequestLimitsMiddleware)
    api.add_middleware(RequestLogMiddleware, metrics=metrics, access_log=config.serving.access_log, proxied=proxied)
    api.add_exception_handler(ApiError, _api_error)
    api.add_exception_handler(HTTPException, _http_error)
    return api


async def _complete(
    request: protocol.SampleRequest,
    scorer: str | None,
    decodings: list[DecodingConfig],
    config: Config,
    backend: Backend,
    metrics: Metrics,
    news: asyncio.Queue[str | None],
    *,
    early: bool,
) -> protocol.Completion:
    """Draw and score the candidates and answer with the best; `news` gets the events of a stream's progress, where asked for.

    `early`: see `best_of_n.draw`.
    """
    identity, created = uuid.uuid4().hex, int(time.time())
    prompt = protocol.prompt_for(request, config.sampler.prompt.system)

    def tell(pool: best_of_n.Pool) -> None:
        news.put_nowait(_event(protocol.progress(request, pool.candidates, pool.scores, identity=identity, created=created)))

    def score(responses: Sequence[str]) -> Awaitable[Scored]:
        assert scorer is not None
        return _score(backend, scorer, [request.instruction] * len(responses), responses)

    logprobs = protocol.logprobs_wanted(request, config, scored=scorer is not None)
    pool = await best_of_n.draw_pool(
        decodings,
        lambda drawn, seeds, early: backend.sample(prompt, drawn, seeds, logprobs, early),
        score if scorer else None,
        seed=request.seed,
        n=request.n,
        stopping=protocol.stopping_for(request, config) if scorer else None,
        scorer_timeout_s=config.serving.scorer_timeout_s,
        early=early,
        tell=tell if request.cappy.progress else None,
    )
    metrics.observe_pool(pool)
    fallback = _fallback(request, pool, config)
    if fallback:
        metrics.count_fallback(fallback)
    if fallback or scorer is None:
        preferences = protocol.fallback_preferences(pool.candidates, fallback or "first")
    else:
        weight = pool.logprob_weight if config.serving.selection == "blend" else None
        preferences = protocol.preferences(pool.candidates, pool.scores, weight)
    answer = protocol.completion(
        request,
        pool.candidates,
        pool.scores,
        preferences,
        prompt_tokens=pool.prompt_tokens,
        scorer=scorer,
        version=pool.version,
        latency=protocol.Latency(sampling_s=round(pool.sampling_s, 4), scoring_s=round(pool.scoring_s, 4)),
        identity=identity,
        created=created,
        fallback=fallback,
        cost=pool.cost,
        stopped=pool.stop_reason,
    )
    if answer.cappy and answer.cappy.abstained:
        metrics.count_abstention()
    return answer


def _fallback(request: protocol.SampleRequest, pool: best_of_n.Pool, config: Config) -> Fallback | None:
    """Return what chooses where the scorer failed before it scored any, else None. Raises `ApiError` (503) where nothing is declared."""
    if pool.scorer_error is None or pool.has_scores:
        return None
    fallback = protocol.fallback_for(request, config)
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
    answering: asyncio.Task[protocol.Completion],
    request: protocol.SampleRequest,
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
            told = error if isinstance(error, ApiError) else _hidden(http, error)
            yield _event(told.body)
            return
        for chunk in protocol.chunks(answer, usage=request.wants_usage):
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
    return protocol.joined(parts)


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


def _hidden(http: Request, error: Exception) -> ApiError:
    """Hide a failure of ours behind the request's number, which finds it in the log."""
    number = http.scope["request_id"]
    logger.error("%s %s failed, request %s", http.method, http.scope["path"], number, exc_info=error)
    return ApiError(f"the server failed; its log has the reason under request {number}", 500, code="internal_error")
