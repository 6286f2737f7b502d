from __future__ import annotations

import pyarrow as pa
import pytest

from cluster import storage
from cluster.errors import CappyError
from generation.dataset import RegressionSet, add_statistics, compute_statistics, concat_tables, explode, open_shard, pair_table
from generation.schema import DATASET, PAIRS
from tests.generation.made_set import damage_page, publish, row


@pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
def test_batches_have_all_rows_in_order_and_at_most_the_given_number(place):
    publish(place, train=(6, 4))
    opened = RegressionSet(place)
    tables = list(opened.batches("train", 4))
    assert [len(table) for table in tables] == [4, 2, 4] and opened.rows("train") == 10
    assert pa.concat_tables(tables)["id"].to_pylist() == [f"{number:032x}" for number in range(10)]
    assert [table.column_names for table in opened.batches("validation", columns=["id"])] == [["id"]]
    assert opened.rows("test") == 0 and list(opened.batches("test")) == []


def test_batches_of_one_dataset_have_only_its_rows(tmp_path):
    publish(str(tmp_path), train=(6, 1))
    found = pa.concat_tables(RegressionSet(str(tmp_path)).batches("train", only="task 1"))
    assert found["dataset"].to_pylist() == ["task 1"] * 3
    assert list(RegressionSet(str(tmp_path)).batches("train", only="task 2")) == []


def test_a_damaged_and_a_missing_shard_are_errors(tmp_path):
    publish(str(tmp_path), train=(40,))
    opened = RegressionSet(str(tmp_path))
    (shard,) = (tmp_path / "data" / "train").iterdir()
    damage_page(shard)
    with pytest.raises(CappyError, match=rf"{shard} is damaged or missing \(.+\); copy or generate the set again"):
        list(opened.batches("train"))
    shard.unlink()
    with pytest.raises(CappyError, match=rf"{shard} is damaged or missing"), open_shard(str(shard)):
        pass


def test_a_row_count_that_differs_from_the_manifest_is_an_error(tmp_path):
    manifest = publish(str(tmp_path), train=(3,))
    storage.write_json(
        f"{tmp_path}/_MANIFEST.json", {**manifest, "counts": {**manifest["counts"], "train": {"instructions": 4, "pairs": 28}}}
    )
    with pytest.raises(CappyError, match=r"has 3 rows in split train, its manifest has 4; copy or generate the set again"):
        list(RegressionSet(str(tmp_path)).batches("train"))


def test_a_folder_without_a_manifest_is_not_opened(tmp_path):
    with pytest.raises(CappyError, match=str(tmp_path)):
        RegressionSet(str(tmp_path))


def test_tables_are_concatenated_up_to_the_limit_in_order():
    tables = [pa.table({"n": list(range(start, start + count))}) for start, count in ((0, 2), (2, 3), (5, 1), (6, 4), (10, 1))]
    joined = list(concat_tables(tables, 5))
    assert [table["n"].to_pylist() for table in joined] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]
    assert [len(table) for table in concat_tables(tables, 16, size=lambda table: table.nbytes)] == [2, 3, 5, 1]
    assert list(concat_tables([], 5)) == []


def test_duplicate_responses_are_one_pair_with_the_highest_label():
    pairs = explode(pa.Table.from_pylist([row(0), row(1)], DATASET), offset=7)
    assert len(pairs) == 12 and pairs.groups.tolist() == [7] * 6 + [8] * 6
    assert pairs.responses[:2] == ["right 0", "right 1"] and pairs.labels[:2].tolist() == [1.0, 0.0]
    assert pairs.responses.count("right 0") == 1 and pairs.instructions[0] == row(0)["instruction"]


def test_the_pair_table_keeps_duplicates_and_the_order():
    table = pair_table(pa.Table.from_pylist([row(0), row(1)], DATASET))
    assert table.schema.equals(PAIRS) and len(table) == 14
    assert table["response"].to_pylist().count("right 0") == 2
    assert table["id"].to_pylist() == [row(0)["id"]] * 7 + [row(1)["id"]] * 7


def test_statistics_of_two_tables_add_up_to_those_of_both():
    tables = [pa.Table.from_pylist([row(number, name)], DATASET) for number, name in ((0, "a"), (1, "b"), (2, "a"))]
    total = {}
    for table in tables:
        total = add_statistics(total, compute_statistics(table))
    assert total == compute_statistics(pa.concat_tables(tables))
    assert total["datasets"] == {"a": 2, "b": 1} and total["tokens"] == 3 * 5 * 3
    assert total["labels"] == [9, 0, 0, 3, 0, 3, 0, 0, 0, 6] and sum(total["labels"]) == total["pairs"] == 21
    assert compute_statistics(pa.Table.from_pylist([], DATASET))["pairs"] == 0
