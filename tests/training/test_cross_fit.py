from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.schema import DATASET
from tests.training.conftest import rows
from training.cross_fit import Score, cross_fit, deal_folds, score_candidates


def length_score(instructions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    return np.array([len(response) for response in responses], np.float64)


def test_each_row_is_scored_by_the_model_that_was_trained_without_it():
    table = pa.Table.from_pylist([*rows(20, 1), *rows(3, 1)], DATASET)  # three instructions are repeated
    calls: list[frozenset[str]] = []

    def train(held_out: frozenset[str]) -> Score:
        calls.append(held_out)

        def score(instructions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
            assert set(instructions) == held_out
            return length_score(instructions, responses) + 100 * len(calls)

        return score

    scores = cross_fit(table, 3, 1, train)
    assert len(calls) == 3 and not frozenset.intersection(*calls)
    assert frozenset.union(*calls) == set(table["instruction"].to_pylist())
    for row, values in zip(table.to_pylist(), scores, strict=True):
        model = next(number for number, held_out in enumerate(calls, 1) if row["instruction"] in held_out)
        assert values.tolist() == [len(each["response"]) + 100 * model for each in row["candidates"]]


@given(st.lists(st.text(max_size=3), min_size=1), st.integers(2, 5), st.integers(0, 3))
def test_parts_are_even_and_do_not_depend_on_the_order_of_rows(instructions: list[str], folds: int, seed: int):
    parts = deal_folds(instructions, folds, seed)
    part_of = dict(zip(instructions, parts.tolist(), strict=True))
    assert [part_of[text] for text in instructions] == parts.tolist()
    sizes = np.bincount(list(part_of.values()), minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    assert deal_folds(instructions[::-1], folds, seed).tolist() == parts.tolist()[::-1]


def test_repeats_and_empty_responses_get_a_score_each():
    row = rows(1, 1)[0]
    row["candidates"] = [{**row["candidates"][0], "response": text} for text in ("b", "", "b", "long")]
    assert [each.tolist() for each in score_candidates(pa.Table.from_pylist([row], DATASET), length_score)] == [[1, 0, 1, 4]]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_instructions_cannot_be_cross_fitted(count: int):
    table = pa.Table.from_pylist(rows(count, 1) * 2, DATASET)
    with pytest.raises(ValueError, match=f"needs two distinct instructions or more; the rows have {count}"):
        cross_fit(table, 2, 1, lambda held_out: length_score)
