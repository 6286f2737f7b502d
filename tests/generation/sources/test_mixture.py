from collections import Counter

import pytest

from generation.sources import mixture
from generation.sources.row import DeadLetter, Instruction


def rows(dataset, count, template=None):
    return [Instruction(dataset, template, "train", f"{dataset} {template} {n}", ("x",)) for n in range(count)]


def test_the_t0_rule_divides_the_cap_of_a_dataset_by_its_templates():
    counts = {("big", "a"): 900, ("big", "b"): 50, ("small", "a"): 90}
    assert mixture.t0_caps(counts, 200) == {("big", "a"): 100, ("big", "b"): 50, ("small", "a"): 90}


@pytest.mark.parametrize(
    ("sizes", "weights", "total", "taken"),
    [
        ([100, 100], [1, 3], None, [33, 100]),
        ([100, 100], [1, 3], 40, [10, 30]),
        ([100, 10], [1, 1], 500, [10, 10]),
        ([9, 0], [1, 1], None, [0, 0]),
        ([100, 100, 100], [1, 1, 1], 100, [34, 33, 33]),
    ],
)
def test_rows_per_part_have_the_ratio_of_the_weights_until_a_part_is_used_up(sizes, weights, total, taken):
    assert mixture.rows_per_part(sizes, weights, total) == taken


def test_the_exact_number_of_rows_is_sampled_and_all_rows_are_equally_likely():
    pool = rows("d", 1000)
    letter = DeadLetter("f:1", "read", "bad", "")
    times = Counter()
    for seed in range(40):
        drawn = list(mixture.sample_rows([letter, *pool], lambda row: None, {None: 1000}, {None: 250}, seed))
        assert drawn[0] is letter and len(drawn) == len(set(drawn)) == 251
        times.update(int(row.instruction.split()[-1]) // 100 for row in drawn[1:])
    assert all(900 < times[tenth] < 1100 for tenth in range(10))
    assert drawn == list(mixture.sample_rows([letter, *pool], lambda row: None, {None: 1000}, {None: 250}, 39))


def test_any_section_of_interleaved_parts_has_the_ratio_of_the_whole():
    mixed = list(mixture.interleave([rows("a", 30), rows("b", 90)], [30, 90]))
    assert len(mixed) == 120
    for start in range(0, 120, 20):
        assert Counter(row.dataset for row in mixed[start : start + 20]) == {"a": 5, "b": 15}
