"""The counts of the benchmark of killed processes: each fault of a run is counted."""

from __future__ import annotations

import pyarrow as pa
import pytest

from benchmarks import killed_verbs, kills


def rows(*pools):
    return [{"id": f"r{number}", "candidates": [{"response": text} for text in pool]} for number, pool in enumerate(pools)]


def outcome(published, **fields):
    blank = {"midway": 1, "committed": 2, "sampled_twice": 0, "changed": 0, "damage": [], "first_code": None, "engines_left": 0}
    return {**blank, "rows": published, **fields}


def test_a_row_of_a_sampled_unit_keeps_its_responses_in_any_order_and_across_rounds():
    first = pa.table({"id": ["r0", "r1"], "sampled": [[{"response": "a"}, {"response": "a"}], [{"response": "b"}]]})
    second = pa.table({"id": ["r0"], "round": [1], "sampled": [[{"response": "c"}]]})
    pools = killed_verbs.sampled_pools(first) | killed_verbs.sampled_pools(second)
    assert pools == {"r0": ["a", "a"], "r1": ["b"], "r0.1": ["c"]}
    assert killed_verbs.changed_pools(pools, rows("cab a".replace(" ", ""), "b")) == []
    assert killed_verbs.changed_pools(pools, rows("ab", "b")) == ["r0", "r0.1"]
    assert killed_verbs.changed_pools(pools, rows("aac")) == ["r1"]


def test_a_labelled_unit_has_only_the_sampled_responses():
    candidates = [{"response": "right", "source": "reference"}, {"response": "drawn", "source": "sampled"}]
    assert killed_verbs.sampled_pools(pa.table({"id": ["r0"], "candidates": [candidates]})) == {"r0": ["drawn"]}


def test_the_last_line_of_a_log_is_left_out_while_it_is_written(tmp_path):
    assert killed_verbs.read_calls(tmp_path / "log") == []
    (tmp_path / "log").write_text("r0 1.5 12 ab\nr1 1.7 1")
    assert killed_verbs.read_calls(tmp_path / "log") == [killed_verbs.Call("r0", 1.5, 12, "ab")]


@pytest.mark.parametrize(
    ("found", "synthetic", "real"),
    [
        (outcome(rows("ab", "c")), True, True),
        (outcome(list(reversed(rows("ab", "c")))), True, True),
        (outcome(rows("ax", "c")), False, True),
        (outcome(rows("a", "c")), False, False),
        (outcome(rows("ab")), False, False),
        (outcome(None), False, False),
        (outcome(rows("ab", "c"), sampled_twice=1), False, False),
        (outcome(rows("ab", "c"), changed=1), False, False),
        (outcome(rows("ab", "c"), damage=["part-0 is missing"]), False, False),
        (outcome(rows("ab", "c"), engines_left=1), False, False),
    ],
    ids=["same", "other order", "other response", "lost response", "lost row", "failed", "twice", "changed", "damaged", "engine left"],
)
def test_a_victim_passes_only_if_every_run_kept_everything(found, synthetic, real):
    expected = rows("ab", "c")
    counts = kills.summarize([outcome(expected), found], expected)
    assert (counts["kills"], counts["runs"]) == (2, 2)
    assert (kills.kept(counts, real=False), kills.kept(counts, real=True)) == (synthetic, real)
