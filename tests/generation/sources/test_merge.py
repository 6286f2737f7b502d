import resource
import tracemalloc
from pathlib import Path

import pytest

from cluster.errors import CappyError
from generation.sources import merge
from generation.sources.merge import merge_rows
from generation.sources.reader import read_rows
from generation.sources.row import DeadLetter, Instruction
from tests.generation.sources.row_files import files_config

ODD = Path(__file__).parents[2] / "data" / "odd"


def row(instruction="q", references=("x",), choices=None, split="train", **fields):
    return Instruction(
        **{"dataset": "d", "template": None, **fields}, instruction=instruction, references=references, split=split, answer_choices=choices
    )


def merged(rows):
    with merge_rows(rows) as found:
        return list(found), found.merged


def test_repeated_rows_become_one_row_with_all_references_in_the_order_of_first_appearance():
    rows = [row("b", ("2", "1")), row("a"), row("b", ("1", "3")), DeadLetter("f:4", "read", "bad", "{}"), row("c"), row("a")]
    found, repeats = merged(rows)
    assert found == [row("b", ("2", "1", "3")), row("a"), rows[3], row("c")]
    assert repeats == 2 and len(rows) == len(found) + repeats


@pytest.mark.parametrize(
    "other",
    [{"dataset": "e"}, {"template": "t"}, {"split": "validation"}, {"instruction": "q "}, {"choices": ("x", "y")}],
    ids=lambda fields: next(iter(fields)),
)
def test_rows_that_differ_in_another_field_are_not_merged(other):
    found, repeats = merged([row(), row(**other)])
    assert len(found) == 2 and repeats == 0


def test_rows_that_differ_in_their_choices_only_have_different_ids():
    rows = [row(choices=choices) for choices in (("x", "y"), ("x", "z"), ("x", "w"), ("x", "z"))]
    found, repeats = merged(rows)
    assert [each.answer_choices for each in found] == [("x", "y"), ("x", "z"), ("x", "w")] and repeats == 1
    assert found[0].id == rows[0].id and len({each.id for each in found}) == 3


@pytest.mark.parametrize(("name", "rows", "repeats"), [("dups.jsonl", 7, 5), ("mm_same_q.jsonl", 1, 5), ("sni_two_outputs.json", 1, 2)])
def test_odd_inputs_have_each_id_once(name, rows, repeats):
    config = files_config(ODD / name)
    found, count = merged(read_rows(config.source, config.seed))
    assert (len({each.id for each in found}), len(found), count) == (rows, rows, repeats)


def test_rows_on_disk_give_the_same_result_as_rows_in_memory(monkeypatch):
    rows = [row(f"say {n % 700}", (f"{n}",), choices=("a", "b") if n % 7 == 0 else None) for n in range(2000)]
    expected = merged(rows)
    monkeypatch.setattr(merge, "_CHUNK_BYTES", 600)
    with merge_rows(iter(rows)) as found:
        assert any(partition._written for partition in found._partitions)
        assert (list(found), found.merged) == expected == (list(found), found.merged)


def test_memory_does_not_grow_with_the_number_of_rows(monkeypatch):
    monkeypatch.setattr(merge, "_CHUNK_BYTES", 1 << 12)
    peaks = []
    for count in (4_000, 16_000):
        tracemalloc.start()
        with merge_rows(row(f"say {n} " + "text " * 300, (f"{n}",)) for n in range(count)) as found:
            assert sum(1 for _ in found) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] < 16_000 * 1500 / 2


def test_a_full_disk_is_one_line_with_the_folder_and_the_fix(monkeypatch):
    monkeypatch.setattr(merge, "_CHUNK_BYTES", 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(
            CappyError, match=r"^/\S+: the rows of the source cannot be stored .*; free space there, or set TMPDIR"
        ) as error:
            merged([row(f"say {n}") for n in range(5000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
