"""The messages of a chat request: the conversation for the LLM, and the text that the scorer reads."""

import json

import pytest

from cluster.config import Config, ServingConfig
from serving.backend import ApiError
from serving.completions_api import build_prompt, parse_chat_request
from serving.sampling_policy import scorer_instruction

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "Rhyme."}


def request(*messages):
    return parse_chat_request(json.dumps({"model": "cappy", "messages": messages}).encode())


@pytest.mark.parametrize(
    ("messages", "prompt", "instruction"),
    [
        ([USER, {"role": "assistant", "content": None}, USER], ["hi", "", "hi"], "hi"),
        ([USER, {"role": "assistant"}, USER], ["hi", "", "hi"], "hi"),
        ([USER, {"role": "assistant", "content": None, "refusal": "no", "tool_calls": []}, USER], ["hi", "", "hi"], "hi"),
        ([SYSTEM], ["Rhyme."], "Rhyme."),
        ([SYSTEM, USER, {"role": "assistant", "content": "Sure:"}], ["Rhyme.", "hi", "Sure:"], "hi"),
        ([USER, {"role": "user", "content": "  "}], ["hi", "  "], "hi"),
        ([{"role": "user", "content": "\n  code:\n\tx \n"}], ["\n  code:\n\tx \n"], "code:\n\tx"),
        ([{"role": "user", "content": ["a", {"type": "text", "text": " b ", "cache_control": {}}]}], ["a\n b "], "a\n b"),
    ],
)
def test_a_conversation_reaches_the_llm_unchanged_and_the_scorer_reads_its_last_user_message(messages, prompt, instruction):
    parsed = request(*messages)
    assert [turn["content"] for turn in build_prompt(parsed, None)] == prompt
    assert scorer_instruction(parsed, Config()) == instruction


def test_scorer_context_conversation_gives_the_scorer_all_messages():
    parsed = request(SYSTEM, USER, {"role": "assistant", "content": "Hello. "}, {"role": "user", "content": "Why?"})
    assert scorer_instruction(parsed, Config(serving=ServingConfig(scorer_context="conversation"))) == "Rhyme.\n\nhi\nHello.\n\nWhy?\n"


def test_fields_that_chat_templates_read_reach_the_llm():
    (first, second) = build_prompt(request({**USER, "name": "Ann"}, {"role": "assistant", "content": "x", "reasoning": "y"}), None)
    assert first == {"role": "user", "content": "hi", "name": "Ann"}
    assert second == {"role": "assistant", "content": "x", "reasoning_content": "y"}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "assistant", "content": "Wait.", "tool_calls": [{"id": "1", "type": "function"}]}, "tool_calls"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "audio"),
        ({"role": "user", "content": "x", "prefix": True}, "prefix"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "u"}}]}, "image_url"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "send a text or a list of text parts"),
        ({"role": "user", "content": [["x"]]}, '"list" is not supported'),
        ({"role": "tool", "content": "x"}, 'role="tool"'),
    ],
)
def test_a_part_of_a_message_that_would_be_dropped_is_refused(message, named):
    with pytest.raises(ApiError) as caught:
        request(message, USER)
    assert caught.value.status == 400 and named in str(caught.value) and caught.value.param.startswith("messages[0]")
