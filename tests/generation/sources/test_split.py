import pytest

from generation.sources import split


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
