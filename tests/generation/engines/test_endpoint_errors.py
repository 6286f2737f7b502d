import json

import httpx
import pytest

from generation.engines.endpoint_errors import ErrorAnswer, Kind, classify, read_error, rejects_option


def response(status, body):
    return httpx.Response(status, content=body if isinstance(body, bytes) else json.dumps(body))


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, {"error": {"message": "no", "code": "bad", "param": "n"}}, (400, "bad", "n", "no")),
        (400, {"error": "no"}, (400, "", "", "no")),
        (400, [{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}], (400, "400", "", "no")),
        (422, {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, (422, "", "seed", "")),
        (400, {"object": "error", "message": "no", "code": 400}, (400, "400", "", "no")),
        (500, b"<html>no</html>", (500, "", "", "<html>no</html>")),
        (502, b"", (502, "", "", "")),
        (403, b"interdit \xe9", (403, "", "", "interdit")),
        # Status 200 with an error body.
        (200, {"error": {"message": "slow down", "code": 429}}, (429, "429", "", "slow down")),
        (200, {"error": {"message": "slow down", "type": "rate_limit_error"}}, (429, "rate_limit_error", "", "slow down")),
        (200, {"error": {"message": "no key", "code": "invalid_api_key"}}, (401, "invalid_api_key", "", "no key")),
        (200, {"error": {"message": "strange"}}, (500, "", "", "strange")),
        (200, {"error": "strange"}, (500, "", "", "strange")),
        (200, {"object": "error", "message": "no", "code": 400}, (400, "400", "", "no")),
        (200, {"detail": "not here", "status": 404}, (404, "", "", "not here")),
        (200, {"choices": [], "error": {"message": "down", "code": "503"}}, (503, "503", "", "down")),
    ],
)
def test_an_error_of_any_layout_is_read(status, body, expected):
    found = read_error(response(status, body))
    assert found is not None and found[:3] == expected[:3] and expected[3] in found.message


@pytest.mark.parametrize("body", [{"choices": [{}]}, {"choices": [{}], "error": None}, {"choices": []}, {}, [], b"<html>", None])
def test_a_success_has_no_error(body):
    assert read_error(response(200, body)) is None


def test_a_message_is_one_line_without_the_key_and_can_be_written_as_utf8():
    body = {"error": {"message": "bad\nkey sk-1 \ud83d" + "x" * 999, "code": "sk-1"}}
    found = read_error(response(400, body), "sk-1")
    assert found.message.startswith("bad key *** ?x") and len(found.message) == 300 and found.code == "***"
    found.message.encode()


@pytest.mark.parametrize(
    ("status", "code", "message", "kind"),
    [
        (401, "", "", Kind.KEY),
        (403, "", "Incorrect API key provided", Kind.KEY),
        (403, "unsupported_country_region_territory", "", Kind.KEY),
        (403, "", "You do not have permission to use this model", Kind.KEY),
        (403, "403", 'Your chosen model requires moderation and your input was flagged for "violence"', Kind.FILTERED),
        (403, "", "Request blocked: it violates our usage policies", Kind.FILTERED),
        (403, "content_policy_violation", "no", Kind.FILTERED),
        (403, "", "<!DOCTYPE html> <meta name=author> you have been blocked", Kind.FORBIDDEN),
        (403, "", "", Kind.FORBIDDEN),
        (400, "content_filter", "policy", Kind.FILTERED),
        (400, "DataInspectionFailed", "Input data may contain inappropriate content", Kind.FILTERED),
        (451, "", "blocked by moderation", Kind.FILTERED),
        (402, "", "", Kind.CREDIT),
        (429, "insufficient_quota", "pay", Kind.CREDIT),
        (400, "", "Your credit balance is too low to access the API", Kind.CREDIT),
        (404, "", "no model", Kind.MISSING),
        (413, "", "", Kind.TOO_LONG),
        (400, "context_length_exceeded", "", Kind.TOO_LONG),
        (500, "", "the request exceeds the available context length", Kind.TOO_LONG),
        (429, "rate_limit_exceeded", "Request too large for gpt-9 on tokens per min (TPM): Limit 30000, Requested 40961", Kind.TOO_LONG),
        (429, "", "tokens per minute: Limit 6000, Requested 7123, please try again", Kind.TOO_LONG),
        (429, "rate_limit_exceeded", "Rate limit reached on tokens per min: Limit 30000, Used 29000, Requested 2000", Kind.RETRY),
        (429, "", "You exceeded your current quota, please check your plan and billing details", Kind.RETRY),
        (429, "", "flagged as busy", Kind.RETRY),
        *((status, "", "", Kind.RETRY) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)),
        (400, "", "strange", Kind.REFUSED),
        (501, "", "not implemented", Kind.REFUSED),
        (308, "", "", Kind.REDIRECT),
    ],
)
def test_an_error_has_a_kind(status, code, message, kind):
    assert classify(ErrorAnswer(status, code, message=message)) is kind


@pytest.mark.parametrize(
    ("option", "message", "rejected"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) is supported.", True),
        ("temperature", "`temperature` and `top_p` cannot both be specified for this model. Please use only one.", True),
        ("top_p", "`temperature` and `top_p` cannot both be specified for this model. Please use only one.", True),
        ("top_k", "top_k: Extra inputs are not permitted", True),
        ("logprobs", "this model does not support the parameter logprobs.", True),
        ("stop", "Unsupported parameter: 'stop' is not supported with this model.", True),
        ("min_tokens", 'unknown field "min_tokens"', True),
        ("chat_template_kwargs", "Unrecognized request argument supplied: chat_template_kwargs", True),
        # An invalid value, or another option.
        ("temperature", "temperature must be at most 2", False),
        ("top_k", "top_k must be at least -1", False),
        ("top_p", "'temperature' is not supported", False),
        ("stop", "the engine will stop soon: unknown field", False),
        ("max_tokens", "max_tokens is too large", False),
    ],
)
def test_an_option_is_rejected_if_the_server_does_not_support_it(option, message, rejected):
    assert rejects_option(ErrorAnswer(400, message=message), option) is rejected


def test_an_option_with_a_value_without_effect_is_rejected_by_its_range_too():
    error = ErrorAnswer(400, message="Range of top_p should be (0.0, 1.0)")
    assert rejects_option(error, "top_p", neutral=True) and not rejects_option(error, "top_p")


def test_the_parameter_of_an_error_decides_alone():
    error = ErrorAnswer(400, "unsupported_parameter", "top_p", "'temperature' and 'top_p'")
    assert rejects_option(error, "top_p") and not rejects_option(error, "temperature")
