import json

import pytest

from generation.sources.row import Instruction, dead_letter, hash_text, hash_to_unit_interval, row_error

VALID = {"instruction": "Name a fox.", "references": ["red fox"]}


@pytest.mark.parametrize(
    "row",
    [
        VALID,
        {**VALID, "references": ("red fox", " arctic fox"), "answer_choices": ["red fox", "arctic fox", "cat"]},
        {**VALID, "dataset": "foxes", "template": None, "split": "validation", "example": "fox", "other": 3},
    ],
)
def test_a_valid_row_has_no_error(row):
    assert row_error(row) is None


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ([VALID], "the row is a list; it must be an object with `instruction` and `references`"),
        ({}, "`instruction` is missing; the row has no key"),
        ({"question": "x"}, "`instruction` is missing; the row has question"),
        ({**VALID, "instruction": 3}, "`instruction` is a int; it must be text"),
        ({**VALID, "dataset": "  "}, "`dataset` is empty"),
        ({**VALID, "instruction": "a\ud800"}, "`instruction` holds a lone surrogate, which is not valid text"),
        ({**VALID, "split": "test"}, "`split` is 'test'; it must be train or validation"),
        ({"instruction": "x"}, "`references` is missing; give the correct responses as a list of texts"),
        ({**VALID, "references": "red fox"}, "`references` is a str; it must be a list of texts"),
        ({**VALID, "references": []}, "`references` is empty; at least one text is needed"),
        ({**VALID, "references": ["a", " "]}, "`references` holds an empty text"),
        ({**VALID, "answer_choices": ["cat", "dog"]}, "`references` holds 'red fox', which is not in `answer_choices`"),
        (
            {**VALID, "references": ["red fox", "1"], "answer_choices": ["red fox", "cat"]},
            "`references` holds '1', which is not in `answer_choices`",
        ),
        (
            {**VALID, "answer_choices": ["red fox", "red fox "]},
            "`answer_choices` has one choice, 'red fox'; a classification row needs two",
        ),
        ({**VALID, "answer_choices": [1]}, "`answer_choices` holds a int; each must be text"),
        ({**VALID, "answer_choices": ["\ud800"]}, "`answer_choices` holds a lone surrogate, which is not valid text"),
    ],
)
def test_the_error_names_the_field_and_its_value(row, error):
    assert row_error(row) == error


def test_the_id_depends_on_the_texts_and_the_dataset_and_not_on_the_split():
    def row(dataset="d", template="t", split="train", instruction="x", references=("a",)):
        return Instruction(dataset, template, split, instruction, references)

    assert row().id == row(split="validation").id and len(bytes.fromhex(row().id)) == 16
    others = [row(dataset="e"), row(template=None), row(instruction="y"), row(references=("a", "b"))]
    assert len({row().id, *(other.id for other in others)}) == 5
    # A fixed value: ids in published datasets must not change.
    assert row().id == "0a8b8013a09e0ad8b4a02415bf883131"


def test_hashes_are_equal_in_every_process_and_accept_lone_surrogates():
    assert hash_text("fox", 8).hex() == "12e107141a5273b7"
    assert hash_text("\ud800", 8) != hash_text("\ud801", 8)
    numbers = [hash_to_unit_interval(f"row {n}") for n in range(4000)]
    assert all(0 <= number < 1 for number in numbers)
    assert all(900 < sum(quarter / 4 <= number < (quarter + 1) / 4 for number in numbers) < 1100 for quarter in range(4))


def test_a_dead_letter_holds_location_reason_and_the_first_500_characters_as_ascii_json():
    letter = dead_letter("f.jsonl:3", "`instruction` is empty", {"text": "é" * 300})
    assert (letter.where, letter.stage, letter.reason) == ("f.jsonl:3", "read", "`instruction` is empty")
    assert len(letter.row) == 500 and letter.row.startswith('{"text": "\\u00e9')
    assert json.loads(letter.to_json()) == {"where": "f.jsonl:3", "stage": "read", "reason": letter.reason, "row": letter.row}
    assert dead_letter("f:1", "the line is not JSON", "{" * 600).row == "{" * 500
    odd = dead_letter("\udcff", "a\nb\u2028\ud800" + "c" * 2000, "\ud800")
    assert (odd.where, odd.reason[:12], len(odd.reason), odd.row) == ("\\udcff", "a b \\ud800cc", 1005, "\\ud800")
