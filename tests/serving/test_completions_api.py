import json

import pytest

from cluster.config import Config
from serving import completions_api
from serving.backend import ApiError
from serving.completions_api import ChatRequest, parse_chat_request
from serving.messages import build_messages
from serving.sampling_policy import select_decodings

USER = {"role": "user", "content": "hi"}


def body(**fields):
    return {"model": "cappy", "messages": [USER], **fields}


def request(**fields) -> ChatRequest:
    return parse_chat_request(json.dumps(body(**fields)).encode())


def text(**fields):
    return completions_api.parse_text_request(json.dumps({"model": "cappy", **fields}).encode())


def test_a_prompt_is_a_text_or_a_list_of_one_and_the_whole_prompt_is_the_instruction():
    for prompt in (" Say hi:\n", [" Say hi:\n"]):
        parsed = text(prompt=prompt, max_tokens=5, best_of=1, echo=False, suffix=None, logprobs=None)
        assert completions_api.build_prompt(parsed, "Be brief.") == " Say hi:\n" and parsed.instruction == "Say hi:"
        assert {decoding.max_tokens for decoding in select_decodings(parsed, Config())} == {5}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": None}, "prompt", "valid list"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ["a", " "]}, "prompt", "prompt 1 is empty"),
        ({"prompt": ["a", "b"], "stream": True, "cappy": {"progress": True}}, "cappy.progress", "one prompt"),
        ({"prompt": [[1, 2]]}, "prompt", "token ids are not supported; send the prompt as a text"),
        ({"prompt": " \n"}, "prompt", "prompt is empty"),
        ({"prompt": "a", "echo": True}, "echo", "echo=true is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix="),
        ({"prompt": "a", "logprobs": 0}, "logprobs", "logprobs=0"),
        ({"prompt": "a", "best_of": 4}, "best_of", "best_of=4"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens=0"),
    ],
)
def test_a_bad_field_of_a_text_completion_is_a_400_naming_field_and_value(fields, param, message):
    with pytest.raises(ApiError) as caught:
        text(**fields)
    error = caught.value.body["error"]
    assert (caught.value.status, error["param"]) == (400, param) and message in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 0}, "n", "n=0"),
        ({"n": "2"}, "n", 'n="2"'),
        ({"n": 65}, "n", "n=65 is above this server's limit of 64 candidates (serving.max_candidates); request fewer"),
        ({"n": 4, "cappy": {"candidates": 3}}, "n", "n=4 is above cappy.candidates=3; request at least n candidates"),
        ({"cappy": {"candidates": 65}}, "cappy.candidates", "limit of 64 (serving.max_candidates); request fewer"),
        (
            {"cappy": {"candidate": 5}},
            "cappy.candidate",
            "is not a field of `cappy`; its fields are candidates, decodings, return_candidates",
        ),
        ({"temperature": 0, "n": 2}, "temperature", "same candidate"),
        ({"cappy": {"decodings": ["beam"]}}, "cappy.decodings", '"beam" is not a decoding of this server; use greedy, sample'),
        ({"cappy": {"decodings": ["greedy"], "candidates": 2}}, "cappy.decodings", "greedy decodings (1), which give one candidate each"),
        ({"n": 2, "cappy": {"decodings": ["greedy"]}}, "cappy.decodings", "greedy decodings (1), which give one candidate each"),
        (
            {"top_p": 0.5, "cappy": {"decodings": ["sample"]}},
            "cappy.decodings",
            "top_p=0.5 and cappy.decodings both set how to sample; send only one of them",
        ),
        ({"cappy": {"decodings": []}}, "cappy.decodings", "at least 1 item"),
        ({"temperature": 3}, "temperature", "temperature=3"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"max_tokens": 2048}, "max_tokens", "above the 2047 tokens of the model's context; request fewer"),
        (
            {"max_tokens": 1100, "n": 64},
            "max_tokens",
            "64 candidates may have 70,400 tokens together, above this server's limit of 65,536",
        ),
        ({"messages": [USER] * 2049}, "messages", "at most 2048 items"),
        ({"cappy": {"x" * 5000: 1}}, f"cappy.{'x' * 80}", "x is not a field of `cappy`"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options",
            "stream_options requires stream=true; set it or leave stream_options out",
        ),
        ({"cappy": {"progress": True}}, "cappy.progress", "cappy.progress requires stream=true; set it or leave cappy.progress out"),
        ({"cappy": {"min_gain": -0.1}}, "cappy.min_gain", "cappy.min_gain=-0.1"),
        ({"stream": "yes"}, "stream", 'stream="yes": Input should be a valid boolean'),
        ({"tools": [{"type": "function"}]}, "tools", "tools="),
        ({"logprobs": True}, "logprobs", "logprobs=true"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", 'role="tool"'),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "send a text or a list of text parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", '"image_url" is not supported'),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages", "empty"),
    ],
)
def test_a_bad_field_is_a_400_naming_field_and_value(fields, param, message):
    with pytest.raises(ApiError) as caught:
        select_decodings(request(**fields), Config())
    error = caught.value.body["error"]
    assert caught.value.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "the body is not valid JSON: EOF"),
        (b"[]", "is a JSON list"),
        (b'{"model": "cappy", "temperature": NaN}', "the body is not valid JSON: NaN is not a JSON number"),
        (b'{"messages": []}', "model is missing"),
    ],
)
def test_a_body_that_is_not_a_request_is_a_400(raw, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse_chat_request(raw)
    assert caught.value.status == 400


def test_fields_without_effect_are_ignored_and_null_means_absent():
    parsed = request(user="me", metadata={"a": 1}, stream=False, tools=[], n=None, stop=None, cappy=None, frequency_penalty=0)
    assert (parsed.n, parsed.cappy.candidates) == (1, None)


def test_text_parts_are_joined_and_the_scorer_reads_the_last_message():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
    parsed = request(messages=[USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": parts}])
    assert parsed.instruction == "one\ntwo"
    assert [turn["content"] for turn in build_messages(parsed.messages, None)] == ["hi", "yes", "one\ntwo "]


def test_the_servers_system_message_is_used_only_if_the_client_has_none():
    assert build_messages(request().messages, "Be brief.")[0] == {"role": "system", "content": "Be brief."}
    own = request(messages=[{"role": "developer", "content": "Rhyme."}, USER])
    assert [turn["role"] for turn in build_messages(own.messages, "Be brief.")] == ["system", "user"]
    assert build_messages(own.messages, "Be brief.")[0]["content"] == "Rhyme."
