import numpy as np
import pytest

from training.selection import TEXT_SIGNALS, VARIANTS, Pool
from training.selection_fit import MIN_POOLS, fit_selection

WORDS = ["red", "blue", "green", "fox", "dog", "bird", "runs", "jumps", "sleeps", "far"]


def made_pools(count, seed, *, score_noise=0.2, logprob_noise=0.2, scored=True, logprobs=True):
    """Return pools whose scores and log-probabilities are the label plus independent noise, with the labels."""
    draw = np.random.default_rng(seed)
    pools, labels = [], []
    for _ in range(count):
        labels_C = draw.random(8)
        scores = draw.normal() + labels_C + draw.normal(0, score_noise, 8)
        means = labels_C + draw.normal(0, logprob_noise, 8) - 2
        responses = [" ".join(draw.choice(WORDS, 4)) for _ in range(8)]
        pools.append(Pool(responses, scores if scored else None, 4 * means if logprobs else None, [4] * 8 if logprobs else None))
        labels.append(labels_C)
    return pools, labels


def mean_pick(values, labels):
    return np.mean([labels_C[each.argmax()] for each, labels_C in zip(values, labels, strict=True)])


def rows(pools):
    return [str(number) for number in range(len(pools))]


def test_two_noisy_signals_pick_better_than_each_alone():
    pools, labels = made_pools(100, 1)
    selection = fit_selection(pools, labels, rows(pools)).selection
    held_out, correct = made_pools(300, 2)
    fitted = mean_pick([selection.rank(pool) for pool in held_out], correct)
    assert fitted > mean_pick([pool.scores for pool in held_out], correct) + 0.01
    assert fitted > mean_pick([pool.logprobs for pool in held_out], correct) + 0.01


def test_the_cross_validated_gain_is_that_of_other_rows():
    pools, labels = made_pools(200, 3)
    measured = fit_selection(pools, labels, rows(pools)).selection.variants[0].cross_validated
    held_out, correct = made_pools(1000, 4)
    scores_alone = mean_pick([pool.scores for pool in held_out], correct)
    assert measured["score"] == pytest.approx(mean_pick([pool.scores for pool in pools], labels))
    assert measured["score"] == pytest.approx(scores_alone, abs=0.03)
    assert measured["random"] < measured["score"] < measured["fitted"] < measured["oracle"]


def test_signals_without_information_do_not_pretend_to_gain():
    pools, labels = made_pools(60, 5, score_noise=1e6, logprob_noise=1e6)
    measured = fit_selection(pools, labels, rows(pools)).selection.variants[0].cross_validated
    assert abs(measured["fitted"] - measured["random"]) < 0.1


def test_each_set_of_signals_has_a_variant():
    pools, labels = made_pools(30, 6)
    assert [each.signals for each in fit_selection(pools, labels, rows(pools)).selection.variants] == list(VARIANTS)
    pools, labels = made_pools(30, 6, logprobs=False)
    assert [each.signals for each in fit_selection(pools, labels, rows(pools)).selection.variants] == [VARIANTS[1], VARIANTS[3]]
    pools, labels = made_pools(30, 6, scored=False, logprobs=False)
    assert [each.signals for each in fit_selection(pools, labels, rows(pools)).selection.variants] == [TEXT_SIGNALS]


def test_pools_of_a_group_are_in_one_fold():
    # The score is right in one group and wrong in the other, so a fit on one group fails on the other.
    pools, labels = made_pools(40, 7, logprobs=False)
    turned = [Pool(pool.responses, -np.asarray(pool.scores)) for pool in pools[20:]]
    measured = fit_selection([*pools[:20], *turned], labels, ["right"] * 20 + ["wrong"] * 20).selection.variants[0].cross_validated
    assert measured["fitted"] <= measured["random"] + 0.02


def test_one_group_is_fitted_without_cross_validation():
    pools, labels = made_pools(30, 8)
    variant = fit_selection(pools, labels, ["only"] * 30).selection.variants[0]
    assert variant.cross_validated == {}
    assert variant.weights[0] > 0


def test_a_prior_decides_where_few_pools_cannot():
    many, labels = made_pools(300, 9, logprob_noise=1e6)
    prior = fit_selection(many, labels, rows(many)).selection
    few, few_labels = made_pools(10, 10, score_noise=0.6, logprob_noise=1e6)
    held_out, correct = made_pools(500, 11, logprob_noise=1e6)
    alone, started = fit_selection(few, few_labels, rows(few)), fit_selection(few, few_labels, rows(few), prior=prior)
    picked = [mean_pick([each.selection.rank(pool) for pool in held_out], correct) for each in (alone, started)]
    assert picked[1] > picked[0]


