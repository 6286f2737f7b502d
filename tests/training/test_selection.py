import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CappyError
from training.selection import VARIANTS, Pool, Selection, Variant, blend_selection, read, signals, to_text

MIXED = Selection(tuple(Variant(names, tuple(1.0 - 0.3 * at for at in range(len(names))), (0.5,) * len(names)) for names in VARIANTS))
VALID = {"signals": ["score"], "weights": [1], "scales": [1], "pool_variance": 1, "l2": 1, "rows": 1, "cross_validated": {}}
POOL = Pool(["a fox", "a red fox", "", "a fox"], [0.2, 0.7, 0.1, 0.2], [-3.0, -4.0, -9.0, -3.0], [2, 3, 1, 2], "Red? A dog!")

finite = st.floats(-5, 5)
texts = st.sampled_from(["a fox", "a red fox", "the dog", "+", "x y z", ""])
draws = st.lists(st.tuples(texts, finite, finite, st.integers(0, 9)), max_size=8)


def pool_of(rows):
    responses, scores, logprobs, tokens = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Pool(list(responses), list(scores), list(logprobs), list(tokens))


def test_the_signals_of_a_pool():
    found = signals(POOL)
    assert set(found) == set(VARIANTS[0])
    assert found["score"].tolist() == pytest.approx([0.2, 0.7, 0.1, 0.2])
    assert found["logprob_mean"].tolist() == pytest.approx([-1.5, -4 / 3, -9, -1.5])
    assert found["logprob_sum"].tolist() == [-3, -4, -9, -3]
    assert found["consensus"].tolist() == pytest.approx([(0.8 + 1) / 3, 1.6 / 3, 0, (0.8 + 1) / 3])
    assert found["frequency"].tolist() == [0.5, 0.25, 0.25, 0.5]
    assert found["length"].tolist() == pytest.approx(np.log1p([2, 3, 0, 2]))
    assert found["overlap"].tolist() == pytest.approx([1 / 2, 2 / 3, 0, 1 / 2])


def test_a_good_response_supports_similar_responses():
    found = signals(Pool(["a b", "a c", "d e", "d f"], [0.9, 0.1, 0.2, 0.1]))
    assert found["score_consensus"][1] > found["score_consensus"][3]
    assert found["consensus"][1] == found["consensus"][3]


@settings(deadline=None)
@given(draws, st.randoms())
def test_a_permuted_pool_gets_permuted_values(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    values = MIXED.rank(pool_of(rows))
    assert MIXED.rank(pool_of([rows[at] for at in order])) == pytest.approx(values[order])


@settings(deadline=None)
@given(draws)
def test_values_are_finite_and_equal_for_repeats(rows):
    values = MIXED.rank(pool_of(rows))
    assert values.shape == (len(rows),)
    assert np.isfinite(values).all()
    for response in {row[0] for row in rows}:
        same = values[[row[0] == response for row in rows]]
        assert same == pytest.approx(np.full(len(same), same[0]))


@settings(deadline=None)
@given(draws.filter(lambda rows: len(rows) > 1 and any(row[0] for row in rows)), finite)
def test_an_offset_of_all_scores_changes_nothing(rows, offset):
    shifted = [(response, score + offset, *rest) for response, score, *rest in rows]
    assert MIXED.rank(pool_of(shifted)) == pytest.approx(MIXED.rank(pool_of(rows)), abs=1e-6)


@pytest.mark.parametrize("rows", [[("", -1.0, -1.0, 1)] * 3, [("same", 0.5, -1.0, 1)] * 3, [("one", 0.5, -1.0, 1)]])
def test_pools_without_differences_get_equal_values(rows):
    values = MIXED.rank(pool_of(rows))
    assert values == pytest.approx(np.full(len(rows), values[0]))


def test_an_empty_response_is_never_picked():
    values = blend_selection(1.0).rank(Pool(["", "a"], [5.0, -5.0], [-1.0, -99.0], [1, 1]))
    assert values.argmax() == 1


def test_scores_that_differ_by_rounding_do_not_decide():
    selection = Selection((Variant(VARIANTS[0], (1.0, 0, 1.0, 0, 0, 0, 0, 0), (0.1, 1, 0.5, 1, 1, 1, 1, 1)),))
    assert selection.rank(Pool(["a", "b"], [0.3, 0.3 + 1e-7], [-1.0, -2.0], [1, 1])).argmax() == 0


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (POOL, 0),
        (Pool(POOL.responses, POOL.scores), 1),
        (Pool(POOL.responses, POOL.scores, POOL.logprobs), 1),
        (Pool(POOL.responses, POOL.scores, [-1.0, None, -1.0, -1.0], [1, 1, 1, 1]), 1),
        (Pool(POOL.responses, POOL.scores, [-1.0, -math.inf, -1.0, -1.0], [1, 1, 1, 1]), 1),
        (Pool(POOL.responses, None, POOL.logprobs, POOL.tokens), 2),
        (Pool(POOL.responses, [0.1, math.nan, 0.2, 0.1]), 3),
        (Pool(POOL.responses), 3),
    ],
)
def test_a_pool_is_ranked_by_the_variant_of_its_signals(pool, expected):
    assert MIXED.variant(signals(pool)) is MIXED.variants[expected]
    assert np.isfinite(MIXED.rank(pool)).all()


def test_without_a_variant_the_scores_decide_else_the_consensus():
    assert Selection(()).rank(POOL).argmax() == 1
    assert Selection(()).rank(Pool(POOL.responses)).argmax() == 0


def test_the_blend_adds_the_mean_log_probability_to_the_score():
    values = blend_selection(0.1).rank(Pool(["a", "b c"], [0.5, 0.4], [-3.0, -1.0], [1, 2]))
    assert values[0] - values[1] == pytest.approx((0.5 - 0.3) - (0.4 - 0.05))


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="1 values for a pool of 2 responses"):
        signals(Pool(["a", "b"], [0.1]))


def test_a_selection_survives_its_file(tmp_path):
    assert read(str(tmp_path)) is None
    (tmp_path / "selection.json").write_text(to_text(MIXED))
    assert read(str(tmp_path)) == MIXED


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"label": {"metric": "unknown"}},
        {"variants": [{}]},
        {"variants": [VALID | {"weights": [1, 2]}]},
        {"variants": [VALID | {"weights": [math.nan]}]},
        {"variants": [VALID | {"scales": [0]}]},
        {"variants": [VALID | {"signals": ["unknown"]}]},
        {"variants": 3},
    ],
)
def test_a_damaged_file_is_a_clear_error(tmp_path, change):
    (tmp_path / "selection.json").write_text(json.dumps(MIXED.to_json() | change))
    with pytest.raises(CappyError, match=r"selection\.json"):
        read(str(tmp_path))


def test_a_file_of_valid_variants_is_read(tmp_path):
    (tmp_path / "selection.json").write_text(json.dumps(MIXED.to_json() | {"variants": [VALID]}))
    assert read(str(tmp_path)).variants[0].weights == (1.0,)


@pytest.mark.parametrize("text", ["", "[]", "3", "{"])
def test_a_file_of_another_kind_is_a_clear_error(tmp_path, text):
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(CappyError, match=r"selection\.json"):
        read(str(tmp_path))
