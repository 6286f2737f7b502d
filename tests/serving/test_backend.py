import pickle

import pytest

from serving.backend import ApiError, merge_scored


def test_an_api_error_keeps_all_its_fields_in_a_pickle():
    error = pickle.loads(pickle.dumps(ApiError("no", 429, "n", "rate_limit_exceeded", 12.3)))
    assert (str(error), error.status, error.param, error.code, error.retry_s) == ("no", 429, "n", "rate_limit_exceeded", 12.3)


@pytest.mark.parametrize(
    ("status", "retry_s", "headers", "kind"),
    [
        (400, None, {}, "invalid_request_error"),
        (401, None, {"WWW-Authenticate": "Bearer"}, "invalid_request_error"),
        (413, None, {"Connection": "close"}, "invalid_request_error"),
        (429, 1.2, {"Retry-After": "2"}, "invalid_request_error"),
        (503, None, {"Retry-After": "1"}, "server_error"),
    ],
)
def test_the_status_decides_headers_and_error_type(status, retry_s, headers, kind):
    error = ApiError("no", status, "n", "c", retry_s)
    assert error.headers == headers
    assert error.body == {"error": {"message": "no", "type": kind, "param": "n", "code": "c"}}


def test_merged_scores_are_in_order_with_the_last_parts_version():
    first = {"scores": [0.1, 0.2], "tokens": [3, 4], "version": "a"}
    assert merge_scored([first, {"scores": [0.3], "tokens": [5], "version": "b", "logprob_weight": 0.5}]) == {
        "scores": [0.1, 0.2, 0.3],
        "tokens": [3, 4, 5],
        "version": "b",
        "logprob_weight": 0.5,
    }
