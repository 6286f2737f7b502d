import json

import pytest

from cluster.config import FilesSource
from cluster.errors import UsageError
from generation.sources import reader
from generation.sources.merge import merge_rows
from generation.sources.row import DeadLetter


def read(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(reader.row_reader(FilesSource(path=str(path), **settings), 7, as_prompts=True)())


@pytest.mark.parametrize(
    ("row", "instruction"),
    [
        ({"instruction": "say it"}, "say it"),
        ({"instruction": "sum up", "input": "a text"}, "sum up\n\na text"),
        ({"instruction": "say it", "output": None}, "say it"),
        ({"prompt": "say it", "references": None}, "say it"),
        ({"prompt": [{"role": "user", "content": "say it"}]}, "say it"),
        ({"question": "why?", "system": "be short", "context": "rain"}, "be short\n\nwhy?\n\nrain"),
        ({"inputs_pretokenized": "say it"}, "say it"),
        ({"messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "why?"}]}, "be short\n\nwhy?"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]},
            "User: a\n\nAssistant: b\n\nUser: c",
        ),
    ],
)
def test_a_prompt_without_an_answer_is_a_row_without_references(tmp_path, row, instruction):
    (found,) = read(tmp_path, row)
    assert (found.instruction, found.references) == (instruction, ())


@pytest.mark.parametrize(
    ("row", "references"),
    [
        ({"instruction": "a", "references": ["b", " "]}, ("b",)),
        ({"instruction": "a", "output": "b"}, ("b",)),
        ({"inputs_pretokenized": "a", "targets_pretokenized": "b"}, ("b",)),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ("b",)),
    ],
)
def test_an_answer_in_the_row_is_its_reference(tmp_path, row, references):
    (found,) = read(tmp_path, row)
    assert (found.instruction, found.references) == ("a", references)


def test_choices_need_no_reference(tmp_path):
    first, second = read(tmp_path, {"instruction": "a", "answer_choices": ["x", "y"]}, {"instruction": "b", "answer_choices": "x ||| y"})
    assert first.answer_choices == second.answer_choices == ("x", "y") and first.references == ()
    (letter,) = [each for each in read(tmp_path, {"instruction": "a"}, {"instruction": "b", "answer_choices": ["x"]}) if is_letter(each)]
    assert "`answer_choices` has one choice" in letter.reason


def is_letter(row):
    return isinstance(row, DeadLetter)


def test_the_other_columns_are_kept_and_rows_that_differ_in_them_are_not_merged(tmp_path):
    rows = [
        {"prompt": "a", "id": 1, "tags": ["x"], "weight": float("inf")},
        {"prompt": "a", "id": 2},
        {"prompt": "a", "id": 2},
        {"prompt": "a"},
    ]
    found = read(tmp_path, *rows)
    assert [each.own for each in found] == ['{"id": 1, "tags": ["x"], "weight": null}', '{"id": 2}', '{"id": 2}', ""]
    with merge_rows(found) as merged:
        kept = list(merged)
        assert merged.merged == 1 and [each.own for each in kept] == [found[0].own, found[1].own, ""]
    assert len({each.id for each in kept}) == 3


def test_rows_without_a_prompt_are_dead_letters_that_name_the_columns(tmp_path):
    good, bad, blank = read(tmp_path, {"prompt": "a"}, {"text": "b", "key": 1}, {"prompt": " "})
    assert good.instruction == "a"
    assert bad.reason == "`instruction` is missing; the row has text, key"
    assert blank.reason == "`instruction` is empty"
    with pytest.raises(UsageError, match=r"no row can be used; each needs `instruction` \(text\), e.g. "):
        read(tmp_path, {"text": "b"})


def test_generate_still_needs_references(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "references": ["b"]}\n{"instruction": "c"}\n')
    good, bad = reader.read_rows(FilesSource(path=str(path)), 7)
    assert good.own == "" and bad.reason.startswith("`references` is missing")
