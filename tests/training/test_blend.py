from __future__ import annotations

import pytest

from tests.training.test_validation import CLASSIFICATION, GENERATION, by_text, candidate, table
from training import blend


def test_the_blend_takes_the_weight_whose_picks_are_best_on_the_rows_it_is_fitted_on():
    # At a weight of 0.5 and more the second wins: 0.2 - w against 0.9 - 2 w.
    tally = blend.tally_picks(table(GENERATION[1:3]), by_text)
    assert tally[0] == 1 and blend.mean_label(tally, 0.0) == pytest.approx(0.4)
    weight = blend.fit_weight(tally)
    assert weight == 1.0 and blend.mean_label(tally, weight) == pytest.approx(0.8)
    both = blend.tally_picks(table(GENERATION[1:3], CLASSIFICATION, GENERATION[1:3]), by_text)
    assert both == pytest.approx(2 * tally)


def test_the_blend_is_the_scorer_where_the_llm_adds_nothing_or_says_nothing():
    same = [candidate("a0.9", 0.8, logprob=-4.0, tokens=4), candidate("b0.2", 0.4, logprob=-2.0, tokens=2)]
    assert blend.fit_weight(blend.tally_picks(table(same), by_text)) == 0.0
    silent = [candidate("a0.9", 0.8), candidate("b0.2", 0.4)]
    assert blend.fit_weight(blend.tally_picks(table(silent), by_text)) is None
    assert blend.mean_label(blend.EMPTY_TALLY, None) is None
