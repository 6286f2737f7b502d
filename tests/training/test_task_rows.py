from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from generation.dataset import RegressionSet
from tests.training.test_adapt_one import publish_tasks
from tests.training.test_adapt_one import task_rows as made_rows
from training import gate, task_rows
from training.task_rows import LeftOut


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    train = [*made_rows("colors", 40, 1), *made_rows("lonely", 5, 2), *made_rows("sides", 30, 3, choices=True)]
    validation = [*made_rows("colors", 30, 4), *made_rows("sides", 40, 5, choices=True)]
    return publish_tasks(str(tmp_path_factory.mktemp("rows") / "set"), train, validation)


def test_the_rows_of_a_dataset_are_read_without_the_row_groups_of_others(dataset: str):
    opened = RegressionSet(dataset)
    for name, count in (("colors", 40), ("lonely", 5), ("sides", 30), ("absent", 0)):
        tables = list(opened.batches("train", rows=7, columns=["dataset", "instruction"], only=name))
        assert sum(table.num_rows for table in tables) == count
        assert {value for table in tables for value in table["dataset"].to_pylist()} == ({name} if count else set())


def test_the_pairs_of_a_task_are_distinct_and_chosen_by_hash_for_any_order_of_rows(dataset: str, tmp_path: Path):
    pairs, seen = task_rows.collect_pairs(RegressionSet(dataset), "colors", 1000, seed=1)
    texts = list(zip(pairs.instructions, pairs.responses, strict=True))
    assert seen == 40 and len(texts) == len(set(texts)) > 90
    assert len(set(pairs.groups.tolist())) == len(set(pairs.instructions))
    reverse = publish_tasks(str(tmp_path / "reverse"), made_rows("colors", 40, 1)[::-1], made_rows("colors", 1, 4))
    cut, _ = task_rows.collect_pairs(RegressionSet(reverse), "colors", 20, seed=1)
    assert list(zip(cut.instructions, cut.responses, strict=True)) == texts[:20]
    assert np.array_equal(cut.labels, pairs.labels[:20])
    other, _ = task_rows.collect_pairs(RegressionSet(dataset), "colors", 20, seed=2)
    assert other.instructions != cut.instructions
    everything, _ = task_rows.collect_pairs(RegressionSet(dataset), None, 1000, seed=1)
    assert len(everything) > len(pairs)


def test_whole_instructions_are_chosen_with_all_their_pairs(dataset: str):
    everything, _ = task_rows.collect_pairs(RegressionSet(dataset), "colors", 1000, seed=1)
    pairs_of = Counter(everything.instructions)
    whole, seen = task_rows.collect_pairs(RegressionSet(dataset), "colors", 20, seed=1, whole=True)
    assert seen == 40 and len(whole) == 20 and np.array_equal(whole.groups, np.sort(whole.groups))
    *complete, last = dict.fromkeys(whole.instructions)
    chosen = Counter(whole.instructions)
    assert complete and all(chosen[text] == pairs_of[text] for text in complete) and chosen[last] <= pairs_of[last]
    other, _ = task_rows.collect_pairs(RegressionSet(dataset), "colors", 20, seed=2, whole=True)
    assert list(dict.fromkeys(other.instructions)) != [*complete, last]


def test_an_epoch_repeats_all_pairs_equally_and_is_cut_to_its_size():
    order = task_rows.epoch_order(7, 24, seed=1, epoch=0)
    assert len(order) == 24
    assert all(sorted(order[start : start + 7].tolist()) == list(range(7)) for start in (0, 7, 14))
    assert order[:7].tolist() != order[7:14].tolist() and order.tolist() != task_rows.epoch_order(7, 24, seed=1, epoch=1).tolist()
    assert sorted(task_rows.epoch_order(7, 3, seed=1, epoch=0).tolist()) == sorted(
        set(task_rows.epoch_order(7, 3, seed=1, epoch=0).tolist())
    )


def test_validation_rows_are_chosen_by_hash_and_split_between_gate_and_results(dataset: str):
    opened = RegressionSet(dataset)
    sampled = task_rows.candidate_rows(opened, "validation", "colors", 1000, seed=1)
    assert len(sampled) == 30
    few = task_rows.candidate_rows(opened, "validation", "sides", 5, seed=1)
    assert few.equals(task_rows.candidate_rows(opened, "validation", "sides", 1000, seed=1)[:5])
    deciding, figures = gate.split_validation_rows(few, 0.5)
    assert (len(deciding), len(figures)) == (3, 2) and pa.concat_tables([deciding, figures]).equals(few)
    deciding, figures = gate.split_validation_rows(few, 1.0)
    assert deciding.equals(few) and figures is few
    assert len(task_rows.candidate_rows(opened, "train", "absent", 5, seed=1)) == 0


def test_the_pairs_of_a_fold_have_no_instruction_of_its_held_out_rows(dataset: str):
    opened = RegressionSet(dataset)
    everything, rows = task_rows.collect_pairs(opened, "colors", 1000, seed=1)
    without = frozenset(everything.instructions[:10])
    left, fewer = task_rows.collect_pairs(opened, "colors", 1000, seed=1, left_out=LeftOut(without, frozenset()))
    assert not without & set(left.instructions) and without | set(left.instructions) == set(everything.instructions)
    assert fewer < rows and len(left) < len(everything)


def test_the_pairs_of_a_fold_do_not_call_the_answers_of_its_held_out_rows_wrong(tmp_path: Path):
    def row(name: str, references: list[str], mismatched: list[str]) -> dict[str, Any]:
        made = made_rows("colors", 1, 1)[0]
        texts = {"reference": (1.0, references), "mismatched": (0.0, mismatched), "sampled": (0.0, ["own"])}
        found = [
            {**made["candidates"][-1], "response": text, "label": label, "source": source}
            for source, (label, several) in texts.items()
            for text in several
        ]
        return {**made, "instruction": name, "candidates": found}

    rows = [row("a", ["own", "shared"], ["x"]), row("b", ["shared"], ["own", "y"]), row("c", ["z"], ["shared", "own"])]
    opened = RegressionSet(publish_tasks(str(tmp_path / "set"), rows, rows[:1]))
    only = task_rows.only_references(opened, None, frozenset("a"))
    assert only == {"own"}  # "shared" is right in another row too
    pairs, left = task_rows.collect_pairs(opened, None, 100, 1, LeftOut(frozenset("a"), only))
    found = {(instruction, response) for instruction, response in zip(pairs.instructions, pairs.responses, strict=True)}
    # The sample "own" of each row stays, because the LLM gave it.
    assert left == 2 and found == {("b", "shared"), ("b", "y"), ("b", "own"), ("c", "z"), ("c", "shared"), ("c", "own")}
