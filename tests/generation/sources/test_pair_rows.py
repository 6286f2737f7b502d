from __future__ import annotations

import json

import pytest

from generation.sources.pair_rows import FIND, PUBLISHED, Columns, Pair, convert_row
from generation.sources.row import DeadLetter


def pairs(row, columns=FIND):
    """Return instruction, response and own columns of each pair of a row."""
    found = list(convert_row("rows:1", row, columns))
    assert all(isinstance(each, Pair) for each in found), found
    return [(each.instruction, each.response, json.loads(each.own or "{}")) for each in found]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "response": "a", "n": 1}, [("q", "a", {"n": 1})]),
        ({"prompt": "q", "completion": "a"}, [("q", "a", {})]),
        ({"question": "q", "answer": "a", "id": "7"}, [("q", "a", {"id": "7"})]),
        ({"input": "q", "output": 4}, [("q", "4", {"output": 4})]),
        ({"instruction": "q", "references": ["r"], "response": ""}, [("q", "", {"references": ["r"]})]),
        # A context is a part of the instruction, and all columns stay.
        ({"instruction": "q", "input": "c", "output": "a"}, [("q\n\nc", "a", {"instruction": "q", "input": "c"})]),
        ({"question": "q", "answers": {"text": ["a", "b"]}}, [("q", each, {"answers": {"text": ["a", "b"]}}) for each in "ab"]),
        ({"inputs_pretokenized": "q", "targets_pretokenized": "a"}, [("q", "a", {})]),
        ({"query": "q", "documents": ["a", "b"], "scores": [1, 0], "n": 1}, [("q", "a", {"n": 1}), ("q", "b", {"n": 1})]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("q", "a", {"preference": "chosen"}), ("q", "b", {"preference": "rejected"})]),
        (
            {
                "instruction": "q",
                "id": "7",
                "response": "b",
                "candidates": [{"response": "a", "label": 1.0}, {"response": "b", "label": 0.5}],
            },
            [("q", "a", {"id": "7", "label": 1.0}), ("q", "b", {"id": "7", "label": 0.5})],
        ),
        ({"instruction": "q", "response": "b", "candidates": []}, [("q", "b", {"candidates": []})]),
    ],
)
def test_a_row_gives_its_pairs_and_keeps_its_other_columns(row, expected):
    assert pairs(row) == expected


def turns(*texts, role="role", content="content"):
    roles = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: roles[number % 2], content: text} for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": turns("q", "a")}, [("q", "a")]),
        ({"conversations": turns("q", "a", "q2", "a2", role="from", content="value")}, [("User: q\n\nAssistant: a\n\nUser: q2", "a2")]),
        ({"messages": turns("q", "a", "thanks")}, [("q", "a")]),
        ({"prompt": turns("q"), "completion": [{"role": "assistant", "content": "a"}]}, [("q", "a")]),
        ({"prompt": turns("q"), "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]}, [("q", "a"), ("q", "b")]),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "b")}, [("q", "a"), ("q", "b")]),
    ],
)
def test_the_last_assistant_turn_of_a_chat_is_the_response(row, expected):
    assert [pair[:2] for pair in pairs(row)] == expected


def test_named_and_published_columns_are_scored_as_they_are():
    row = {"task": "q", "reply": "a", "input": "c", "prompt": "other", "completion": "x"}
    assert pairs(row, Columns("task", "reply")) == [("q", "a", {"input": "c", "prompt": "other", "completion": "x"})]
    assert pairs(row, Columns(response="reply"))[0][:2] == ("other", "a")
    published = {"instruction": "q\n\nc", "input": "c", "response": "a"}
    assert pairs(published, PUBLISHED) == [("q\n\nc", "a", {"input": "c"})]


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"text": "q"}, FIND, "the row has no columns of a pair; it has text; give instruction/response, prompt/completion, "),
        ({"prompt": "q", "completion": None}, FIND, "`completion` is missing"),
        ({"prompt": None, "completion": "a"}, FIND, "`prompt` is missing"),
        ({"question": "q", "answers": []}, FIND, "`answers` is empty"),
        ({"prompt": " ", "completion": "a"}, FIND, "the instruction is empty"),
        ({"prompt": "q", "completion": "\ud800"}, FIND, "the response holds a lone surrogate"),
        ({"messages": turns("q")}, FIND, "`messages` has no assistant turn"),
        ({"prompt": "q", "completion": {"a": 1}}, FIND, "`completion` is an object with a"),
        ({"a": "q"}, Columns("b"), "--prompt=b: the row has no such column; it has a"),
        ({"a": "q"}, Columns("a", "c"), "--response=c: the row has no such column; it has a"),
        ({"a": "q"}, Columns(response="a"), "no column has the prompt; name one with --prompt; it has a"),
        ({"a": "q"}, Columns("a"), "no column has the response; name one with --response; it has a"),
        ({"prompt": "q", "chosen": ["a"], "rejected": "b"}, FIND, "`chosen` must be a list of turns"),
        (["q", "a"], FIND, "the row is a list; it must be an object with a prompt and a response"),
    ],
)
def test_a_row_without_a_pair_is_a_dead_letter_with_the_reason(row, columns, reason):
    (letter,) = convert_row("rows:3", row, columns)
    assert isinstance(letter, DeadLetter)
    assert letter.where == "rows:3" and letter.stage == "read" and letter.reason.startswith(reason)


def test_the_id_is_a_function_of_the_row():
    one, same, other = (next(convert_row("x", {"prompt": "q", "completion": "a", "n": n})) for n in (1, 1, 2))
    assert one.id == same.id != other.id and len(one.id) == 32
