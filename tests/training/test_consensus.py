import numpy as np
import pytest

from cluster.config import LabelConfig
from generation.labels import rouge_l
from training.consensus import agreement_matrix, consensus, weighted_agreement


def test_consensus_is_the_mean_rouge_l_with_the_other_draws():
    draws = ["a red fox", "a fox", "the dog", "a fox"]
    expected = [np.mean([rouge_l(draw, [other]) for at, other in enumerate(draws) if at != number]) for number, draw in enumerate(draws)]
    assert consensus(draws) == pytest.approx(expected)


def test_each_repeat_of_a_response_supports_it():
    assert consensus(["yes", "no", "yes", "maybe"]).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0])


def test_repeats_without_words_agree_and_empty_ones_do_not():
    assert consensus(["+", "-", "+", ""]).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0])
    assert consensus(["", "", "a"]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("draws", [[], ["a"]])
def test_a_pool_without_other_draws_has_no_consensus(draws):
    assert consensus(draws).tolist() == [0.0] * len(draws)


def test_other_draws_count_by_their_weight():
    agreement = agreement_matrix(["a b", "a c", "d e"], LabelConfig())
    assert weighted_agreement(agreement, np.array([0.0, 50.0, 0.0])).tolist() == pytest.approx([0.5, 0.25, 0], abs=1e-9)


def test_the_label_metric_compares_the_draws():
    assert consensus(["a b", "a c"], LabelConfig(metric="exact_match")).tolist() == [0, 0]
    assert consensus(["एक दो", "एक तीन"], LabelConfig(mode="unicode")).tolist() == pytest.approx([0.5, 0.5])
