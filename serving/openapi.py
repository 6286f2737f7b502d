"""The OpenAPI schema of the gateway: what FastAPI cannot see by itself, because handlers read their bodies by hand.

A new route takes `takes(Request, Answer)`, its models an example in `EXAMPLES`; everything else follows.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serving.responses import ErrorAnswer

ERROR_DESCRIPTIONS = {
    400: "The request is wrong: `param` names the field, the message what would be right",
    401: "No API key, or one this server does not know",
    403: "The header Host has no name of this machine, which is all a server without keys answers to",
    404: "The model, or the path, is not served here",
    408: "The body was not here in time",
    413: "The body is too large",
    414: "The address is too long",
    415: "The body does not say that it is plain JSON",
    429: "The key's allowance for this minute, or the money the server may spend, is used up; `Retry-After` says when to come back",
    431: "The headers are too large",
    500: "The server failed; its log has the reason under the request's id",
    502: "The endpoint this server samples at refuses it",
    503: "A model is down, or too many requests wait; `Retry-After` says when to come back",
    504: "No answer within the server's time limit",
}
_EVERY_ROUTE = (401, 403, 414, 429, 431, 500)

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
    """Return what a POST route tells FastAPI: its body, its answer (as events too, where it `streams`) and its errors."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    responses = error_responses(400, 404, 408, 413, 415, 503, 504, *((502,) if streams else ()))
    if streams:  # as those that sample do
        events = 'data: {"object": "chat.completion.chunk", "choices": [...], ...}\n\ndata: [DONE]\n\n'
        responses[200] = {"content": {"text/event-stream": {"schema": {"description": "Server-sent events"}, "example": events}}}
    return {
        "response_model": answer,
        "responses": responses,
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    }


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return a route's answers that are errors, those that any route may give included."""
    return {status: {"model": ErrorAnswer, "description": ERROR_DESCRIPTIONS[status]} for status in sorted({*statuses, *_EVERY_ROUTE})}


def complete_schema(api: FastAPI, *, keys: bool, own_names: bool) -> None:
    """Add to the schema what stands nowhere else: the models of the bodies, examples, and how to show a key where there are `keys`.

    `own_names` is whether a request must name this machine (`middleware.AuthMiddleware`).
    """
    tree = api.openapi()  # which keeps it: what is changed here is what is served
    models = tree["components"]["schemas"]
    for path in tree["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours is 400
            for status, response in operation["responses"].items():
                if status != "200":  # JSON where the route's own answer is something else, too
                    response["content"] = {"application/json": next(iter(response["content"].values()))}
            if not own_names:
                operation["responses"].pop("403", None)
            if not keys:
                operation["responses"].pop("401", None)
                if "502" not in operation["responses"]:  # where sampling may cost money
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
        tree["paths"]["/health"]["get"]["security"] = []
