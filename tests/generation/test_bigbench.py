import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from generation import bigbench
from tests.conftest import SHARED_DATA


def test_rendering_is_zero_shot_with_the_tasks_own_prefixes_and_merges_equal_instructions():
    body = {
        "task_prefix": "Add.",
        "example_input_prefix": "\nIn: ",
        "examples": [
            {"input": "1+1", "target": "2"},
            {"input": "1+1", "target": ["two", "2"]},
            {"input": "x", "target": ""},
            {"input": "y"},
        ],
    }
    assert bigbench.render("add", body) == [{"subtask": "add", "instruction": "Add.\nIn: 1+1\nA: ", "references": ["2", "two"]}]


@pytest.mark.parametrize("task", ["tense", "auto_categorization", "conlang_translation", "physics_questions"])
def test_the_rows_out_of_the_archive_are_those_of_the_shared_set(task):
    expected = {
        row["instruction"]: sorted(row["references"]) for row in pq.read_table(SHARED_DATA / "bigbench" / f"{task}.parquet").to_pylist()
    }
    rows = {row["instruction"]: sorted(row["references"]) for _, _, row in bigbench.read([task], seed=1)}
    assert rows == expected


@pytest.mark.parametrize(("sizes", "validation"), [([100], 20), ([40], 16), ([10] * 20, 40), ([3, 3, 30], 16), ([5], 5)])
def test_validation_gets_a_fifth_and_at_least_sixteen_rows(sizes, validation):
    subtasks = [[{"subtask": str(n), "instruction": f"{n}-{i}", "references": ["x"]} for i in range(size)] for n, size in enumerate(sizes)]
    parts = bigbench.split(subtasks, "7:task")
    assert len(parts["validation"]) == validation
    assert len(parts["train"]) == sum(sizes) - validation
    assert not {row["instruction"] for row in parts["train"]} & {row["instruction"] for row in parts["validation"]}
    assert parts == bigbench.split(subtasks, "7:task") != bigbench.split(subtasks, "8:task")


def test_an_instruction_in_validation_leaves_train():
    twin = {"subtask": "b", "instruction": "same", "references": ["x"]}
    parts = bigbench.split([[{**twin, "subtask": "a"}] * 30, [twin] * 30], "1:task")
    assert len(parts["validation"]) >= 16 and parts["train"] == []


def test_a_task_that_is_not_there_or_has_no_targets_is_named():
    with pytest.raises(UsageError, match="BIG-bench has no JSON task 'tensse'"):
        list(bigbench.read(["tensse"], seed=1))
    with pytest.raises(UsageError, match="'anachronisms' is multiple-choice only"):
        list(bigbench.read(["anachronisms"], seed=1))
