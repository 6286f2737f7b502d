import struct
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.pairs import bigbench_rows
from benchmarks.rouge import compare, real_pairs
from cluster.config import LabelConfig
from generation.labels import METRICS, TEXTS, assemble_candidates, compute_labels, describe_metric, limit_per_bin, rouge_l, rouge_l_batch

ROUGE_SCORE = RougeScorer(["rougeL"], use_stemmer=True)
PAPER = LabelConfig()


def bits(value):
    return struct.pack("d", value)


def rouge_score_value(response, references):
    return max((ROUGE_SCORE.score(reference, response)["rougeL"].fmeasure for reference in references), default=0.0)


def label(metric, response, *references, mode="paper"):
    config = LabelConfig(metric=metric, mode=mode)
    return compute_labels(pa.array([[response]], TEXTS), pa.array([references], TEXTS), config)[0]


def unicode(response, *references):
    return rouge_l(response, references, "unicode")


@pytest.mark.parametrize(("response", "value"), [("a red fox", 1.0), ("a fox", 0.8), ("42", 0.0), ("", 0.0), ("दिल्ली", 0.0)])
def test_rouge_l_takes_the_best_reference(response, value):
    assert rouge_l(response, ["no match", "a red fox", "दिल्ली"]) == pytest.approx(value)


@pytest.fixture(scope="module")
def real_rows(bigbench_tasks):
    """Return rows of five BIG-bench tasks: short and long texts, several references, SQL, non-Latin text."""
    tasks = ("auto_categorization", "disfl_qa", "gem", "hindi_question_answering", "semantic_parsing_spider")
    return bigbench_rows(dict.fromkeys(tasks, 1_000))


def test_labels_of_ten_thousand_real_pairs_equal_rouge_score_to_the_bit(real_rows):
    result = compare(real_pairs(real_rows, 10_000, seed=1))
    assert (result["pairs"], result["mismatches"]) == (10_000, 0)
    assert result["nonzero"] > 5_000


@pytest.mark.parametrize(
    "text",
    [
        "\u212aelvin \u0130stanbul ŞİŞ a\u0130b",
        "don't re-run, O'Neil's",
        "a_b__c",
        "\x00\x1fx\u2028y",
        "12.5% of 3,000",
        "ﬁne ﬂoat",
        "7",
        "a\u212a",
    ],
)
def test_unusual_characters_are_split_and_lowercased_as_rouge_score_does(text):
    for other in (text, text.upper(), "k kelvin i stanbul ak ai", "don t re run o neil s a b c 12 5 of 3 000 7"):
        assert bits(rouge_l(text, [other])) == bits(rouge_score_value(text, [other]))


def test_only_two_non_ascii_characters_become_ascii_letters_in_lower_case():
    found = {code for code in range(128, sys.maxunicode + 1) if any(letter.isascii() and letter.isalnum() for letter in chr(code).lower())}
    assert found == {0x212A, 0x0130}


DIFFICULT = st.text(st.sampled_from("aAyY sSiI09-_.\x00\n\u212a\u0130é\u0301दिल्लीß中文😀ﬁ"), max_size=60)
WORDS = st.lists(
    st.sampled_from(
        ["running", "runs", "flies", "Caresses", "a", "the", "12", "ponies", "é", "-", "generalization", "y" * 900, "ab" * 700]
    ),
    max_size=80,
).map(" ".join)
ANY = st.text(max_size=40) | DIFFICULT | WORDS


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.lists(ANY, max_size=4), st.lists(ANY, max_size=4)), max_size=4))
def test_any_texts_agree_with_rouge_score_to_the_bit(rows):
    responses, references = pa.array([texts for texts, _ in rows], TEXTS), pa.array([correct for _, correct in rows], TEXTS)
    expected = [rouge_score_value(text, correct) for texts, correct in rows for text in texts]
    assert list(map(bits, rouge_l_batch(responses, references))) == list(map(bits, expected))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=50, max_size=300), st.lists(st.sampled_from("abcd"), min_size=50, max_size=300))
def test_subsequences_over_several_machine_words_agree_with_rouge_score(response_words, reference_words):
    response, reference = " ".join(response_words), " ".join(reference_words)
    assert bits(rouge_l(response, [reference])) == bits(rouge_score_value(response, [reference]))


def test_texts_of_ten_thousand_words_and_hundreds_of_references_are_labelled():
    words = [f"w{number * number % 997}" for number in range(10_000)]
    text = " ".join(words)
    without = " ".join(word for position, word in enumerate(words) if position % 10)
    precision, recall = 1.0, 0.9
    assert rouge_l(without, ["unlike"] * 500 + [text]) == 2 * precision * recall / (precision + recall)
    assert rouge_l(text, [text[::-1], text]) == 1.0


