import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import LabelConfig
from generation.labels import chrf, exact_match, rouge_l, token_f1
from generation.pairwise_labels import label_matrix

TEXTS = ["a red fox", "a fox", "", "Red foxes, red!", "+", "नमस्ते दुनिया", "42"]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab +é5.", max_size=12), max_size=6))
@pytest.mark.parametrize("mode", ["paper", "unicode"])
def test_the_matrix_has_the_rouge_l_of_every_pair_to_the_bit(mode, texts):
    matrix = label_matrix(texts, LabelConfig(mode=mode))
    assert matrix.shape == (len(texts), len(texts))
    assert matrix.tolist() == [[rouge_l(response, [reference], mode) for reference in texts] for response in texts]


@pytest.mark.parametrize(("name", "metric"), [("token_f1", token_f1), ("chrf", chrf), ("exact_match", exact_match)])
def test_the_matrix_has_the_labels_of_the_other_metrics(name, metric):
    import pyarrow as pa

    expected = [[metric(pa.array([[left]]), pa.array([[right]]))[0] for right in TEXTS] for left in TEXTS]
    assert np.array_equal(label_matrix(TEXTS, LabelConfig(metric=name)), expected)


def test_rows_are_responses_and_columns_references():
    # chrF weighs recall twice, so it is not symmetric.
    matrix = label_matrix(["abc", "abcdef"], LabelConfig(metric="chrf"))
    assert matrix[0, 1] < matrix[1, 0]
