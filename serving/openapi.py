"""Completes the OpenAPI schema of the gateway: request bodies, examples, errors and authentication.

FastAPI cannot derive these parts, because the handlers read their bodies without it. A new route needs
`describe_route(Request, Answer)`, and each of its models needs an example in `EXAMPLES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serving.responses import ErrorAnswer

ERROR_DESCRIPTIONS = {
    400: "The request is invalid: `param` names the field, and the message gives the correction",
    401: "The API key is missing or not valid for this server",
    403: "The Host header does not name this machine; a server without keys accepts no other name",
    404: "The server does not have this model or this path",
    408: "The body did not arrive in time",
    413: "The body is too large",
    414: "The URI is too long",
    415: "The request does not declare plain JSON",
    429: "The key's limit per minute or the server's cost limit is reached; `Retry-After` is the time to wait before a retry",
    431: "The headers are too large",
    500: "Internal error; the server's log has the cause under the request id",
    502: "The endpoint that this server samples from refused the request",
    503: "A model is unavailable or the queue is full; `Retry-After` is the time to wait before a retry",
    504: "No answer within the server's time limit",
}
_EVERY_ROUTE = (401, 403, 414, 429, 431, 500)
"""Errors that any route may return."""

_SCORER = {"model": "cappy-scorer"}
_SCORER_USAGE = {"prompt_tokens": 23, "total_tokens": 23, "completion_tokens": 0}
_CREATED = 1764547200
_MODEL = {"id": "cappy", "object": "model", "created": _CREATED, "owned_by": "cappy-ray", "cappy": {"llm": True, "scorer": "cappy-scorer"}}
_USAGE = {"prompt_tokens": 37, "completion_tokens": 3, "total_tokens": 40}
EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatRequest": {
        "model": "cappy",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "cappy": {"candidates": 8, "return_candidates": True},
    },
    "ChatCompletion": {
        "id": "chatcmpl-0f3a",
        "object": "chat.completion",
        "created": _CREATED,
        "model": "cappy",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Paris.", "refusal": None}, "finish_reason": "stop", "logprobs": None}
        ],
        "usage": _USAGE,
        "cappy": {
            "candidates": [
                {
                    "response": "Paris.",
                    "score": 0.81,
                    "decoding": "greedy",
                    "tokens": 3,
                    "logprob": -0.2,
                    "finish_reason": "stop",
                    "chosen": True,
                }
            ],
            "fallback": None,
            "abstained": False,
            "drawn": 1,
            "stopped": None,
            "scorer": "cappy-scorer",
            "scorer_version": "0f3a8c21",
            "sampled_tokens": 3,
            "latency": {"sampling_s": 0.9, "scoring_s": 0.02},
        },
    },
    "TextRequest": {"model": "cappy", "prompt": "The capital of France is", "max_tokens": 8, "stop": ["\n"]},
    "TextCompletion": {
        "id": "cmpl-0f3a",
        "object": "text_completion",
        "created": _CREATED,
        "model": "cappy",
        "choices": [{"index": 0, "text": " Paris.", "finish_reason": "stop", "logprobs": None}],
        "usage": _USAGE,
        "cappy": None,
    },
    "ScoreRequest": {**_SCORER, "text_1": "What is the capital of France?", "text_2": ["Paris", "Lyon"]},
    "ScoreAnswer": {
        "id": "score-0f3a",
        "object": "list",
        "created": _CREATED,
        **_SCORER,
        "data": [{"index": 0, "object": "score", "score": 0.81}, {"index": 1, "object": "score", "score": 0.12}],
        "usage": _SCORER_USAGE,
    },
    "RerankRequest": {**_SCORER, "query": "What is the capital of France?", "documents": ["Lyon", "Paris"], "top_n": 1},
    "RerankAnswer": {
        "id": "rerank-0f3a",
        **_SCORER,
        "results": [{"index": 1, "relevance_score": 0.81}],
        "usage": _SCORER_USAGE,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    },
    "ClassifyRequest": {**_SCORER, "instruction": "Is 7 a prime number?", "choices": ["yes", "no"]},
    "Classification": {
        "id": "classify-0f3a",
        "object": "classification",
        "created": _CREATED,
        **_SCORER,
        "choice": "yes",
        "index": 0,
        "scores": [0.7, 0.2],
        "usage": _SCORER_USAGE,
    },
    "Model": _MODEL,
    "ModelList": {"object": "list", "data": [_MODEL]},
    "ErrorAnswer": {
        "error": {
            "message": "n=0: Input should be greater than or equal to 1",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    },
}


def describe_route(body: type[BaseModel], answer: type[BaseModel], *, streams: bool = False) -> dict[str, Any]:
    """Return the arguments of a POST route for FastAPI: its body, its answer and its errors.

    With `streams` the answer can also be server-sent events.
    """
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    responses = error_responses(400, 404, 408, 413, 415, 503, 504, *((502,) if streams else ()))
    if streams:
        events = 'data: {"object": "chat.completion.chunk", "choices": [...], ...}\n\ndata: [DONE]\n\n'
        responses[200] = {"content": {"text/event-stream": {"schema": {"description": "Server-sent events"}, "example": events}}}
    return {
        "response_model": answer,
        "responses": responses,
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    }


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route: the given statuses and the errors of every route."""
    return {status: {"model": ErrorAnswer, "description": ERROR_DESCRIPTIONS[status]} for status in sorted({*statuses, *_EVERY_ROUTE})}


def complete_schema(api: FastAPI, *, keys: bool, own_names: bool, public: Sequence[str]) -> None:
    """Add models of the request bodies, examples and authentication to the schema of `api`, in place.

    Args:
        api: The application, with all its routes.
        keys: Whether the server has API keys.
        own_names: Whether a request must name this machine in its Host header (`middleware.AuthMiddleware`).
        public: The paths that need no key.
    """
    tree = api.openapi()  # FastAPI caches this object and serves it
    models = tree["components"]["schemas"]
    for path in tree["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's default; this API answers 400
            for status, response in operation["responses"].items():
                if status != "200":  # errors are JSON even if the route returns another type
                    response["content"] = {"application/json": next(iter(response["content"].values()))}
            if not own_names:
                operation["responses"].pop("403", None)
            if not keys:
                operation["responses"].pop("401", None)
                if "502" not in operation["responses"]:  # only a route that samples can reach the cost limit
                    operation["responses"].pop("429", None)
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]
                schema = content["schema"]
                models |= schema.pop("$defs", {})
                models[schema["title"]] = schema
                content["schema"] = {"$ref": f"#/components/schemas/{schema['title']}"}
    for name in ("HTTPValidationError", "ValidationError"):
        models.pop(name, None)
    for name, model in models.items():
        if name in EXAMPLES:
            model["examples"] = [EXAMPLES[name]]
    if keys:
        tree["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        tree["security"] = [{"bearer": []}, {"header": []}]
        for path in set(public) & tree["paths"].keys():
            tree["paths"][path]["get"]["security"] = []
