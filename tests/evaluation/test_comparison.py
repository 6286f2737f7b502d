"""Picks of the baselines and comparisons of methods, with values computed by hand."""

from __future__ import annotations

import pytest

from cluster.config import EvaluationConfig, LabelConfig
from cluster.errors import CappyError
from evaluation.comparison import compare_methods, pick_baselines
from tests.evaluation.conftest import candidate
from training.selection import Selection, Variant, blend_selection

DECODINGS = [{"name": "hot", "temperature": 1.0}, {"name": "greedy", "temperature": 0.0}, {"name": "cool", "temperature": 0.5}]


def row(*candidates, dataset="task"):
    return {"id": "0", "dataset": dataset, "instruction": "?", "references": ["x"], "candidates": list(candidates)}


def scored(*numbers, dataset="task"):
    """Return a row whose first candidate is greedy; each pair of numbers is (Rouge-L, score)."""
    return row(
        *(
            {**candidate(f"{at}", label, "greedy" if at == 0 else "hot", -1.0 - at), "score": score}
            for at, (label, score) in enumerate(numbers)
        ),
        dataset=dataset,
    )


def test_greedy_and_the_first_sample_are_identified_by_the_temperatures_of_the_sampler():
    rows = [
        row(
            candidate("a", 0.1, "cool", -1), candidate("b", 0.2, "hot", -9), candidate("c", 0.3, "greedy", -2), candidate("d", 0, "hot", -1)
        )
    ]
    picks = pick_baselines(rows, DECODINGS).picks
    assert (picks["greedy"].tolist(), picks["sample"].tolist()) == ([2], [1])


def test_self_score_by_sum_favours_short_answers_and_by_mean_does_not():
    rows = [row(candidate("short", 0, "greedy", -2.0, tokens=1), candidate("long", 1, "hot", -6.0, tokens=6))]
    picks = pick_baselines(rows, DECODINGS).picks
    assert (picks["self_sum"].tolist(), picks["self_mean"].tolist()) == ([0], [1])


def test_an_empty_response_of_no_tokens_does_not_divide_by_zero():
    rows = [row(candidate("", 0, "greedy", -0.5, tokens=0), candidate("x", 1, "hot", -0.2, tokens=1))]
    assert pick_baselines(rows, DECODINGS).picks["self_mean"].tolist() == [1]


def test_a_baseline_that_no_row_allows_is_left_out_with_the_reason():
    found = pick_baselines([row(candidate("a", 0, "hot", None))], [{"name": "hot", "temperature": 1.0}])
    assert list(found.picks) == ["sample", "consensus"]
    assert "temperature 0" in found.left_out["greedy"]
    assert "log-probabilities" in found.left_out["self_sum"]


def test_a_row_that_lacks_a_baseline_is_left_out_for_all_methods():
    complete = row(candidate("a", 0, "greedy", -1), candidate("b", 0, "hot", -1))
    found = pick_baselines(
        [complete, row(candidate("c", 0, "hot", -1)), row(candidate("d", 0, "greedy", -1), candidate("e", 0, "hot", None))], DECODINGS
    )
    assert found.rows == [complete]
    assert found.incomplete == 2


def test_every_set_has_the_consensus_as_a_baseline():
    rows = [row(candidate("a b", 0, "unknown", None), candidate("c a", 1, "unknown", None), candidate("c a d", 1, "unknown", None))]
    found = pick_baselines(rows, DECODINGS)
    assert {name: picks.tolist() for name, picks in found.picks.items()} == {"consensus": [1]}
    assert list(found.left_out) == ["greedy", "sample", "self_sum", "self_mean"]


def test_the_label_metric_compares_the_candidates():
    rows = [row(candidate("x y", 0, "greedy", -1), candidate("y x", 0, "hot", -1), candidate("y x z", 0, "hot", -1))]
    assert pick_baselines(rows, DECODINGS).picks["consensus"].tolist() == [1]
    assert pick_baselines(rows, DECODINGS, LabelConfig(metric="exact_match")).picks["consensus"].tolist() == [0]


def test_rows_without_a_common_decoding_are_an_error_with_the_fix():
    with pytest.raises(CappyError, match="generate the set"):
        pick_baselines([row(candidate("a", 0, "greedy", -1)), row(candidate("a", 0, "hot", -1))], DECODINGS)


def selected(rows, base, **selections):
    return compare_methods(rows, base, EvaluationConfig(resamples=100), 0, selections)


def compared(rows, resamples=200):
    return compare_methods(rows, pick_baselines(rows, DECODINGS).picks, EvaluationConfig(resamples=resamples), seed=0)


def test_results_of_two_tasks_by_hand():
    rows = [
        scored((0.2, 0.1), (0.6, 0.9), (1.0, 0.5)),  # greedy 20, sample and scorer 60, oracle 100
        scored((0.4, 0.9), (0.0, 0.9), (0.8, 0.2)),  # equal scores: the first candidate, which is the greedy one
        scored((0.5, 0.0), (0.1, 1.0), dataset="other"),  # a loss
    ]
    results = compared(rows).results
    means = {method: each["mean"] for method, each in results["averages"].items()}
    assert means == pytest.approx(
        {"greedy": 40, "sample": 20, "self_sum": 40, "self_mean": 40, "consensus": 40, "scorer": 30, "oracle": 70}
    )
    assert results["best_baseline"] == "greedy"
    assert results["gain"]["mean"] == pytest.approx(-10)
    assert results["gap_closed"]["mean"] == pytest.approx(-1 / 3)
    assert {baseline: each["mean"] for baseline, each in results["gains"]["scorer"].items()} == pytest.approx(
        {"greedy": -10, "sample": 10, "self_sum": -10, "self_mean": -10, "consensus": -10}
    )
    assert results["gains"]["scorer"]["greedy"] == results["gain"]
    assert results["outcomes"] == {"wins": 1, "ties": 1, "losses": 1}
    assert results["per_task"]["other"]["methods"]["scorer"]["mean"] == pytest.approx(10)


