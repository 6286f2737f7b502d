"""Error answers of an endpoint: read their layouts and classify them. Pure: no requests, no Ray.

Servers send errors with an error status, or with status 200 and an error body. An `ErrorAnswer` holds either.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any, NamedTuple

import httpx

_MESSAGE_CHARACTERS = 300
_TEMPORARY = (408, 409, 425, 429)
_CREDIT_CODES = (
    *("insufficient_quota", "exceeded_current_quota_error", "insufficient_balance", "billing_hard_limit_reached"),
    *("billing_not_active", "payment_required", "arrearage"),
)
_CREDIT = re.compile(r"credit balance is too low|insufficient (balance|credits?|funds)|(out of|no|not enough) credits?\b", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"context.length|maximum.context|context.window|max_model_len|maximum model length|(prompt|input) is too long", re.IGNORECASE
)
# "Request too large" comes as 413, but also as 429: the request alone is above the tokens per minute, so a retry fails too.
_TOO_LARGE = re.compile(r"(request|prompt|input|message) (is )?too large|reduce your (message|prompt|input|request) size", re.IGNORECASE)
_REQUESTED = re.compile(r"limit:?\s*([0-9]+).{0,80}?requested:?\s*([0-9]+)", re.IGNORECASE | re.DOTALL)
_FILTERED = re.compile(
    r"flagged|moderation|content.?(filter|policy|management|inspection)|policy.?violation|violates? .{0,40}(policy|policies|guidelines)"
    r"|usage polic|safety (filter|system|polic|guideline|setting)|guardrail|prohibited.content|harmful|inappropriate"
    r"|sensitive (content|word)"
    r"|data.?inspection",
    re.IGNORECASE,
)
_KEY = re.compile(
    r"api.?key|auth|credential|token|permission|not allowed to|access denied|access to|forbidden|country|region|territory|billing|account"
    r"|subscription|\bip\b",
    re.IGNORECASE,
)
_UNSUPPORTED = re.compile(
    "|".join(
        (
            *("not (yet )?support", "unsupport", "n.t support", "only the default", "fixed at", "no longer", "deprecated"),
            *("unrecogni[sz]ed", "unknown", "unexpected", "extra (inputs|fields)", "invalid (parameter|argument) name", "does not exist"),
            *("not permitted", "not allowed", "not available", "not enabled", "not implemented", "leave .{0,30} out", "incompatible"),
            *("cannot (both )?be", "can.?not be (specified|used|set|combined)", "mutually exclusive", "only one of", "use only one"),
        )
    ),
    re.IGNORECASE,
)
# Options that do not change the distribution of the samples.
_HARMLESS = ("n", "logprobs", "seed", "max_tokens")
# The status for a word in the code or the type of an error, for error bodies with status 200.
_STATUS_OF_WORDS = (
    (429, r"rate.?limit|too.?many|throttl|resource.?exhausted"),
    (402, r"payment|insufficient.?(quota|balance|credit)|billing|arrear"),
    (401, r"api.?key|unauthori[sz]ed|unauthenticated|authentication"),
    (403, r"permission|forbidden|moderation"),
    (404, r"not.?found"),
    (400, r"invalid|bad.?request|context.?length|content.?(filter|policy)|unsupported|unprocessable"),
)


class Kind(Enum):
    """The meaning of an error answer."""

    RETRY = "the server cannot answer now"
    REDIRECT = "the address is another one"
    KEY = "the key is missing or rejected"
    CREDIT = "the account has no credit left"
    MISSING = "the address or the model does not exist"
    TOO_LONG = "the prompt does not fit"
    FILTERED = "a content filter refuses the prompt"
    FORBIDDEN = "403 without a known reason"
    REFUSED = "the server refuses the request"


class ErrorAnswer(NamedTuple):
    """An error answer."""

    status: int
    """The HTTP status; for an error body in an answer with status 200, the status for its code."""
    code: str = ""
    parameter: str = ""
    """The request parameter that the server names, or empty."""
    message: str = ""
    """At most 300 characters, on one line, without the API key."""


def load_json(response: httpx.Response) -> Any:
    """Return the JSON of an answer. Raises `ValueError` if it has none."""
    try:
        return response.json()
    except RecursionError:
        raise ValueError("JSON with too many nested lists") from None


def read_error(response: httpx.Response, key: str | None = None) -> ErrorAnswer | None:
    """Return the error in an answer, or None if it is a success or not JSON. `key` is masked in the message."""
    try:
        answer = load_json(response)
    except ValueError:
        if response.is_success:
            return None
        return ErrorAnswer(response.status_code, message=_clean(response.text, key))
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]  # Gemini
    plain = answer if isinstance(answer, dict) else {}
    if response.is_success and (plain.get("choices") or not _has_error(plain)) and not plain.get("error"):
        return None
    error = plain.get("error") or plain
    error = error if isinstance(error, dict) else {"message": error}
    # LiteLLM and others put the original error into the message.
    message = error.get("message") or error.get("detail") or error.get("msg") or plain.get("message") or answer
    code = str(error.get("code") or error.get("type") or plain.get("code") or "")
    return ErrorAnswer(
        status=_status(error, plain) if response.is_success else response.status_code,
        code=_clean(code, key),
        parameter=str(error.get("param") or _located_parameter(error.get("detail")) or ""),
        message=_clean(message if isinstance(message, str) else json.dumps(message), key),
    )


def _has_error(answer: dict[str, Any]) -> bool:
    """Return whether a body without `choices` and `error` is an error, e.g. vLLM's `{"object": "error", "message": ..., "code": 400}`."""
    return answer.get("object") == "error" or any(answer.get(name) for name in ("message", "detail", "msg"))