def test_slices_and_blocks_do_not_change_a_label(monkeypatch):
    rows = [([f"say {n}", "x" * n, f"{n} one more"], [f"say {n} times", "é" * n]) for n in range(40)]
    responses, references = pa.array([texts for texts, _ in rows], TEXTS), pa.array([correct for _, correct in rows], TEXTS)
    whole = rouge_l_batch(responses, references)
    monkeypatch.setattr("generation.labels._BLOCK", 50)
    assert rouge_l_batch(responses, references).tolist() == whole.tolist()
    assert rouge_l_batch(responses[7:11], references[7:11]).tolist() == whole[21:33].tolist()
    assert rouge_l_batch(responses[:0], references[:0]).tolist() == []


@pytest.mark.parametrize(
    ("response", "reference", "value"),
    [
        ("नई दिल्ली", "दिल्ली", 2 / 3),  # Hindi: marks belong to the letters before them
        ("ДЕЛО", "дело", 1.0),
        ("ΣΟΦΟΣ", "σοφος", 1.0),
        ("straße", "STRASSE", 1.0),
        ("cafe\u0301", "café", 1.0),
        ("ｆｏｘｅｓ", "fox", 1.0),  # wide letters are ASCII after NFKC, and stemmed
        ("می\u200cخواهم", "میخواهم", 1.0),  # an invisible joiner is ignored
        ("東京都", "京都", 0.8),  # in scripts without spaces, such as Han and Thai, a letter is a word
        ("ひらがな カナ", "ひらがなカナ", 1.0),
        ("กรุงเทพ", "เทพ", 2 / 3),
        ("３，０００円", "3,000 円", 1.0),
        ("-5", "5", 0.0),
        ("\u22125", "-5", 1.0),
        ("it is -5 now", "it is - 5 now", 0.75),
        ("3-5", "3 5", 1.0),  # a range has no sign
        ("covid-19", "covid 19", 1.0),
        ("+", "+", 1.0),
        ("+", "-", 0.0),
        ("+", "plus +", 0.0),  # symbols count only in a text without words
        ("❤️ 👍", "❤ 👍", 1.0),
        ("?!", "!", 2 / 3),
        (" \n", " ", 0.0),
        ("", "", 0.0),
        ("running foxes", "runs fox", 1.0),
    ],
)
def test_unicode_mode_splits_every_script(response, reference, value):
    assert unicode(response, reference) == pytest.approx(value)
    assert unicode(reference, response) == pytest.approx(value)


@settings(max_examples=300, deadline=None)
@given(ANY | st.text(st.characters(categories=["L", "M", "N", "S", "P"]), min_size=1, max_size=30))
def test_in_unicode_mode_a_text_equals_itself_in_any_normal_form(text):
    value = unicode(text, text)
    assert value in (0.0, 1.0)
    assert value == unicode(text, unicodedata.normalize("NFD", text)) == unicode(text.lower(), text.lower())
    if any(character.isalnum() for character in text):
        assert value == 1.0


def test_unicode_mode_stems_ascii_english_as_paper_mode_does(real_rows):
    compared = 0
    for response, references in real_pairs(real_rows, 1_000, seed=2):
        text = response + "".join(references)
        if text.isascii() and not set("+-") & set(text) and rouge_l(response, references):
            assert bits(rouge_l(response, references)) == bits(unicode(response, *references))
            compared += 1
    assert compared > 200


@pytest.mark.parametrize(
    ("response", "reference", "value"),
    [("A  red\nFOX ", "a red fox", 1.0), ("a red fox.", "a red fox", 0.0), ("", "", 0.0), ("ÉTÉ", "été", 1.0)],
)
def test_exact_match_ignores_only_white_space_and_case(response, reference, value):
    assert label("exact_match", response, "something else", reference) == value


@pytest.mark.parametrize(
    ("response", "reference", "value"),
    [
        ("fox red a", "a red fox", 1.0),  # order does not count
        ("the the the", "the fox", 0.4),  # 1 common: P 1/3, R 1/2
        ("running", "run", 0.0),  # not stemmed
        ("A", "a", 1.0),  # articles are not removed, because one can be the answer
        ("", "a", 0.0),
    ],
)
def test_token_f1_compares_bags_of_words(response, reference, value):
    assert label("token_f1", response, "unlike", reference) == pytest.approx(value)


