import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from generation.sources import files
from generation.sources.row import DeadLetter

ROWS = [{"question": 'one, "two"\nthree', "answer": "é"}, {"question": "q", "answer": "a"}]


def contents(path):
    return [row for _, row in files.read_rows(str(path))]


def test_all_file_formats_give_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    (tmp_path / "pretty.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "cells.csv").write_text('question,answer\r\n"one, ""two""\nthree",é\r\nq,a\r\n')
    with gzip.open(tmp_path / "zipped.csv.gz", "wb") as stream:
        stream.write((tmp_path / "cells.csv").read_bytes())
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table.parquet")
    found = files.find_data_files(str(tmp_path))
    assert len(found) == 7 and all(contents(uri) == ROWS for uri in found)
    assert [location for location, _ in files.read_rows(str(tmp_path / "list.json"))] == [
        f"{tmp_path}/list.json:1",
        f"{tmp_path}/list.json:2",
    ]


def test_one_json_object_is_one_row(tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({"Definition": "x", "Instances": []}, indent=1))
    assert contents(tmp_path / "task.json") == [{"Definition": "x", "Instances": []}]


def test_an_invalid_csv_row_is_a_dead_letter_and_later_rows_are_read(tmp_path):
    (tmp_path / "c.csv").write_bytes(b"a,b\n1,2,3\n,\xff\n5,6\n")
    letter, broken, last = contents(tmp_path / "c.csv")
    assert isinstance(letter, DeadLetter) and letter.reason == "the row has more cells than the header's 2" and letter.where.endswith(":2")
    assert broken == {"a": None, "b": "\udcff"} and last == {"a": "5", "b": "6"}


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz"])
def test_a_file_in_another_format_than_its_name_raises_an_error_of_one_line(tmp_path, name):
    (tmp_path / name).write_text("not that")
    with pytest.raises(UsageError, match=f"{name} cannot be read") as caught:
        contents(tmp_path / name)
    assert "\n" not in str(caught.value)