def test_the_order_of_the_pools_changes_nothing_but_roundings():
    pools, labels = made_pools(30, 12)
    selection = fit_selection(pools, labels, rows(pools)).selection
    turned = fit_selection(pools[::-1], labels[::-1], rows(pools)[::-1]).selection
    for each, other in zip(selection.variants, turned.variants, strict=True):
        assert each.l2 == other.l2
        assert other.weights == pytest.approx(each.weights, abs=1e-6)


def test_too_few_informative_pools_give_no_selection():
    pools, labels = made_pools(MIN_POOLS, 13)
    assert fit_selection(pools, labels, rows(pools)) is not None
    assert fit_selection(pools[1:], labels[1:], rows(pools[1:])) is None
    equal = [np.full(8, 0.5)] * len(pools)
    assert fit_selection(pools, equal, rows(pools)) is None
    assert fit_selection([], [], []) is None


@pytest.mark.parametrize(
    "hostile",
    [
        Pool([""] * 8, [0.0] * 8, [-1.0] * 8, [0] * 8),
        Pool(["same"] * 8, [0.5] * 8, [-1.0] * 8, [1] * 8),
        Pool(list("abcdefgh"), [np.nan] * 8, [-np.inf] * 8, [1] * 8),
        Pool(list("abcdefgh"), [np.inf, *[0.0] * 7]),
        Pool(list("abcdefgh"), [1e30, *[0.0] * 7], [-1e30, *[0.0] * 7], [1] * 8),
    ],
)
def test_hostile_pools_leave_the_fit_finite(hostile):
    pools, labels = made_pools(20, 14)
    selection = fit_selection([*pools, hostile], [*labels, labels[0]], rows([*pools, hostile])).selection
    for pool in (*pools, hostile):
        assert np.isfinite(selection.rank(pool)).all()


def test_a_response_that_is_drawn_often_counts_once():
    # The most frequent response is right in two of three pools. In a softmax over draws its repeats would have most of the mass.
    draw = np.random.default_rng(15)
    pools, labels = [], []
    for number in range(120):
        frequent, rare = draw.choice(WORDS, 2, replace=False)
        pools.append(Pool([frequent] * 7 + [rare]))
        labels.append(np.array([1.0] * 7 + [0.0]) if number % 3 else np.array([0.0] * 7 + [1.0]))
    variant = fit_selection(pools, labels, rows(pools)).selection.variants[0]
    assert variant.cross_validated["fitted"] == variant.cross_validated["frequency"] == pytest.approx(2 / 3)


def test_words_of_the_instruction_can_mark_the_right_response():
    draw = np.random.default_rng(16)
    pools, labels = [], []
    for _ in range(40):
        instruction, *others = (" ".join(draw.choice(WORDS, 3, replace=False)) + f" {draw.integers(1000)}" for _ in range(5))
        at = int(draw.integers(5))
        pools.append(Pool([*others[:at], instruction, *others[at:]], instruction=f"Repeat: {instruction}!"))
        labels.append(np.eye(5)[at])
    assert fit_selection(pools, labels, rows(pools)).selection.variants[0].cross_validated["fitted"] > 0.9


def test_the_picks_are_those_of_each_pool_and_equal_labels_need_no_fit():
    pools, labels = made_pools(30, 17)
    same = Pool(["a", "b"], [0.1, 0.2], [-1.0, -2.0], [1, 1])
    plain = Pool(["a", "b"], [0.1, 0.2])  # without log-probabilities: the first variant cannot rank it
    fitted = fit_selection([*pools, same, plain], [*labels, np.array([0.5, 0.5]), np.array([0.0, 1.0])], rows([*pools, same, plain]))
    assert fitted.picked[:30].mean() == pytest.approx(fitted.selection.variants[0].cross_validated["fitted"])
    assert all(value in of_pool for value, of_pool in zip(fitted.picked[:30], labels, strict=True))
    assert fitted.picked[30] == 0.5 and np.isnan(fitted.picked[31])
    assert np.isnan(fit_selection(pools, labels, ["only"] * 30).picked).all()
