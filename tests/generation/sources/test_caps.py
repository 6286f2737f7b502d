import random

import pytest

from cluster.config import FilesSource, HubSource
from generation import few_shot
from generation.few_shot import PreparationCounts
from generation.sources.reader import read_rows
from generation.sources.row import DeadLetter
from tests.generation.sources.row_files import files_config, write_jsonl

ROWS = [
    *({"instruction": f"say {n}", "references": [str(n)], "dataset": "ab"[n % 2], "template": "t"} for n in range(40)),
    *({"instruction": f"yes? {n}", "references": ["yes"], "answer_choices": ["yes", "no"], "dataset": "a"} for n in range(9)),
]


def read(folder, rows, **settings):
    path = write_jsonl(folder / "rows.jsonl", rows)
    return [row for row in read_rows(FilesSource(path=str(path), kind="files", **settings), 7) if not isinstance(row, DeadLetter)]


def test_a_cap_takes_the_same_rows_in_any_order_and_a_larger_cap_takes_more(tmp_path):
    shuffled = random.Random(1).sample([*ROWS, *ROWS[:5]], len(ROWS) + 5)
    taken = {count: {row.instruction for row in read(tmp_path, ROWS, dataset_rows=count)} for count in (4, 12, 100)}
    assert {row.instruction for row in read(tmp_path, shuffled, dataset_rows=4)} == taken[4]
    assert taken[4] < taken[12] < taken[100] == {row["instruction"] for row in ROWS}
    groups = [(row.dataset, row.answer_choices is None) for row in read(tmp_path, ROWS, dataset_rows=4)]
    assert {group: groups.count(group) for group in groups} == {("a", True): 4, ("b", True): 4, ("a", False): 4}
    other = {row.instruction for row in read_rows(files_config(tmp_path / "rows.jsonl", "source.dataset_rows=4").source, 8)}
    assert other != taken[4]


def test_rows_with_choices_can_have_a_separate_cap(tmp_path):
    taken = read(tmp_path, ROWS, choice_rows=3)
    assert len(taken) == 40 + 3 and sum(row.answer_choices is not None for row in taken) == 3
    assert len(read(tmp_path, ROWS, choice_rows=3, dataset_rows=5)) == 5 + 5 + 3


def test_rows_with_a_long_instruction_are_left_out_counted_and_logged_once(tmp_path, capsys):
    rows = [
        *ROWS,
        {"instruction": "x" * 21, "references": ["a"], "dataset": "a"},
        {"instruction": "x" * 20, "references": ["a"], "dataset": "a"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    counts = PreparationCounts()
    config = files_config(path, "source.max_instruction_chars=20", "source.dataset_rows=100", "source.validation_fraction=0")
    prepared = list(few_shot.prepare_rows(config, counts=counts))
    assert len(prepared) == len(ROWS) + 1 and counts.too_long == 1
    assert capsys.readouterr().err.count("1 rows are left out: longer than source.max_instruction_chars=20") == 1


@pytest.mark.parametrize("source", [FilesSource(kind="files", path="rows.jsonl"), HubSource(kind="hub", name="./data")])
def test_unset_caps_are_not_part_of_the_settings_of_a_run(source):
    assert not {"max_instruction_chars", "dataset_rows", "data_dir"} & source.model_dump().keys()
    given = type(source)(**{**source.model_dump(), "dataset_rows": 3})
    assert given.model_dump()["dataset_rows"] == 3
