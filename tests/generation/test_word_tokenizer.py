import pyarrow as pa
import pytest

from generation import word_tokenizer
from generation.word_tokenizer import Vocabulary, vocabulary


def words_of(texts, mode="paper", stemmed=False):
    """Return the word numbers of each text."""
    numbers, begins, ends = vocabulary(mode, stemmed=stemmed).split(pa.array(texts))
    return [numbers[begin:end].tolist() for begin, end in zip(begins, ends, strict=True)]


def test_equal_words_have_equal_numbers_and_other_words_do_not():
    first, second, third = words_of(["A red fox", "a RED-fox", "a red box"])
    assert first == second and len(set(first)) == 3
    assert third[:2] == first[:2] and third[2] not in first


def test_ascii_and_other_texts_keep_their_order():
    texts = ["fox", "naïve fox", "", "日本 fox", "fox fox"]
    first, second, empty, third, fourth = words_of(texts, "unicode")
    assert (len(first), len(second), empty, len(third), fourth) == (1, 2, [], 3, first * 2)
    assert second[-1] == third[-1] == first[0]


@pytest.mark.parametrize(("stemmed", "equal"), [(True, True), (False, False)])
def test_only_a_stemmed_vocabulary_unites_the_forms_of_a_word(stemmed, equal):
    running, runs = words_of(["running", "runs"], stemmed=stemmed)
    assert (running == runs) is equal


def test_long_words_that_share_their_start_differ():
    long = "x" * 100
    first, second, third = words_of([f"{long}a", f"{long}b", f"{long}a"])
    assert first == third != second


def test_a_full_vocabulary_is_cleared_and_numbers_stay_right(monkeypatch):
    monkeypatch.setattr(word_tokenizer, "_SLOTS", 1 << 8)
    small = Vocabulary("paper", stemmed=True)
    for turn in range(50):
        numbers, begins, ends = small.split(pa.array([f"running {turn} supercalifragilistic{turn}", f"runs {turn}"]))
        first, second = (numbers[begin:end].tolist() for begin, end in zip(begins, ends, strict=True))
        assert first[:2] == second and first[2] not in second
    assert len(small._table) <= 1 << 9
