import math

import numpy as np
import pytest

from generation.logprobs import mean_logprob, mean_logprobs


@pytest.mark.parametrize(
    ("logprob", "tokens", "mean"),
    [(-6.0, 4, -1.5), (-0.7, 3, -0.7 / 3), (-2.0, 0, -2.0), (-2.0, None, -2.0), (None, 4, None), (0.0, 5, 0.0)],
)
def test_the_mean_divides_the_sum_by_at_least_one_token(logprob, tokens, mean):
    assert mean_logprob(logprob, tokens) == mean


def test_the_means_of_an_array_equal_the_means_one_by_one():
    sums, tokens = [[-6.0, -0.7], [-2.0, -3.3]], [[4, 3], [0, 7]]
    expected = [[mean_logprob(*pair) for pair in zip(*row, strict=True)] for row in zip(sums, tokens, strict=True)]
    assert mean_logprobs(sums, tokens).tolist() == expected


def test_unknown_sums_and_unknown_tokens_give_nan():
    means = mean_logprobs([math.nan, -1.0, -1.0], [2, math.nan, 2])
    assert np.isnan(means).tolist() == [True, True, False]
