import json

import httpx
import pytest

from generation.engines.endpoint_answers import Choice, cut_at_stop, read_choices, read_usage


def answer(*choices, **fields):
    return httpx.Response(200, content=json.dumps({"choices": list(choices), **fields}))


def chat(content, **fields):
    return {"index": 0, "message": {"role": "assistant", "content": content, **fields}, "finish_reason": "stop"}


def read(*choices, **fields):
    return read_choices(answer(*choices, **fields))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("red", "red"),
        (None, ""),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "fox"}], "a fox"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "fox"}], "fox"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "fox"}], "fox"),
        ([{"text": "hm", "thought": True}, {"text": "fox"}], "fox"),
        (["a ", "fox"], "a fox"),
        ([], ""),
        ({"type": "text", "text": "fox"}, "fox"),
        ({"type": "text", "text": {"value": "fox"}}, "fox"),
        ({"parts": [{"text": "a "}, {"text": "fox"}]}, "a fox"),
    ],
)
def test_the_text_parts_of_a_content_are_joined(content, text):
    (choice,) = read(chat(content))
    assert choice.text == text


@pytest.mark.parametrize("content", [{"answer": 4}, 4, True, [["a"], 3], {"type": "text"}])
def test_a_content_without_text_does_not_become_its_python_text(content):
    with pytest.raises(ValueError, match="does not follow the OpenAI API: TypeError content of type"):
        read(chat(content))


@pytest.mark.parametrize(
    ("fields", "without_text"),
    [
        ({"reasoning_content": "hm"}, "reasoning_content"),
        ({"reasoning": "hm"}, "reasoning"),
        ({"tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"function_call": {"name": "f"}, "reasoning_content": "hm"}, "reasoning_content, function_call"),
        ({"tool_calls": None, "reasoning_content": ""}, ""),
    ],
)
def test_a_choice_without_text_names_its_other_fields(fields, without_text):
    (choice,) = read(chat(None, **fields))
    assert (choice.text, choice.without_text) == ("", without_text)
    (choice,) = read(chat("red", **fields))
    assert (choice.text, choice.without_text) == ("red", "")


@pytest.mark.parametrize(
    ("choice", "end"),
    [
        (chat("half \ud83d"), "filtered"),
        (chat(None, refusal="I will not"), "filtered"),
        (chat([{"type": "refusal", "refusal": "I will not"}]), "filtered"),
        ({**chat("half"), "error": {"code": 502, "message": "provider failed"}}, "failed"),
        ({**chat("half"), "finish_reason": "model_length"}, "length"),
        (chat("emoji \ud83e\udd8a"), "stop"),
    ],
)
def test_a_choice_has_its_end(choice, end):
    assert [each.end for each in read(choice)] == [end]


@pytest.mark.parametrize(
    ("values", "logprob"),
    [
        ([-0.5, -1.0], -1.5),
        ([0.0, 1e-6], pytest.approx(0, abs=1e-5)),
        ([-0.5, None], None),
        ([-0.5, float("-inf")], None),
        ([-0.5, float("nan")], None),
        ([-0.5, float("inf")], None),
        ([-0.5, -9999.0], None),
        ([-0.5, "low"], None),
        ([-0.5, 12.0], None),
    ],
)
@pytest.mark.parametrize("form", ["chat", "raw"])
def test_a_log_probability_that_is_null_or_not_finite_is_null(form, values, logprob):
    if form == "chat":
        choice = {**chat("red"), "logprobs": {"content": [{"token": "x", "logprob": value} for value in values]}}
    else:
        choice = {"text": "red", "finish_reason": "stop", "logprobs": {"token_logprobs": values}}
    (found,) = read(choice)
    assert (found.logprob, found.tokens) == (logprob, 2)


@pytest.mark.parametrize("logprobs", [None, {}, [], "none", {"content": None}, {"content": []}, {"content": ["x"]}])
def test_log_probabilities_of_another_layout_are_null(logprobs):
    (choice,) = read({**chat("red"), "logprobs": logprobs})
    assert choice.logprob is None


@pytest.mark.parametrize(
    ("indexes", "texts"),
    [((1, 0), ["second", "first"]), ((None, None), ["first", "second"]), ((None, 0), ["first", "second"]), ((0, 0), ["first", "second"])],
)
def test_choices_without_an_index_are_taken_in_order(indexes, texts):
    found = read({**chat("first"), "index": indexes[0]}, {**chat("second"), "index": indexes[1]})
    assert [choice.text for choice in found] == texts


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": -1, "completion_tokens": 3},
        {"prompt_tokens": float("nan"), "completion_tokens": 3},
        {"prompt_tokens": float("inf"), "completion_tokens": 3},
        {"prompt_tokens": None, "completion_tokens": 3},
    ],
)
def test_a_usage_without_counts_is_not_reported(usage):
    assert read_usage(answer(chat("red fox"), usage=usage)) is None
    assert [choice.tokens for choice in read(chat("red fox"), usage=usage)] == [2]


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"choices": null}', b'{"choices": [null]}', b"[" * 100_000, b"\xff", b"<html>"])
def test_an_answer_that_is_malformed_is_a_value_error(body):
    with pytest.raises(ValueError, match="does not follow the OpenAI API"):
        read_choices(httpx.Response(200, content=body))


def test_a_text_is_cut_at_the_first_stop_string_and_loses_its_log_probability():
    choice = Choice("red\nfox. end", "length", -1.5, 5)
    assert cut_at_stop(choice, (".", "\n")) == Choice("red", "stop", None, 5)
    assert cut_at_stop(choice, ("!",)) == cut_at_stop(choice, ()) == choice
