"""The rows of each export format from the candidates of one prompt."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.export_formats import TABLE, Candidate, Selection, add_system, as_messages, pairs_by_margin

POOL = [Candidate("a", 1.0), Candidate("b", 0.6), Candidate("c", 0.55), Candidate("d", 0.2)]


def rows(form, candidates=POOL, **selection):
    made = TABLE[form].rows("say a", candidates, Selection(**selection))
    assert all(list(row) == list(TABLE[form].types) for row in made)
    return [tuple(row.values())[0 if form == "chat" else 1 :] for row in made]


@pytest.mark.parametrize("form", ["sft", "pairs"])
def test_the_best_responses_come_first_and_their_number_is_limited(form):
    assert [row[0] for row in rows(form, per_instruction=2)] == ["a", "b"]
    assert [row[0] for row in rows(form)] == ["a", "b", "c", "d"]


def test_responses_below_the_threshold_are_left_out():
    assert rows("sft", threshold=0.6) == [("a",), ("b",)]
    assert rows("sft", threshold=1.1) == []


def test_a_chat_has_the_instruction_and_the_response():
    ((chat,),) = rows("chat", per_instruction=1)
    assert chat == [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]
    assert add_system({"messages": chat}, "Be brief.")["messages"] == [{"role": "system", "content": "Be brief."}, *chat]


@pytest.mark.parametrize("form", ["dpo", "reward"])
def test_pairs_have_the_largest_margin_first(form):
    assert rows(form, per_instruction=1) == [("a", "d", pytest.approx(0.8))]
    assert [row[:2] for row in rows(form)] == [("a", "d"), ("a", "c"), ("a", "b")]  # b is rejected, so not chosen
    assert [row[:2] for row in rows(form, [Candidate("a", 1), Candidate("b", 0.9), Candidate("c", 0)])] == [("a", "c"), ("b", "c")]
    assert [row[:2] for row in rows(form, margin=0.45)] == [("a", "d"), ("a", "c")]
    assert rows(form, margin=0.9) == []


def test_equal_values_make_no_pair():
    assert rows("dpo", [Candidate("a", 0.5), Candidate("b", 0.5)]) == []
    assert rows("ranking", [Candidate("a", 0.5), Candidate("b", 0.5)]) == []


def test_a_margin_is_reached_in_spite_of_rounding():
    assert 0.3 - 0.2 < 0.1
    assert len(rows("dpo", [Candidate("a", 0.3), Candidate("b", 0.2)], margin=0.1)) == 1


@given(st.lists(st.integers(0, 6), max_size=9), st.integers(0, 4), st.none() | st.integers(1, 5))
def test_no_response_is_both_chosen_and_rejected_and_no_better_pair_is_left_out(values, margin, limit):
    pool = [Candidate(str(number), float(value)) for number, value in enumerate(sorted(values, reverse=True))]
    made = rows("dpo", pool, margin=margin, per_instruction=limit)
    assert not {chosen for chosen, _, _ in made} & {rejected for _, rejected, _ in made}
    margins = [row[2] for row in made]
    assert margins == sorted(margins, reverse=True) and all(each >= max(margin, 1) for each in margins)
    best = pool[0].value - pool[-1].value if pool else 0
    assert (best >= max(margin, 1)) == bool(made) and (not made or margins[0] == best)
    assert len(set(made)) == len(made) <= (limit or 99)


@given(st.lists(st.integers(0, 5), max_size=8))
def test_pairs_by_margin_yields_every_pair_once_in_order(values):
    values = sorted(map(float, values), reverse=True)
    found = list(pairs_by_margin(values))
    assert {(i, j) for _, i, j in found} == set(itertools.combinations(range(len(values)), 2))
    assert len(found) == len(values) * (len(values) - 1) // 2
    assert [margin for margin, _, _ in found] == sorted((a - b for a, b in itertools.combinations(values, 2)), reverse=True)


def test_kto_labels_by_the_threshold_and_leaves_out_the_margin_below_it():
    assert rows("kto") == [("a", True), ("b", True), ("c", True), ("d", False)]
    assert rows("kto", threshold=0.6) == [("a", True), ("b", True), ("d", False), ("c", False)]
    assert rows("kto", threshold=0.6, margin=0.1) == [("a", True), ("b", True), ("d", False)]
    assert rows("kto", threshold=0.6, per_instruction=1) == [("a", True), ("d", False)]


def test_a_ranking_has_the_responses_with_their_values():
    assert rows("ranking") == [(["a", "b", "c", "d"], [1.0, 0.6, 0.55, 0.2])]
    assert rows("ranking", per_instruction=3) == [(["a", "b", "d"], [1.0, 0.6, 0.2])]
    assert rows("ranking", margin=0.9) == []


@pytest.mark.parametrize("form", ["sft", "dpo", "reward", "kto"])
def test_texts_become_messages(form):
    (row, *_) = TABLE[form].rows("say a", POOL, Selection())
    made = as_messages(row, TABLE[form].texts, "Be brief.")
    assert made["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say a"}]
    for name in {"completion", "chosen", "rejected"} & row.keys():
        assert made[name] == [{"role": "assistant", "content": row[name]}]
    assert {name: made[name] for name in {"margin", "label"} & row.keys()} == {name: row[name] for name in {"margin", "label"} & row.keys()}
