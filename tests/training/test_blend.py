from __future__ import annotations

import pytest

from tests.training.test_validation import CLASSIFICATION, GENERATION, by_text, candidate, table
from training import blend


def test_the_fitted_weight_has_the_best_picks_on_the_rows_of_the_fit():
    # Above a weight of 0.7 the second candidate wins: 0.2 - w against 0.9 - 2 w.
    tally = blend.tally_picks(table(GENERATION[1:3]), by_text)
    assert tally[0] == 1 and blend.mean_label(tally, 0.0) == pytest.approx(0.4)
    weight = blend.fit_weight(tally)
    assert weight == 1.0 and blend.mean_label(tally, weight) == pytest.approx(0.8)
    both = blend.tally_picks(table(GENERATION[1:3], CLASSIFICATION, GENERATION[1:3]), by_text)
    assert both == pytest.approx(2 * tally)


def test_the_weight_is_0_without_a_gain_and_none_without_log_probabilities():
    same = [candidate("a0.9", 0.8, logprob=-4.0, tokens=4), candidate("b0.2", 0.4, logprob=-2.0, tokens=2)]
    assert blend.fit_weight(blend.tally_picks(table(same), by_text)) == 0.0
    silent = [candidate("a0.9", 0.8), candidate("b0.2", 0.4)]
    assert blend.fit_weight(blend.tally_picks(table(silent), by_text)) is None
    assert blend.mean_label(blend.EMPTY_TALLY, None) is None


def test_log_probabilities_of_several_llms_give_no_weight():
    mixed = [candidate("a0.9", 0.8, logprob=-4.0, tokens=4), candidate("b0.2", 0.4, logprob=-2.0, tokens=2) | {"model": "other"}]
    assert blend.fit_weight(blend.tally_picks(table(mixed), by_text)) is None
