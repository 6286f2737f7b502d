"""Candidates grouped by prompt in bounded memory, without repeats and contradictions."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from generation import export_pools
from generation.export_pools import Partitions, merge_candidates, pools
from generation.export_source import FLAT


def merged(rows, sources=(), valued=True):
    counts: Counter[str] = Counter()
    found = merge_candidates(rows, frozenset(sources), counts, valued=valued)
    return [tuple(each) for each in found], +counts


def table(count, first=0):
    rows = [(f"prompt {n % 37}", f"response {n}", n % 5 / 4, None) for n in range(first, first + count)]
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=FLAT)


def test_repeats_are_merged_and_the_best_comes_first():
    assert merged([("a", 0.2, None), ("b", 0.9, None), (" a\n", 0.2, None)]) == ([("b", 0.9), ("a", 0.2)], {"repeated": 1})


def test_ties_keep_their_order():
    assert merged([("b", 0.5, None), ("a", 0.5, None)])[0] == [("b", 0.5), ("a", 0.5)]


def test_a_text_with_two_values_is_left_out_unless_it_is_a_reference():
    assert merged([("a", 0.2, "sampled"), ("a", 0.9, "sampled")]) == ([], {"repeated": 1, "contradicting": 1})
    assert merged([("a", 0.2, "sampled"), ("a", 1.0, "reference")]) == ([("a", 1.0)], {"repeated": 1})
    assert merged([("a", 0.2, None), ("a", 0.2002, None)]) == ([("a", 0.2002)], {"repeated": 1})


def test_a_contradiction_counts_also_if_one_source_is_not_exported():
    assert merged([("a", 0.7, "sampled"), ("a", 0.0, "mismatched")], ["sampled"])[0] == []
    assert merged([("a", 1.0, "reference"), ("a", 1.0, "sampled"), ("b", 1.0, "reference")], ["sampled"]) == (
        [("a", 1.0)],
        {"repeated": 1, "other_sources": 1},
    )


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_empty_responses_and_missing_values_are_counted(value):
    rows = [("", 1.0, None), (None, 1.0, None), (" \n", 1.0, None), ("a", value, None)]
    assert merged(rows) == ([], {"empty": 3, "without_value": 1})
    assert merged([("a", value, None)], valued=False) == ([("a", float("-inf"))], {})
    assert merged([("b", value, None), ("a", 0.1, None), ("b", 0.2, None)], valued=False)[0] == [("b", 0.2), ("a", 0.1)]


def test_the_pools_of_several_files_are_those_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(export_pools, "_PENDING_BYTES", 2000)
    monkeypatch.setattr(export_pools, "_ROWS", 7)
    found = {}
    for files in (1, 5):
        with Partitions(tmp_path / str(files), files) as partitions:
            for first in range(0, 400, 40):
                partitions.add(table(40, first))
        read = [partitions.read(number) for number in range(files)]
        assert sum(map(len, read)) == 400 and (files == 1 or max(map(len, read)) < 300)
        groups = [group for each in read for group in pools(each)]
        assert len({prompt for prompt, _ in groups}) == len(groups) == 37
        found[files] = dict(groups)
    assert found[1] == found[5]
    assert [response for response, _, _ in found[1]["prompt 3"]] == [f"response {n}" for n in range(3, 400, 37)]


def test_an_empty_file_has_no_pools(tmp_path):
    with Partitions(tmp_path / "a", 2) as partitions:
        partitions.add(FLAT.empty_table())
    assert list(pools(partitions.read(1))) == []
