import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.budget import Budget


def test_a_unit_reserves_the_most_it_can_cost_and_settles_what_it_did_cost():
    budget = Budget(1.0, spent=0.25)
    assert budget.reserve("a", 0.5)
    assert (budget.spent, budget.reserved) == (0.25, 0.5)
    assert not budget.reserve("b", 0.5)
    budget.settle("a", 0.125)
    assert (budget.spent, budget.reserved) == (0.375, 0.0)
    assert budget.reserve("b", 0.5)


def test_a_unit_lost_under_way_counts_with_all_it_was_promised():
    budget = Budget(1.0)
    assert budget.reserve("a", 0.5) and budget.reserve("a", 0.5)
    assert (budget.spent, budget.reserved) == (0.5, 0.5)
    assert not budget.reserve("a", 0.5)
    assert (budget.spent, budget.reserved) == (1.0, 0.0)


def test_without_a_ceiling_all_is_counted_and_nothing_refused():
    budget = Budget(None)
    assert budget.reserve("a", 1e9)
    budget.settle("a", 1e9)
    assert budget.spent == 1e9


def test_only_a_unit_under_way_settles():
    with pytest.raises(KeyError):
        Budget(1.0).settle("a", 0.1)


unit = st.sampled_from("abcd")
dollars = st.floats(0, 3)


@given(st.floats(0, 5), st.lists(st.tuples(unit, dollars, st.floats(0, 1))))
def test_spent_and_promised_never_pass_the_ceiling(ceiling, steps):
    budget, promised = Budget(ceiling), {}
    for name, most, share in steps:
        if name in promised:
            budget.settle(name, promised.pop(name) * share)
        elif budget.reserve(name, most):
            promised[name] = most
        assert budget.spent + budget.reserved <= ceiling + 1e-9
        assert budget.reserved == pytest.approx(sum(promised.values()))
