"""The chat client: its curl command, its table and its errors."""

import io
import json
import shlex

import pytest
from rich.console import Console

from cluster.errors import CappyError
from serving.client import ask, curl_command, print_answer


def test_the_curl_command_is_quoted_for_the_shell():
    body = {"model": "cappy", "messages": [{"role": "user", "content": "It's $HOME?"}]}
    words = shlex.split(curl_command("http://127.0.0.1:8000/v1/", body))
    assert words[2] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(words[-1]) == body


def test_an_answer_is_printed_with_the_returned_candidate_marked_and_text_is_not_parsed_as_markup():
    first = {"response": "[red]Paris\n[/red]", "score": 0.91, "decoding": "greedy", "tokens": 2, "logprob": -1.0, "chosen": True}
    second = {**first, "response": "", "score": None, "chosen": False}
    answer = {
        "choices": [],
        "cappy": {"candidates": [first, second], "sampled_tokens": 4, "latency": {"sampling_s": 1.5, "scoring_s": 0.1}},
    }
    out = io.StringIO()
    print_answer(answer, Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    assert any("*" in line and "0.910" in line and "[red]Paris [/red]" in line for line in lines)
    assert any("*" not in line and "(empty)" in line for line in lines)
    assert "sampled in 1.50 s" in lines[-1]


def test_an_unreachable_server_is_one_line_with_the_fix():
    with pytest.raises(CappyError, match=r"cannot be reached.*start a server"):
        ask("http://127.0.0.1:9", [{"role": "user", "content": "hi"}])
