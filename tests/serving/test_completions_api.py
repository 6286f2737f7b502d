import json

import pytest

from cluster.config import GREEDY, Config, DecodingConfig, SamplerConfig, ServingConfig
from generation.engines.contract import Candidate
from serving import completions_api, responses
from serving.backend import ApiError
from serving.completions_api import ChatRequest, build_messages, parse_chat_request
from serving.responses import distinct_responses, rank_candidates, select_choices
from serving.sampling_policy import select_decodings

USER = {"role": "user", "content": "hi"}


def body(**fields):
    return {"model": "cappy", "messages": [USER], **fields}


def request(**fields) -> ChatRequest:
    return parse_chat_request(json.dumps(body(**fields)).encode())


def candidate(response: str, tokens: int = 3) -> Candidate:
    return Candidate(response=response, decoding="sample", tokens=tokens, finish_reason="stop", logprob=-1.0)


def text(**fields):
    return completions_api.parse_text_request(json.dumps({"model": "cappy", **fields}).encode())


def pool(fields=None, config=None):
    return [(decoding.name, decoding.n) for decoding in select_decodings(request(**(fields or {})), config or Config())]


def test_the_pool_is_greedy_first_then_the_sampling_decodings_in_turn():
    assert pool() == [("greedy", 1), ("sample", 2), ("temperature", 2), ("top-k", 2), ("top-p", 1)]
    assert pool({"cappy": {"candidates": 1}}) == [("greedy", 1)]
    assert pool({"cappy": {"candidates": 3}}) == [("greedy", 1), ("sample", 1), ("temperature", 1)]
    assert pool({"cappy": {"candidates": 42}}) == [("greedy", 1), ("sample", 11), ("temperature", 10), ("top-k", 10), ("top-p", 10)]


@pytest.mark.parametrize("candidates", [1, 2, 5, 17, 64])
def test_the_pool_has_as_many_candidates_as_asked(candidates):
    assert sum(n for _, n in pool({"cappy": {"candidates": candidates}})) == candidates


def test_n_above_the_default_pool_enlarges_it():
    assert sum(n for _, n in pool({"n": 20})) == 20


def test_a_temperature_in_the_request_replaces_the_decodings():
    (decoding,) = select_decodings(request(temperature=0.5, top_p=0.9, cappy={"candidates": 6}), Config())
    assert (decoding.n, decoding.temperature, decoding.top_p, decoding.top_k) == (6, 0.5, 0.9, None)
    (decoding,) = select_decodings(request(temperature=0), Config())
    assert (decoding.n, decoding.temperature) == (1, 0.0)


def test_a_request_names_the_decodings_it_is_drawn_with():
    named = {"decodings": ["top-p", "sample", "greedy"]}
    assert pool({"cappy": {**named, "candidates": 6}}) == [("greedy", 1), ("sample", 3), ("top-p", 2)]
    assert pool({"cappy": {"decodings": ["top-k"]}}) == [("top-k", 8)]
    assert pool({"cappy": {"decodings": ["greedy"]}}) == pool({"cappy": {"decodings": ["greedy", "greedy"]}}) == [("greedy", 1)]


def test_a_sampler_of_greedy_alone_fills_its_pool_at_temperature_1():
    config = Config(sampler=SamplerConfig(decodings=(GREEDY,)))
    assert pool({"cappy": {"candidates": 4}}, config) == [("greedy", 1), ("sample", 3)]


def test_a_pool_that_nothing_scores_is_as_large_as_what_is_returned_unless_more_is_asked_for():
    def size(**fields):
        return sum(decoding.n for decoding in select_decodings(request(**fields), Config(), scored=False))

    assert (size(), size(n=3), size(n=3, cappy={"candidates": 5})) == (1, 3, 5)


def test_a_prompt_is_a_text_or_a_list_of_one_and_the_instruction_is_all_of_it():
    for prompt in (" Say hi:\n", [" Say hi:\n"]):
        parsed = text(prompt=prompt, max_tokens=5, best_of=1, echo=False, suffix=None, logprobs=None)
        assert completions_api.build_prompt(parsed, "Be brief.") == " Say hi:\n" and parsed.instruction == "Say hi:"
        assert {decoding.max_tokens for decoding in select_decodings(parsed, Config())} == {5}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": []}, "prompt", "0 prompts in one request"),
        ({"prompt": ["a", "b"]}, "prompt", "2 prompts in one request are not supported; send one request per prompt"),
        ({"prompt": [[1, 2]]}, "prompt", "token ids are not supported; send the prompt as a text"),
        ({"prompt": " \n"}, "prompt", "prompt is empty"),
        ({"prompt": "a", "echo": True}, "echo", "echo=true is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix="),
        ({"prompt": "a", "logprobs": 0}, "logprobs", "logprobs=0"),
        ({"prompt": "a", "best_of": 4}, "best_of", "best_of=4"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens=0"),
    ],
)
def test_a_bad_field_of_a_text_completion_is_a_400_naming_field_and_value(fields, param, says):
    with pytest.raises(ApiError) as caught:
        text(**fields)
    error = caught.value.body["error"]
    assert (caught.value.status, error["param"]) == (400, param) and says in error["message"]


