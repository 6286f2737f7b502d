from pathlib import Path

import pytest

from generation.sources import split
from generation.sources.reader import read_rows
from tests.generation.sources.row_files import files_config, write_jsonl

ODD = Path(__file__).parents[2] / "data" / "odd"


@pytest.mark.parametrize(
    "text",
    [
        'Read this.\n\n"The old fox ran over the hill, and slept."\n\nWho ran?',
        "the OLD fox ran over the hill; and   slept. Is it so? Yes or no",
        "Now read the passage and answer: The old fox ran over the hill and slept!",
        "Passage: \nThe old fox ran over the hill, and slept",
    ],
)
def test_renderings_of_one_passage_share_their_longest_sentence(text):
    assert split.longest_sentence(text) == "the old fox ran over the hill and slept"


def test_a_text_without_words_is_its_own_key():
    assert split.longest_sentence(" + - ") == "+ -"


def test_the_validation_share_matches_the_fraction_and_equal_keys_get_equal_splits():
    sides = [split.assign_split(f"example {n}", 0.2) for n in range(5000)]
    assert 900 < sides.count("validation") < 1100
    assert sides == [split.assign_split(f"example {n}", 0.2) for n in range(5000)]
    assert {split.assign_split(f"{n}", 0.0) for n in range(1000)} == {"train"}


def test_held_out_texts_are_found_also_when_they_are_added_after_a_lookup():
    held_out = split.HeldOutTexts(["a"])
    assert "a" in held_out and "b" not in held_out
    held_out.add(" b ")
    assert "b" in held_out and "a" in held_out and "c" not in held_out


SYSTEM = "You are a helpful assistant that always answers in the shortest way that is possible for you."
LONG = "A fixed instruction, with more words than any of the inputs that follow it has, so it is the longest sentence"


def sides_of(tmp_path, rows, *overrides):
    """Return the rows of a source with their splits."""
    config = files_config(write_jsonl(tmp_path / "d.jsonl", rows), *overrides)
    return list(read_rows(config.source, config.seed))


@pytest.mark.parametrize(
    "text",
    [
        lambda n: f"{LONG}\n\nitem {n}",
        lambda n: f"{SYSTEM}\n{LONG}: {n}",
        lambda n: f"{(SYSTEM, LONG)[n % 2]}\nitem {n}",
        lambda n: f"{LONG}\nitem {n}\n{SYSTEM}\nAnswer:",
        lambda n: f"{LONG}\n{'word ' * (n + 1)}",
        lambda n: f"{LONG}.\n" + "+" * (n + 1),
    ],
    ids=["fixed instruction", "system prompt", "two prompts", "before and after", "growing input", "input without words"],
)
@pytest.mark.parametrize("count", [12, 40, 1000])
def test_a_text_that_all_rows_share_does_not_decide_the_split(tmp_path, text, count):
    rows = sides_of(tmp_path, [{"instruction": text(n), "references": ["x"]} for n in range(count)])
    held_out = sum(row.split == "validation" for row in rows)
    assert 0 < held_out < count / 2


def test_the_odd_input_with_a_fixed_instruction_has_both_splits():
    config = files_config(ODD / "same_template.jsonl")
    sides = [row.split for row in read_rows(config.source, config.seed)]
    assert len(sides) == 40 and 2 <= sides.count("validation") <= 16


def test_an_example_field_that_all_rows_share_does_not_decide_the_split(tmp_path):
    rows = sides_of(tmp_path, [{"instruction": f"say {n}", "references": ["x"], "example": "same"} for n in range(40)])
    assert {row.split for row in rows} == {"train", "validation"}


@pytest.mark.parametrize("prefix", ["", f"{SYSTEM}\n"], ids=["alone", "below a system prompt"])
def test_questions_about_one_passage_and_renderings_of_it_are_in_one_split(tmp_path, prefix):
    asks = ("Who is it?", "Where was it, and why?", "Summarise the passage.", "Is it true: yes or no?")
    texts = [
        (n, f"{prefix}The story number {n} is about a fox that ran {n} times over the hill.\n{ask}") for n in range(60) for ask in asks
    ]
    rows = sides_of(tmp_path, [{"instruction": text, "references": ["x"]} for _, text in texts])
    sides = {}
    for (passage, _), row in zip(texts, rows, strict=True):
        sides.setdefault(passage, set()).add(row.split)
    assert {len(each) for each in sides.values()} == {1} and {row.split for row in rows} == {"train", "validation"}


def test_rows_without_a_shared_text_keep_the_split_of_their_longest_sentence(tmp_path):
    rows = sides_of(tmp_path, [{"instruction": f"The passage {n} of many. Who?", "references": ["x"]} for n in range(200)])
    assert [row.split for row in rows] == [split.assign_split(split.longest_sentence(row.instruction), 0.2) for row in rows]
