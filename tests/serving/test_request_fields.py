"""Fields of other servers' requests: each is supported, harmless, or refused; none is ignored unnoticed."""

from __future__ import annotations

import json
import warnings
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cluster.config import Config, ServingConfig
from serving import request_fields, scoring_api
from serving.backend import ApiError
from serving.completions_api import ChatRequest, TextRequest, parse_chat_request, parse_text_request
from serving.sampling_policy import select_decodings
from serving.structured_outputs import StructuredOutputs

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
SCORE = {"text_1": "a", "text_2": "b"}
RERANK = {"query": "q", "documents": ["a"]}


def parse(kind: str, fields: dict[str, Any]) -> Any:
    if kind == "chat":
        return parse_chat_request(json.dumps(CHAT | fields).encode(), "cappy")
    if kind == "text":
        return parse_text_request(json.dumps(TEXT | fields).encode(), "cappy")
    model, body = (scoring_api.ScoreRequest, SCORE) if kind == "score" else (scoring_api.RerankRequest, RERANK)
    return scoring_api.parse_scoring_request(model, json.dumps(body | fields).encode(), ServingConfig())


UNSUPPORTED = {
    "guided_choice": ["a"],
    "guided_json": {},
    "guided_regex": "a",
    "regex": "a",
    "ebnf": "a",
    "bad_words": ["a"],
    "ignore_eos": True,
    "truncate_prompt_tokens": 5,
    "chat_template_kwargs": {"enable_thinking": False},
    "continue_final_message": True,
    "add_generation_prompt": False,
    "extra_body": {"top_k": 1},
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "thinking": {"type": "enabled"},
    "cache_salt": "x",
    "allowed_token_ids": [1],
    "typical_p": 0.5,
    "mirostat": 2,
    "lora_path": "x",
    "options": {"num_ctx": 5},
    "priority": 1,
    "a field of next year": 1,
}


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize(("name", "value"), UNSUPPORTED.items())
def test_a_field_that_would_change_the_answer_is_refused_by_name(kind, name, value):
    with pytest.raises(ApiError) as caught:
        parse(kind, {name: value})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "unsupported_parameter")
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["chat", "text", "score", "rerank"])
@pytest.mark.parametrize("fields", [{"user": "me", "metadata": {"a": 1}, "tags": ["x"]}, {"unknown": None, "extra_body": None}])
def test_a_field_that_changes_no_answer_and_null_are_accepted(kind, fields):
    assert parse(kind, fields).model in ("cappy", "cappy-scorer")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("rerank", {"top_k": 1}),
        ("rerank", {"score_threshold": 0.5}),
        ("rerank", {"truncation_side": "left"}),
        ("score", {"truncate_prompt_tokens": 9}),
        ("score", {"instruction": "be strict"}),
        ("score", {"use_activation": True}),
        ("score", {"softmax": True}),
    ],
)
def test_a_field_that_would_change_a_score_is_refused(kind, fields):
    with pytest.raises(ApiError, match="is not supported; leave") as caught:
        parse(kind, fields)
    assert caught.value.code == "unsupported_parameter"


def vllm_models() -> dict[str, tuple[type[BaseModel], set[str], request_fields.Harmless]]:
    """Return by kind of request: vLLM's model, the fields that this server has, and the fields that it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that vLLM imports
        from vllm.entrypoints.openai.chat_completion import protocol as chat
        from vllm.entrypoints.openai.completion import protocol as text
        from vllm.entrypoints.pooling.scoring import protocol as scoring

    ours = {
        "chat": (chat.ChatCompletionRequest, ChatRequest),
        "text": (text.CompletionRequest, TextRequest),
        "score": (scoring.ScoreTextRequest, scoring_api.ScoreRequest),
        "score of data": (scoring.ScoreDataRequest, scoring_api.ScoreRequest),
        "score of documents": (scoring.ScoreQueriesDocumentsRequest, scoring_api.ScoreRequest),
        "score of items": (scoring.ScoreQueriesItemsRequest, scoring_api.ScoreRequest),
        "rerank": (scoring.RerankRequest, scoring_api.RerankRequest),
    }
    found = {}
    for kind, (theirs, mine) in ours.items():
        names = set()
        for name, field in mine.model_fields.items():
            alias = field.validation_alias
            names |= set(getattr(alias, "choices", [alias or name]))
        found[kind] = (theirs, names, getattr(mine, "unsupported", request_fields.SCORING))
    return found


@pytest.mark.slow
def test_every_field_of_the_installed_vllms_requests_is_supported_harmless_or_refused():
    for kind, (theirs, supported, unsupported) in vllm_models().items():
        unnoticed = theirs.model_fields.keys() - supported - request_fields.IGNORED - unsupported.keys()
        assert not unnoticed, f"{kind}: vLLM's request has the new fields {sorted(unnoticed)}; add each to request_fields or support it"


@pytest.mark.slow
def test_the_defaults_of_vllms_requests_are_accepted():
    """A client that sends every field with vLLM's own default must get an answer: the field then changes nothing."""
    for kind, (theirs, supported, _) in vllm_models().items():
        defaults = {name: field.default for name, field in theirs.model_fields.items() if field.default is not PydanticUndefined}
        plain = {name: value for name, value in defaults.items() if name not in supported and not is_dataclass(value)}
        parse(kind.split()[0], plain)


