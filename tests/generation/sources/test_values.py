from decimal import Decimal

import numpy as np
import pytest

from generation.sources.values import Cells, as_choices, as_text, as_texts, parse_cell, parse_cells


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("['apple', 'pear']", ["apple", "pear"]),
        ('["a", "b"]', ["a", "b"]),
        ("""["it's", 'x']""", ["it's", "x"]),
        ("('a', 'b')", ["a", "b"]),
        (str(np.array(["yes", "no"])), ["yes", "no"]),
        (str(np.array([f"word {n}" for n in range(30)])), [f"word {n}" for n in range(30)]),
        (repr(np.array(["yes", "no"], dtype=object)), ["yes", "no"]),
        (repr([np.str_("a")]), ["a"]),
        (repr({"text": np.array(["a b"], dtype=object), "answer_start": np.array([1])}), {"text": ["a b"], "answer_start": [1]}),
        ("['a', nan, None]", ["a", None, None]),
        ("[{'role': 'user', 'content': 'x'}]", [{"role": "user", "content": "x"}]),
        ("[]", []),
        ("[1, 2]", [1, 2]),
        (r"['a\d', 'b\n']", [r"a\d", "b\n"]),
        ("[Verse 1] la la", "[Verse 1] la la"),
        ("('yes')", "('yes')"),
        ("(yes)", "(yes)"),
        ("yes", "yes"),
    ],
)
def test_a_list_in_a_cell_is_parsed_and_a_text_is_left_as_it_is(cell, value):
    assert parse_cells(Cells(references=cell)) == {"references": value}


@pytest.mark.parametrize(
    "cell",
    [
        "[apple, pear]",
        "[1 2]",
        "['a' ... 'z']",
        "['a', ..., 'z']",
        "['it''s']",
        "['a' 'b', 'c']",
        "[b'a']",
        "[INST] x [/INST]",
        "[" * 999 + "]",
    ],
)
def test_a_cell_that_is_not_clearly_a_list_or_a_text_is_an_error(cell):
    with pytest.raises(ValueError, match=r"`references` is .*, which is not clearly a list or a text; write a JSON list"):
        parse_cell(cell, "references")


@pytest.mark.parametrize("cell", ["['a', 'b']", '["a"]', "['a' 'b']"])
def test_a_list_of_texts_in_an_answer_column_is_ambiguous(cell):
    with pytest.raises(ValueError, match="which can be a list of answers or one text; name the column `references` for a list"):
        parse_cells(Cells(output=cell))
    assert parse_cells(Cells(instruction=cell)) == {"instruction": cell}


def test_other_texts_in_an_answer_column_stay_texts():
    row = {"output": "[1, 2, 3]", "answer": '{"a": 1}', "response": "[x] y"}
    assert parse_cells(Cells(row)) == row


def test_turns_in_a_cell_are_parsed():
    assert parse_cells(Cells(prompt='[{"role": "user", "content": "x"}]')) == {"prompt": [{"role": "user", "content": "x"}]}
    assert parse_cells(Cells(prompt="[INST] x [/INST]")) == {"prompt": "[INST] x [/INST]"}


@pytest.mark.parametrize(
    ("value", "text"), [("a", "a"), (4, "4"), (0, "0"), (2.5, "2.5"), (Decimal("1.50"), "1.50"), (None, None), (np.nan, None)]
)
def test_a_number_becomes_text_and_a_missing_value_none(value, text):
    assert as_text(value, "answer") == text


@pytest.mark.parametrize("value", [True, {}, ["a"], b"a"])
def test_a_value_without_a_clear_text_is_an_error(value):
    with pytest.raises(ValueError, match=f"`answer` is a {type(value).__name__}; it must be text"):
        as_text(value, "answer")


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("a", ["a"]),
        (4, ["4"]),
        (["a", None, 3], ["a", "3"]),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),
        ({"text": [], "answer_start": []}, []),
        ([{"text": "a", "answer_start": 1}], ["a"]),
        ({"value": "a", "aliases": ["b"]}, ["a", "b"]),
        (None, None),
    ],
)
def test_answers_in_public_notations_become_a_list_of_texts(value, texts):
    assert as_texts(value, "answers") == texts


@pytest.mark.parametrize(
    ("value", "choices"),
    [("Yes ||| No", ["Yes", "No"]), (["Yes ||| No"], ["Yes", "No"]), ("Yes", ["Yes"]), (["a", "b"], ["a", "b"]), (None, None)],
)
def test_choices_in_one_text_are_split_at_the_separator_of_promptsource(value, choices):
    assert as_choices(value) == choices
