import gzip
import json

import pyarrow as pa
import pyarrow.ipc
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


@pytest.mark.parametrize(("end", "codec"), [("gz", "gzip"), ("bz2", "bz2"), ("zst", "zstd"), ("lz4", "lz4")])
def test_compressed_files_of_several_parts_are_read_whole_and_truncated_ones_are_an_error(tmp_path, end, codec):
    with pa.OSFile(str(tmp_path / f"a.jsonl.{end}"), "wb") as file:
        for _ in range(2):  # e.g. `cat a.gz b.gz`
            with pa.BufferOutputStream() as part:
                with pa.CompressedOutputStream(part, codec) as stream:
                    stream.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
                file.write(part.getvalue())
    assert contents(tmp_path / f"a.jsonl.{end}") == ROWS * 2
    data = (tmp_path / f"a.jsonl.{end}").read_bytes()
    (tmp_path / f"b.jsonl.{end}").write_bytes(data[:-5])
    with pytest.raises(UsageError, match=r"b\.jsonl.* cannot be read: Truncated compressed stream"):
        contents(tmp_path / f"b.jsonl.{end}")


def test_tsv_and_arrow_files_are_read(tmp_path):
    (tmp_path / "a.TSV").write_text("question\tanswer\n1,2\tb\n")
    assert contents(tmp_path / "a.TSV") == [{"question": "1,2", "answer": "b"}]
    table = pa.Table.from_pylist(ROWS * 2000)
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert contents(tmp_path / name) == ROWS * 2000
        assert [row for _, row in files.read_rows(str(tmp_path / name), {"answer"})] == [{"answer": row["answer"]} for row in ROWS] * 2000


# Values that Arrow holds and Python does not.
OUT_OF_RANGE = pa.array([10**18, 0], pa.int64()).cast(pa.timestamp("us"))
NOT_UTF_8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"ok"]).buffers())


@pytest.mark.parametrize("column", [OUT_OF_RANGE, NOT_UTF_8, pa.StructArray.from_arrays([OUT_OF_RANGE], ["t"])])
def test_a_value_that_python_cannot_hold_concerns_only_its_row_and_only_if_its_column_is_needed(tmp_path, column):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"question": ["a", "b"], "odd": column}), path, store_schema=False)
    assert [row for _, row in files.read_rows(path, {"question"})] == [{"question": "a"}, {"question": "b"}]
    letter, good = (row for _, row in files.read_rows(path, {"question", "odd"}))
    assert isinstance(letter, DeadLetter) and letter.reason.startswith("`odd` cannot be read: ") and good["question"] == "b"
    # A template can use any column, so all are read; the value is missing.
    assert contents(path)[0] == {"question": "a"} and contents(path)[1] == good


def test_binary_columns_are_decoded_as_utf_8(tmp_path):
    rows = [{"question": "é".encode(), "answers": [b"a", b"\xff"], "nested": {"x": b"y"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert contents(tmp_path / "t.parquet") == [{"question": "é", "answers": ["a", "\udcff"], "nested": {"x": "y"}}]


def test_two_parquet_columns_of_one_name_are_an_error(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["answer", "answer"]), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"t\.parquet has the column answer more than once; rename or remove all but one"):
        contents(tmp_path / "t.parquet")


def test_all_columns_are_read_if_none_is_needed_so_that_the_error_can_name_them(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    assert [row for _, row in files.read_rows(str(tmp_path / "t.parquet"), {"question"})] == [{"text": "a"}]