def _status(error: dict[str, Any], answer: dict[str, Any]) -> int:
    """Return the status for the code of an error body; 500 for an unknown code."""
    for source in (error, answer):
        for name in ("code", "status", "status_code", "http_status"):
            value = source.get(name)
            if isinstance(value, int | str) and re.fullmatch(r"[45][0-9][0-9]", str(value)):
                return int(value)
    words = " ".join(str(error.get(name) or "") for name in ("code", "type", "status"))
    return next((status for status, pattern in _STATUS_OF_WORDS if re.search(pattern, words, re.IGNORECASE)), 500)


def _located_parameter(detail: Any) -> str | None:
    """Return the parameter in a validation error of FastAPI: `[{"loc": ["body", "seed"], "msg": ...}]`."""
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        location = detail[0].get("loc")
        if isinstance(location, list) and location and isinstance(location[-1], str):
            return location[-1]
    return None


def _clean(text: str, key: str | None) -> str:
    """Return a text of a server on one line, with the key masked and without characters that UTF-8 cannot encode."""
    if key:
        text = text.replace(key, "***")
    return " ".join(text.encode("utf-8", "replace").decode().split())[:_MESSAGE_CHARACTERS]


def classify(error: ErrorAnswer) -> Kind:
    """Return the meaning of an error."""
    status, text = error.status, f"{error.code} {error.message}"
    if 300 <= status < 400:
        return Kind.REDIRECT
    if status == 401:
        return Kind.KEY
    if status == 402 or error.code.lower() in _CREDIT_CODES or (status in (400, 403, 429) and _CREDIT.search(text)):
        return Kind.CREDIT
    if status == 413 or error.code == "context_length_exceeded" or _TOO_LONG.search(text) or (status < 500 and _too_large(error.message)):
        return Kind.TOO_LONG
    if status == 404:
        return Kind.MISSING
    if status < 500 and status != 429 and _FILTERED.search(text):
        return Kind.FILTERED
    if status == 403:
        # A web page comes from a firewall in front of the server, which blocks requests by their content.
        return Kind.KEY if _KEY.search(text) and not error.message.startswith("<") else Kind.FORBIDDEN
    return Kind.RETRY if status in _TEMPORARY or (status >= 500 and status != 501) else Kind.REFUSED


def _too_large(message: str) -> bool:
    """Return whether a rate limit can never admit the request."""
    sizes = _REQUESTED.search(message)
    return _TOO_LARGE.search(message) is not None or (sizes is not None and int(sizes[2]) > int(sizes[1]))


def rejects_option(error: ErrorAnswer, option: str, *, neutral: bool = False) -> bool:
    """Return whether an error rejects an option, by its parameter or by a message with its name (`n is`, 'n', n=4).

    `max_tokens` is rejected only if the message names `max_completion_tokens`: a value that is too large must not remove it. An option
    that changes the distribution of the samples is rejected only if the server does not support it. An invalid value of it is an
    error of the row, unless the value is `neutral`: equal to no such option.
    """
    if option == "max_tokens" and "max_completion_tokens" not in error.message:
        return False
    if option not in _HARMLESS and not neutral and not _UNSUPPORTED.search(f"{error.code} {error.message}"):
        return False
    named = rf"(^|[\s`'\"(.]){option}([`'\"=:,.)]|\s+(is|was|are|and|or|must|should|of|greater|does|do|cannot|not|parameters?|>)|\s*$)"
    return error.parameter == option or (not error.parameter and re.search(named, error.message) is not None)