def test_the_blend_adds_the_mean_log_probability_at_its_weight():
    # Mean log-probabilities are -1/4, -2/4 and -3/4: at weight 2 the first leads by 0.5 and by 1.
    rows = [scored((0.2, 0.1), (0.6, 0.9), (1.0, 0.5)), scored((0.4, 0.5), (0.0, 0.9), (0.8, 0.2))]
    base = pick_baselines(rows, DECODINGS).picks
    blend = selected(rows, base, blend=[blend_selection(2.0)] * 2)
    assert blend.picks["blend"].tolist() == [1, 0]
    assert blend.results["methods"] == ["greedy", "sample", "self_sum", "self_mean", "consensus", "scorer", "blend", "oracle"]
    assert selected(rows, base, blend=[blend_selection(0.0)] * 2).picks["blend"].tolist() == [1, 1]
    for each in rows:
        each["candidates"][0]["logprob"] = None
    assert "blend" not in selected(rows, {"greedy": base["greedy"]}, blend=[blend_selection(2.0)] * 2).picks


def test_each_row_is_ranked_by_the_selection_of_its_scorer_or_by_the_score():
    rows = [scored((0.2, 0.1), (0.6, 0.9), (1.0, 0.5)), scored((0.4, 0.5), (0.0, 0.9), (0.8, 0.2))]
    base = pick_baselines(rows, DECODINGS).picks
    lowest = Selection((Variant(("score",), (-1.0,), (1.0,)),))
    compared = selected(rows, base, fitted=[None, lowest])
    assert compared.picks["fitted"].tolist() == [1, 2]
    assert set(compared.results["gains"]) == {"scorer", "fitted"}
    assert "fitted" not in selected(rows, base, fitted=[None, None]).picks


def test_the_fitted_selection_is_compared_with_its_variants_without_the_score():
    rows = [scored((0.2, 0.1), (0.6, 0.9), (1.0, 0.5)), scored((0.4, 0.5), (0.0, 0.9), (0.8, 0.2))]
    base = pick_baselines(rows, DECODINGS).picks
    by_score = Variant(("score",), (1.0,), (1.0,))
    selection = Selection((by_score, Variant(("logprob_mean",), (-1.0,), (1.0,))))
    compared = selected(rows, base, fitted_no_scorer=[selection, None], fitted=[selection, None])
    assert compared.picks["fitted"].tolist() == [1, 1]
    # The third candidate has the lowest log-probability; without a selection the consensus decides.
    assert compared.picks["fitted_no_scorer"].tolist() == [2, base["consensus"][1]]
    gains = compared.results["gains"]
    assert set(gains["fitted"]) - set(gains["fitted_no_scorer"]) == {"fitted_no_scorer"}
    assert gains["fitted"]["fitted_no_scorer"]["mean"] == pytest.approx(100 * ((0.6 - 1.0) + (0.0 - rows[1]["candidates"][0]["label"])) / 2)
    only_scored = Selection((by_score,))
    assert "fitted_no_scorer" not in selected(rows, base, fitted_no_scorer=[only_scored] * 2, fitted=[only_scored] * 2).picks


def test_curves_end_at_the_averages_and_start_at_the_random_pick():
    results = compared([scored((0.2, 0.1), (0.6, 0.9), (1.0, 0.5)), scored((0.4, 0.9), (0.0, 0.2), (0.8, 0.3), dataset="other")]).results
    curves = results["curves"]
    assert curves["k"] == [1, 2, 3]
    for method in ("scorer", "oracle", "self_sum", "self_mean"):
        assert curves[method]["mean"][0] == pytest.approx(curves["random"]["mean"][0])
        assert curves[method]["mean"][-1] == pytest.approx(results["averages"][method]["mean"])


def test_the_gap_is_undefined_if_no_candidate_beats_the_baseline():
    assert compared([scored((1.0, 0.5), (0.0, 0.1))]).results["gap_closed"] is None


def test_quality_uses_distinct_responses_and_is_null_if_all_labels_are_equal():
    repeated = scored((1.0, 1.0), (0.0, 0.5), (0.0, 0.5))
    repeated["candidates"][2]["response"] = repeated["candidates"][1]["response"]
    assert compared([repeated]).results["quality"] == pytest.approx({"spearman": 1.0, "pairwise_accuracy": 1.0, "mse": 0.125})
    assert compared([scored((0.5, 0.1), (0.5, 0.9))]).results["quality"]["spearman"] is None


def test_large_pools_have_curves_of_a_few_dozen_points():
    results = compared([scored(*((at / 200, (at * 37 % 200) / 200) for at in range(200)))]).results
    assert results["curves"]["k"][0] == 1
    assert results["curves"]["k"][-1] == 200
    assert len(results["curves"]["k"]) <= 32


def test_the_log_probabilities_of_several_llms_are_not_compared():
    mixed = row({**candidate("a", 0, "greedy", -1), "model": "one"}, {**candidate("b", 1, "hot", -2), "model": "two"})
    single = row({**candidate("a", 0, "greedy", -1), "model": "one"}, {**candidate("b", 1, "hot", -2), "model": "one"})
    found = pick_baselines([mixed, single], DECODINGS)
    assert list(found.picks) == ["greedy", "sample", "consensus"] and len(found.rows) == 2
    assert found.left_out["self_mean"] == "the candidates are of several LLMs, whose log-probabilities are not comparable"
    assert "self_sum" in pick_baselines([single], DECODINGS).picks
