import pytest

from generation.similarity import Similarity

POOL = ["Answer it: who wrote Emma?", "Answer it: who painted Guernica?", "Answer it: where is Oslo?"]


@pytest.mark.parametrize(("text", "nearest"), [("who wrote Ulysses", 0), ("GUERNICA!", 1), ("Answer it: where is Rome?", 2)])
def test_rare_words_in_common_decide(text, nearest):
    assert Similarity(POOL).scores(text).argmax() == nearest


def test_the_words_of_the_template_and_unknown_ones_count_nothing():
    assert Similarity(POOL).scores("Answer it: zebra").tolist() == [0.0, 0.0, 0.0]
    assert Similarity(POOL).scores(POOL[0])[0] == pytest.approx(1.0)
    assert Similarity([]).scores("x").tolist() == []