def test_length_and_stop_strings_of_the_request_reach_every_decoding():
    own = (DecodingConfig(name="a", min_tokens=5, stop=("\n",)), DecodingConfig(name="b"))
    config = Config(sampler=SamplerConfig(decodings=own))
    decodings = select_decodings(request(max_tokens=9, max_completion_tokens=3, stop="END", n=2), config)
    assert [(each.max_tokens, each.min_tokens, each.stop) for each in decodings] == [(3, 3, ("\n", "END")), (3, 0, ("END",))]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
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
        (
            {"messages": [USER, {"role": "assistant", "content": "x"}]},
            "messages",
            "must end with the instruction, a message of role='user'; the last message has role='assistant'",
        ),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages", "empty"),
    ],
)
def test_a_bad_field_is_a_400_naming_field_and_value(fields, param, says):
    with pytest.raises(ApiError) as caught:
        select_decodings(request(**fields), Config())
    error = caught.value.body["error"]
    assert caught.value.status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{", "the body is not valid JSON: EOF"),
        (b"[]", "is a JSON list"),
        (b'{"model": "cappy", "temperature": NaN}', "the body is not valid JSON: NaN is not a JSON number"),
        (b'{"messages": []}', "model is missing"),
    ],
)
def test_a_body_that_is_no_request_is_a_400(raw, says):
    with pytest.raises(ApiError, match=says) as caught:
        parse_chat_request(raw)
    assert caught.value.status == 400


def test_fields_that_change_no_answer_pass_and_null_means_absent():
    parsed = request(user="me", metadata={"a": 1}, stream=False, tools=[], n=None, stop=None, cappy=None, frequency_penalty=0)
    assert (parsed.n, parsed.cappy.candidates) == (1, None)


def test_text_parts_are_one_text_and_the_scorer_reads_the_last_turn():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
    parsed = request(messages=[USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": parts}])
    assert parsed.instruction == "one\ntwo"
    assert [turn["content"] for turn in build_messages(parsed, None)] == ["hi", "yes", "one\ntwo"]


def test_the_servers_system_text_stands_in_only_where_the_client_has_none():
    assert build_messages(request(), "Be brief.")[0] == {"role": "system", "content": "Be brief."}
    own = request(messages=[{"role": "developer", "content": "Rhyme."}, USER])
    assert [turn["role"] for turn in build_messages(own, "Be brief.")] == ["system", "user"]
    assert build_messages(own, "Be brief.")[0]["content"] == "Rhyme."


def test_choices_are_distinct_and_best_first_and_ties_go_to_the_first():
    candidates = [candidate(text) for text in ("b", "a", "b", "c", "d")]
    scores = [0.2, 0.9, 0.2, 0.2, 0.1]
    assert distinct_responses(candidates) == ["b", "a", "c", "d"]
    assert select_choices(candidates, scores, 3) == [1, 0, 3]
    assert rank_candidates(candidates, scores) == [1, 0, 2, 3, 4]


def test_duplicates_come_again_only_when_nothing_else_is_left():
    candidates = [candidate(text) for text in ("a", "a", "b")]
    assert select_choices(candidates, [0.5, 0.5, 0.1], 3) == [0, 2, 1]


def test_empty_and_scoreless_responses_rank_last():
    candidates = [candidate(""), candidate("a"), candidate("b")]
    assert select_choices(candidates, [0.9, 0.1, 0.2], 3) == [2, 1, 0]
    assert select_choices(candidates, [0.9, float("nan"), 0.2], 1) == [2]


def test_the_blend_adds_the_mean_log_probability_and_is_left_where_one_is_unknown():
    candidates = [{**candidate("a", 4), "logprob": -8.0}, {**candidate("b", 2), "logprob": -1.0}, {**candidate("", 0), "logprob": 0.0}]
    assert responses.ranking_scores(candidates, [0.9, 0.5, 0.1], 0.5) == pytest.approx([-0.1, 0.25, 0.1])
    assert responses.ranking_scores(candidates, [0.9, 0.5, 0.1], None) == [0.9, 0.5, 0.1]
    unknown = [*candidates, {**candidate("c"), "logprob": None}]
    assert responses.ranking_scores(unknown, [0.9, 0.5, 0.1, 0.2], 0.5) == [0.9, 0.5, 0.1, 0.2]


def test_usage_counts_the_returned_choices_and_cappy_all_candidates():
    candidates = [candidate("a", 5), candidate("b", 7), candidate("", 1)]
    answer = responses.build_completion(
        request(n=2, cappy={"return_candidates": True}),
        candidates,
        [0.1, 0.2, float("nan")],
        [0.1, 0.2, float("nan")],
        prompt_tokens=10,
        scorer="s",
        latency=responses.Latency(sampling_s=1, scoring_s=0.1),
        completion_id="1",
        created=1,
    )
    assert [choice.message.content for choice in answer.choices] == ["b", "a"]
    assert answer.usage.model_dump() == {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}
    assert answer.cappy is not None
    assert answer.cappy.sampled_tokens == 13
    assert [(each.response, each.score, each.chosen) for each in answer.cappy.candidates] == [
        ("b", 0.2, True),
        ("a", 0.1, True),
        ("", None, False),
    ]


def test_defaults_fit_each_other():
    assert ServingConfig().candidates <= ServingConfig().max_candidates
