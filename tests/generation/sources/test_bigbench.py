import hashlib
import json

import pytest

from cluster.config import BigBenchSource
from cluster.errors import UsageError
from generation.sources import bigbench, reader

pytestmark = pytest.mark.usefixtures("bigbench_tasks")


def test_render_uses_the_task_prefixes_and_merges_equal_instructions():
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
    assert bigbench.render_examples("add", body) == [{"subtask": "add", "instruction": "Add.\nIn: 1+1\nA: ", "references": ["2", "two"]}]


# From an independent rendering of the same package by another program: numbers of instructions and references, and the SHA-256 of
# all of them in the form of `digest` below.
RENDERED = {
    "auto_categorization": (328, 426, "8b9bca75fc129873e93e70309874d1b8a5de2b31bc97cdea43ce9e13b44c17a2"),
    "conlang_translation": (164, 164, "494cf68ff41ff45c5f0457269860535077ab3e625b02076e05ed7e4cbe4af432"),
    "physics_questions": (52, 95, "ff5793f6e29ac4dada3551602910758f5164537f6f12577c6eba0718a4e2f405"),
    "tense": (286, 286, "40beeca34fdec71bf98c4241f50329d437725745a3dc0a5c9c8430c6ab12049c"),
}


def digest(rows: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(rows.items()), ensure_ascii=False).encode()).hexdigest()


@pytest.mark.parametrize("task", RENDERED)
def test_tasks_read_from_the_archive_equal_an_independent_rendering(task):
    rows = {row["instruction"]: sorted(row["references"]) for _, _, row in bigbench.read_tasks([task], seed=1)}
    assert (len(rows), sum(map(len, rows.values())), digest(rows)) == RENDERED[task]


def test_rendered_tasks_contain_known_examples():
    rows = {row["instruction"]: row["references"] for _, _, row in bigbench.read_tasks(["tense", "physics_questions"], seed=1)}
    tense = "\nQ: A gardener swept up dead leaves. Change tense to SIMPLE PRESENT: \nA: "
    (rocket,) = (text for text in rows if text.startswith("\nQ: A 0.25-kg model rocket accelerates at 58 m/s/s on takeoff"))
    assert rows[tense] == ["A gardener sweeps up dead leaves."] and sorted(rows[rocket]) == ["17 N", "17.0 N"]


@pytest.mark.parametrize(("sizes", "validation"), [([100], 20), ([40], 16), ([10] * 20, 40), ([3, 3, 30], 16), ([5], 5)])
def test_split_puts_a_fifth_and_at_least_sixteen_rows_in_validation(sizes, validation):
    subtasks = [[{"subtask": str(n), "instruction": f"{n}-{i}", "references": ["x"]} for i in range(size)] for n, size in enumerate(sizes)]
    parts = bigbench.split_task(subtasks, "7:task")
    assert len(parts["validation"]) == validation
    assert len(parts["train"]) == sum(sizes) - validation
    assert not {row["instruction"] for row in parts["train"]} & {row["instruction"] for row in parts["validation"]}
    assert parts == bigbench.split_task(subtasks, "7:task") != bigbench.split_task(subtasks, "8:task")


def test_split_removes_validation_instructions_from_train():
    twin = {"subtask": "b", "instruction": "same", "references": ["x"]}
    parts = bigbench.split_task([[{**twin, "subtask": "a"}] * 30, [twin] * 30], "1:task")
    assert len(parts["validation"]) >= 16 and parts["train"] == []


def test_unknown_and_multiple_choice_only_tasks_raise_an_error_that_names_the_task():
    with pytest.raises(UsageError, match="BIG-bench has no JSON task 'tensse'"):
        list(bigbench.read_tasks(["tensse"], seed=1))
    with pytest.raises(UsageError, match="'anachronisms' is multiple-choice only"):
        list(bigbench.read_tasks(["anachronisms"], seed=1))


@pytest.mark.parametrize("task", ["tense", "physics_questions"])
def test_every_example_of_a_task_is_a_row_or_is_counted(task, capsys):
    (subtasks,) = bigbench.load_tasks([task])
    examples = sum(len(body["examples"]) for body in subtasks.values())
    without, repeated = bigbench.count_left_out(task, 1)
    rows = list(reader.read_rows(BigBenchSource(tasks=(task,)), 1))
    assert len(rows) + without + repeated == examples
    logged = capsys.readouterr().err
    assert (f"{task}: {without:,} examples have no target" in logged) is bool(without)
    assert (f"{task}: {repeated:,} examples repeat the instruction" in logged) is bool(repeated)