def test_token_f1_has_a_unicode_mode():
    assert label("token_f1", "京東", "東京") == 0.0
    assert label("token_f1", "京東", "東京", mode="unicode") == 1.0


@pytest.mark.parametrize(
    ("response", "reference", "value"),
    [
        ("abcd", "abcd", 1.0),
        ("a b cd", "abcd", 1.0),  # without white space
        ("ABCD", "abcd", 0.0),
        ("ab", "ac", 5 * 0.25 * 0.25 / (4 * 0.25 + 0.25)),  # 1-grams 1 of 2, 2-grams 0 of 1
        ("abc", "abcd", 5 * (23 / 36) / (4 + 23 / 36)),  # P 1; R 3/4, 2/3, 1/2, and no 4-grams in the response
        ("", "abc", 0.0),
    ],
)
def test_chrf_equals_values_calculated_by_hand(response, reference, value):
    assert label("chrf", response, "xyz", reference) == pytest.approx(value)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_returns_one_label_per_response_in_order(metric):
    responses, references = [["a red fox", "7"], [], ["one two"]], [["a red fox", "vixen"], ["x"], []]
    values = compute_labels(pa.array(responses, TEXTS), pa.array(references, TEXTS), LabelConfig(metric=metric))
    assert values.dtype == np.float64 and values.tolist() == [1.0, 0.0, 0.0]


def test_the_description_of_a_metric_has_its_name_mode_and_version():
    assert describe_metric(PAPER) == {"name": "rouge_l", "mode": "paper", "version": 1}
    assert describe_metric(LabelConfig(metric="chrf")) == {"name": "chrf", "mode": None, "version": 1}


def sampled(response):
    return {"response": response, "decoding": "greedy", "tokens": 2, "finish_reason": "stop", "logprob": -1.5}


def test_candidates_are_references_then_wrong_responses_then_labelled_samples():
    references = {"references": [" a red fox", "vixen"], "mismatched": ["a blue whale", "A  RED fox"]}
    row = {"instruction": "name it", **references, "answer_choices": None}
    (candidates, others) = assemble_candidates(
        [{**row, "sampled": [sampled("a fox")]}, {**row, "sampled": [sampled("vixen")]}], PAPER, "llm"
    )
    assert [(each["response"], each["label"], each["source"]) for each in candidates] == [
        ("a red fox", 1.0, "reference"),
        ("vixen", 1.0, "reference"),
        ("a blue whale", 0.0, "mismatched"),
        ("a fox", pytest.approx(0.8), "sampled"),
    ]
    assert candidates[-1]["model"] == "llm" and candidates[0]["model"] is None
    assert (others[-1]["response"], others[-1]["label"]) == ("vixen", 1.0)


def test_the_wrong_choices_of_a_classification_row_have_label_0():
    row = {"instruction": "is it?", "references": ["Yes"], "mismatched": [], "answer_choices": ["Yes", "No", "Maybe"], "sampled": []}
    (candidates,) = assemble_candidates([row], PAPER, "llm")
    assert [(each["response"], each["label"], each["source"]) for each in candidates] == [
        ("Yes", 1.0, "reference"),
        ("No", 0.0, "choice"),
        ("Maybe", 0.0, "choice"),
    ]


def test_a_label_bin_keeps_at_most_the_limit_of_distinct_samples():
    def sample(response, label):
        return {"response": response, "label": label, "source": "sampled"}

    given = [{"response": "r", "label": 1.0, "source": "reference"}, {"response": "w", "label": 0.0, "source": "mismatched"}]
    bad, good = [sample(f"bad {n}", 0.05) for n in range(9)], [sample("good", 0.97), sample("best", 1.0), sample("fine", 0.9)]
    pool = [*given, *bad[:5], *good, *bad[5:], bad[0], sample("middling", 0.5)]
    kept = limit_per_bin(pool, 2, seed=1, row_id="a")
    assert [each for each in kept if each["source"] != "sampled"] == given
    assert sum(each["label"] < 0.1 for each in kept[2:]) == 2 and sum(each["label"] >= 0.9 for each in kept[2:]) == 2
    assert sample("middling", 0.5) in kept and kept == [each for each in [*pool[:-2], pool[-1]] if each in kept]
    assert limit_per_bin(pool, 2, seed=1, row_id="a") == kept
    assert len({str(limit_per_bin(pool, 2, seed=1, row_id=row)) for row in "abcdefgh"}) > 1
    # With a limit above the size of each bin, only duplicates are removed.
    assert limit_per_bin(pool, 9, seed=1, row_id="a") == [*pool[:-2], pool[-1]]
