import pytest

from generation.tfidf import Similarity

POOL = ["Answer it: who wrote Emma?", "Answer it: who painted Guernica?", "Answer it: where is Oslo?"]


@pytest.mark.parametrize(("text", "nearest"), [("who wrote Ulysses", 0), ("GUERNICA!", 1), ("Answer it: where is Rome?", 2)])
def test_rare_words_in_common_decide(text, nearest):
    assert Similarity(POOL).scores(text).argmax() == nearest


def test_the_words_of_the_template_count_little_and_unknown_ones_nothing():
    pool = Similarity(POOL)
    assert 0 < pool.scores("Answer it: zebra").max() < 0.1 * pool.scores("Guernica")[1]
    assert pool.scores("zebra").tolist() == [0.0, 0.0, 0.0]
    assert [pool.scores(text).argmax() for text in POOL] == [0, 1, 2]
    assert Similarity([]).scores("x").tolist() == []
