import pytest

from generation.tfidf import TfidfIndex

POOL = ["Answer it: who wrote Emma?", "Answer it: who painted Guernica?", "Answer it: where is Oslo?"]


@pytest.mark.parametrize(("text", "nearest"), [("who wrote Ulysses", 0), ("GUERNICA!", 1), ("Answer it: where is Rome?", 2)])
def test_rare_words_in_common_decide(text, nearest):
    assert TfidfIndex(POOL).similarities(text).argmax() == nearest


def test_the_words_of_the_template_count_little_and_unknown_ones_nothing():
    pool = TfidfIndex(POOL)
    assert 0 < pool.similarities("Answer it: zebra").max() < 0.1 * pool.similarities("Guernica")[1]
    assert pool.similarities("zebra").tolist() == [0.0, 0.0, 0.0]
    assert [pool.similarities(text).argmax() for text in POOL] == [0, 1, 2]
    assert TfidfIndex([]).similarities("x").tolist() == []
