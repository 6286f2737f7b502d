import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.budget import Budget


def test_a_unit_reserves_its_maximum_cost_and_settles_its_actual_cost():
    budget = Budget(1.0, spent=0.25)
    assert budget.reserve("a", 0.5)
    assert (budget.spent, budget.reserved) == (0.25, 0.5)
    assert not budget.reserve("b", 0.5)
    budget.settle("a", 0.125)
    assert (budget.spent, budget.reserved) == (0.375, 0.0)
    assert budget.reserve("b", 0.5)


def test_the_reservation_of_an_interrupted_unit_counts_as_spent():
    budget = Budget(1.0)
    assert budget.reserve("a", 0.5) and budget.reserve("a", 0.5)
    assert (budget.spent, budget.reserved) == (0.5, 0.5)
    assert not budget.reserve("a", 0.5)
    assert (budget.spent, budget.reserved) == (1.0, 0.0)


def test_without_a_ceiling_no_unit_is_refused_and_costs_are_counted():
    budget = Budget(None)
    assert budget.reserve("a", 1e9)
    budget.settle("a", 1e9)
    assert budget.spent == 1e9


def test_a_unit_without_a_reservation_cannot_be_settled():
    with pytest.raises(KeyError):
        Budget(1.0).settle("a", 0.1)


unit = st.sampled_from("abcd")
dollars = st.floats(0, 3)


@given(st.floats(0, 5), st.lists(st.tuples(unit, dollars, st.floats(0, 1))))
def test_spent_and_reserved_never_exceed_the_ceiling(ceiling, steps):
    budget, reserved = Budget(ceiling), {}
    for name, max_cost, share in steps:
        if name in reserved:
            budget.settle(name, reserved.pop(name) * share)
        elif budget.reserve(name, max_cost):
            reserved[name] = max_cost
        assert budget.spent + budget.reserved <= ceiling + 1e-9
        assert budget.reserved == pytest.approx(sum(reserved.values()))
