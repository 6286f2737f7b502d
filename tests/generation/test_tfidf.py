import pytest

from generation.tfidf import TfidfIndex

POOL = ["Answer it: who wrote Emma?", "Answer it: who painted Guernica?", "Answer it: where is Oslo?"]


@pytest.mark.parametrize(("text", "nearest"), [("who wrote Ulysses", 0), ("GUERNICA!", 1), ("Answer it: where is Rome?", 2)])
def test_rare_common_words_decide(text, nearest):
    assert TfidfIndex(POOL).similarities(text).argmax() == nearest


def test_words_of_the_template_have_a_small_weight_and_unknown_words_none():
    pool = TfidfIndex(POOL)
    assert 0 < pool.similarities("Answer it: zebra").max() < 0.1 * pool.similarities("Guernica")[1]
    assert pool.similarities("zebra").tolist() == [0.0, 0.0, 0.0]
    assert [pool.similarities(text).argmax() for text in POOL] == [0, 1, 2]
    assert TfidfIndex([]).similarities("x").tolist() == []