@pytest.mark.slow
def test_the_constraints_have_the_names_of_vllms():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.sampling_params import StructuredOutputsParams

    theirs = {field.name for field in fields(StructuredOutputsParams) if field.init}
    ours = {field.alias or name for name, field in StructuredOutputs.model_fields.items()}
    assert ours <= theirs
    # Refused, with their reasons: tags for tool calls, and options of JSON that few schemas need.
    assert theirs - ours == {"structural_tag", "disable_additional_properties", "whitespace_pattern"}
    assert all(field.default is not MISSING for field in fields(StructuredOutputsParams) if field.init)


@pytest.mark.parametrize(
    ("fields", "decoding"),
    [
        ({"min_tokens": 5}, {"min_tokens": 5, "max_tokens": 64}),
        ({"min_tokens": 0}, {"min_tokens": 0}),
        ({"max_completion_tokens": 7, "min_tokens": 7}, {"min_tokens": 7, "max_tokens": 7}),
        ({"stop_token_ids": [2, 0]}, {"stop_token_ids": (2, 0)}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"structured_outputs": {"choice": ["yes", "no"]}, "min_tokens": 0}),
        ({"structured_outputs": {"json": {"type": "object"}}}, {"structured_outputs": {"json": {"type": "object"}}}),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_lengths_and_constraints_reach_every_decoding(kind, fields, decoding):
    for each in select_decodings(parse(kind, fields), Config()):
        assert {name: getattr(each, name, None) for name in decoding} == decoding


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens=9 is above max_tokens=8"),
        ({"min_tokens": 65}, "min_tokens", "min_tokens=65 is above the 64 tokens of decoding"),
        ({"min_tokens": 1, "structured_outputs": {"regex": "a"}}, "min_tokens", "exclude each other"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
        ({"stop_token_ids": "2"}, "stop_token_ids", "valid list"),
        ({"structured_outputs": {}}, "structured_outputs", "give exactly one of json, regex, choice, grammar, json_object; none"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice was given"),
        (
            {"structured_outputs": {"backend": "x"}},
            "structured_outputs.backend",
            "not a field of `structured_outputs`; its fields are json",
        ),
        ({"structured_outputs": {"grammar": "x" * 20_000}}, "structured_outputs", "above the limit of 16,384"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats", "False"),
    ],
)
def test_a_bad_constraint_is_a_400_naming_field_and_value(fields, param, message):
    with pytest.raises(ApiError) as caught:
        select_decodings(parse("chat", fields), Config())
    assert (caught.value.status, caught.value.param) == (400, param) and message in str(caught.value)


@pytest.mark.parametrize("name", ["stop_token_ids", "structured_outputs"])
def test_an_engine_without_a_constraint_refuses_it(name):
    config = Config(sampler={"model": "t5", "engine": {"kind": "transformers"}, "prompt": {"form": "raw"}})
    value = {"stop_token_ids": [1], "structured_outputs": {"json_object": True}}[name]
    with pytest.raises(ApiError, match="does not run on vLLM") as caught:
        select_decodings(parse("chat", {name: value, "temperature": 1}), config)
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_several_prompts_share_the_limits_of_one_request():
    prompts = {"prompt": ["a", "b", "c"], "cappy": {"candidates": 8}}
    assert sum(each.n for each in select_decodings(parse("text", prompts), Config(), prompts=3)) == 8
    with pytest.raises(ApiError, match="3 prompts with 8 candidates each are above this server's limit of 20 candidates"):
        select_decodings(parse("text", prompts), Config(serving=ServingConfig(max_candidates=20)), prompts=3)
    with pytest.raises(ApiError, match="24 candidates may have 1,536 tokens"):
        select_decodings(parse("text", prompts), Config(serving=ServingConfig(max_sampled_tokens=1000)), prompts=3)
