import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.rouge import compare, real_pairs
from generation.annotate import assemble, rouge_l
from tests.conftest import SHARED_DATA

ROUGE_SCORE = RougeScorer(["rougeL"], use_stemmer=True)


@pytest.mark.parametrize(("response", "label"), [("a red fox", 1.0), ("a fox", 0.8), ("42", 0.0), ("", 0.0), ("दिल्ली", 0.0)])
def test_rouge_l_takes_the_best_reference(response, label):
    assert rouge_l(response, ["no match", "a red fox", "दिल्ली"]) == pytest.approx(label)


def test_twenty_thousand_real_pairs_agree_with_rouge_score_to_the_bit():
    result = compare(real_pairs(SHARED_DATA / "t0_train.parquet", 20_000, seed=1))
    assert (result["pairs"], result["mismatches"]) == (20_000, 0)
    assert result["nonzero"] > 5_000


@pytest.mark.parametrize(
    "text", ["K-Kelvin İstanbul ŞİŞ", "don't re-run, O'Neil's", "a_b__c", "\x00\x1fx\u2028y", "12.5% of 3,000", "ﬁne ﬂoat"]
)
def test_odd_characters_are_split_and_lowered_as_rouge_score_does(text):
    for other in (text, text.upper(), "k kelvin i stanbul", "don t re run o neil s a b c 12 5 of 3 000"):
        assert struct.pack("d", rouge_l(text, [other])) == struct.pack("d", ROUGE_SCORE.score(other, text)["rougeL"].fmeasure)


WORDS = st.lists(
    st.sampled_from(["running", "runs", "flies", "Caresses", "a", "the", "12", "ponies", "é", "-", "generalization"]), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | WORDS.map(" ".join), st.lists(st.text(max_size=40) | WORDS.map(" ".join), min_size=1, max_size=3))
def test_any_text_agrees_with_rouge_score_to_the_bit(response, references):
    expected = ROUGE_SCORE.score_multi(references, response)["rougeL"].fmeasure
    assert struct.pack("d", rouge_l(response, references)) == struct.pack("d", expected)


def sampled(response):
    return {"response": response, "decoding": "greedy", "tokens": 2, "finish_reason": "stop", "logprob": -1.5}


def test_candidates_are_references_then_wrong_ones_then_labelled_samples():
    row = {"references": [" a red fox", "vixen"], "mismatched": ["a blue whale", "A  RED fox"], "answer_choices": None}
    candidates = assemble(row, [sampled("a fox")], "llm")
    assert [(each["response"], each["label"], each["source"]) for each in candidates] == [
        ("a red fox", 1.0, "reference"),
        ("vixen", 1.0, "reference"),
        ("a blue whale", 0.0, "mismatched"),
        ("a fox", pytest.approx(0.8), "sampled"),
    ]
    assert candidates[-1]["model"] == "llm" and candidates[0]["model"] is None


def test_the_wrong_choices_of_a_classification_row_are_zero():
    row = {"references": ["Yes"], "mismatched": [], "answer_choices": ["Yes", "No", "Maybe"]}
    candidates = assemble(row, [], "llm")
    assert [(each["response"], each["label"], each["source"]) for each in candidates] == [
        ("Yes", 1.0, "reference"),
        ("No", 0.0, "choice"),
        ("Maybe", 0.0, "choice"),
    ]
