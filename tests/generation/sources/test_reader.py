from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.pairs import bigbench_rows
from cluster.config import load
from cluster.errors import UsageError
from generation import few_shot
from generation.sources import reader
from generation.sources.notes import Notes
from generation.sources.reader import read_rows
from generation.sources.row import DeadLetter, Instruction
from tests.generation.sources.row_files import ROWS, files_config, write_jsonl


def rows_of(config):
    return list(read_rows(config.source, config.seed))


BAD_ROWS = [
    ({"references": ["a"]}, "`instruction` is missing; the row has references"),
    ({"instruction": "x"}, "`references` is missing"),
    ({"instruction": "x", "references": []}, "`references` is empty"),
    ({"instruction": "x", "references": {"a": 1}}, "`references` is a dict; it must be a list of texts"),
    ({"instruction": "x", "references": ["a", True]}, "`references` holds a bool"),
    ({"instruction": "x", "references": ["a", "  "]}, "`references` holds an empty text"),
    ({"instruction": [5], "references": ["a"]}, "`instruction` is a list; it must be text"),
    ({"instruction": " ", "references": ["a"]}, "`instruction` is empty"),
    ({"instruction": "x", "references": ["a"], "split": "later"}, "`split` is 'later'; it must be train or validation"),
    ({"instruction": "x", "references": ["a"], "answer_choices": []}, "`answer_choices` is empty"),
    ('{"instruction": "x", "references": ["\\ud800"]}', "lone surrogate"),
    ('{"instruction": ', "the line is not JSON"),
    ("[1, 2]", "the row is a list"),
    ("[" * 100_000, "the line is not JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_row_becomes_a_dead_letter_and_the_other_rows_are_read(tmp_path, row, reason):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], row, ROWS[1]])
    first, letter, last = rows_of(files_config(path))
    assert isinstance(letter, DeadLetter) and reason in letter.reason
    assert letter.where == f"{path}:2" and len(letter.row) <= 500
    assert json.loads(letter.to_json())["stage"] == "read"
    assert (first.instruction, last.instruction) == ("say 0", "say 1")


def test_a_line_that_is_not_utf_8_is_a_dead_letter(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"instruction": "\xff\xfe"}\n' + json.dumps(ROWS[0]).encode())
    letter, row = rows_of(files_config(tmp_path / "rows.jsonl"))
    assert isinstance(letter, DeadLetter) and isinstance(row, Instruction)


def test_a_source_without_a_usable_row_is_an_error_with_an_example_row(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    with pytest.raises(UsageError, match=r"no row can be used; each needs `instruction` \(text\) and `references`"):
        rows_of(files_config(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("pattern", ["missing.jsonl", "*.tsv", ""])
def test_a_path_without_files_is_an_error(tmp_path, pattern):
    with pytest.raises(UsageError, match=r"found no .jsonl, .ndjson, .json, .csv, .parquet \(or .gz\) file"):
        rows_of(files_config(tmp_path / pattern))


def test_jsonl_gzip_parquet_and_s3_give_the_same_rows(tmp_path, bucket):
    from cluster import storage

    def contents(path):
        return [replace(row, part="") for row in rows_of(files_config(path))]

    plain = contents(write_jsonl(tmp_path / "d.jsonl", ROWS))
    (tmp_path / "z").mkdir()
    with gzip.open(tmp_path / "z" / "d.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    storage.upload_file(tmp_path / "d.jsonl", f"{bucket}/in/d.jsonl")
    storage.upload_file(tmp_path / "z" / "d.jsonl.gz", f"{bucket}/zip/d.jsonl.gz")
    for path in (tmp_path / "z", tmp_path / "d.parquet", f"{bucket}/in/*.jsonl", f"{bucket}/zip/"):
        assert contents(path) == plain
    assert len(plain) == 40


def test_the_split_is_a_hash_of_the_instruction_unless_the_row_has_one(tmp_path):
    rows = rows_of(
        files_config(write_jsonl(tmp_path / "d.jsonl", [*ROWS, {**ROWS[0], "split": "validation"}, {**ROWS[0], "split": "train"}]))
    )
    assert [row.split for row in rows[-2:]] == ["validation", "train"]
    counts = [row.split for row in rows[:40]].count("validation")
    assert 2 <= counts <= 16
    assert all(row.split == "train" for row in rows_of(files_config(tmp_path / "d.jsonl", "source.validation_fraction=0"))[:40])


def test_limits_apply_to_each_dataset_and_split(tmp_path):
    rows = [{**row, "dataset": name, "split": split} for row in ROWS for name in "ab" for split in ("train", "validation")]
    config = files_config(write_jsonl(tmp_path / "d.jsonl", rows), "source.train_rows=3", "source.validation_rows=2")
    taken = [(row.dataset, row.split) for row in rows_of(config)]
    assert {key: taken.count(key) for key in taken} == {
        ("a", "train"): 3,
        ("b", "train"): 3,
        ("a", "validation"): 2,
        ("b", "validation"): 2,
    }


def test_rows_of_an_example_or_of_a_dataset_are_in_one_split(tmp_path):
    rows = [{"instruction": f"{ask} {n}", "references": ["x"], "example": str(n), "dataset": f"d{n}"} for n in range(50) for ask in "abc"]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    for override in ("source.split_by=example", "source.split_by=dataset"):
        sides = {}
        for row in rows_of(files_config(path, override)):
            sides.setdefault(row.dataset, set()).add(row.split)
        assert {len(each) for each in sides.values()} == {1} and len(set.union(*sides.values())) == 2


def test_each_row_has_the_name_of_its_part_and_a_limit_keeps_the_first_rows(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    parts = f"[{{name: a, source: {{kind: files, path: '{path}', limit: 3}}}}, {{source: {{kind: files, path: '{path}', dataset: e}}}}]"
    rows = list(read_rows(load(None, [f"source={{kind: mixture, parts: {parts}}}"]).source, 1))
    assert [row.part for row in rows] == ["a"] * 3 + [str(path)] * 40
    assert [row.instruction for row in rows[:3]] == ["say 0", "say 1", "say 2"] and rows[-1].dataset == "e"


@pytest.mark.usefixtures("bigbench_tasks")
def test_p3_columns_give_the_same_rows_as_cappy_columns(tmp_path):
    table = pa.Table.from_pylist(bigbench_rows(dict.fromkeys(("conlang_translation", "date_understanding", "gem"), 100)))
    assert 0 < table["answer_choices"].null_count < len(table)
    pq.write_table(table, tmp_path / "own.parquet")
    rows = [{**row, "inputs_pretokenized": row["instruction"], "targets_pretokenized": row["references"]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows).drop_columns(["instruction", "references"]), tmp_path / "p3.parquet")
    own, p3 = (rows_of(files_config(tmp_path / name)) for name in ("own.parquet", "p3.parquet"))
    assert [replace(row, part="") for row in own] == [replace(row, part="") for row in p3] and len(own) == 300


@pytest.mark.usefixtures("bigbench_tasks")
def test_bigbench_task_files_are_read_unchanged(tmp_path):
    from generation.sources import bigbench

    (subtasks,) = bigbench.load_tasks(["codenames"])
    (tmp_path / "task.json").write_text(json.dumps(subtasks["codenames"]))
    texts = {row.instruction for row in rows_of(files_config(tmp_path / "task.json"))}
    assert texts == {row["instruction"] for _, _, row in bigbench.read_tasks(["codenames"], seed=1)}


def test_a_weighted_mixture_has_its_ratio_and_is_deterministic(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    source = f"source: {{kind: files, path: '{path}'}}"
    other = source.replace("kind", "dataset: e, kind")
    parts = f"[{{name: a, weight: 3, {source}}}, {{name: b, weight: 1, {other}}}]"
    config = load(None, [f"source={{kind: mixture, policy: weights, rows: 40, parts: {parts}}}"])
    names = [row["part"] for _, row in few_shot.prepare_rows(config)]
    assert (names.count("a"), names.count("b"), names[:8].count("a")) == (30, 10, 6)
    assert rows_of(config) == rows_of(config)
    assert rows_of(config) != list(read_rows(config.source, config.seed + 1))


def test_the_t0_policy_caps_each_template(tmp_path):
    rows = [{**row, "template": "even" if n % 2 else "odd"} for n, row in enumerate(ROWS)]
    path = write_jsonl(tmp_path / "d.jsonl", [*rows, {**ROWS[0], "dataset": "small"}])
    config = load(None, [f"source={{kind: mixture, policy: t0, cap: 10, parts: [{{source: {{kind: files, path: '{path}'}}}}]}}"])
    taken = [(row.dataset, row.template) for row in rows_of(config)]
    assert {key: taken.count(key) for key in taken} == {("d", "odd"): 5, ("d", "even"): 5, ("small", None): 1}


def test_files_of_a_test_split_give_validation_rows_and_partitions_give_columns(tmp_path):
    for name in ("train", "test"):
        (tmp_path / "lang=en" / "dataset=d").mkdir(parents=True, exist_ok=True)
        write_jsonl(
            tmp_path / "lang=en" / "dataset=d" / f"{name}.jsonl", [{"instruction": f"{name} {n}", "references": ["a"]} for n in range(9)]
        )
    rows = rows_of(files_config(tmp_path))
    assert {(row.dataset, row.split, row.instruction.split()[0]) for row in rows} == {("d", "train", "train"), ("d", "validation", "test")}
    assert len(rows) == 18 and not any(row.split_by_hash for row in rows)
    (tmp_path / "raw" / "lang=en").mkdir(parents=True)
    write_jsonl(tmp_path / "raw" / "lang=en" / "a.jsonl", [{"text": "x"}])
    (tmp_path / "t.yaml").write_text("templates: {a: !Template {jinja: '{{ text }} in {{ lang }} ||| y'}}")
    (row,) = rows_of(files_config(tmp_path / "raw", f"source.templates={tmp_path}/t.yaml"))
    assert row.instruction == "x in en"


def test_unused_parts_are_named_once_although_the_source_is_read_twice(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "id": 1, "\ud800": 1} for row in ROWS])
    (tmp_path / "_SUCCESS").write_text("")
    read = reader.row_reader(files_config(tmp_path).source, 1)
    assert list(read()) == list(read())
    assert "".join(capsys.readouterr().err.splitlines()) == (
        f"source.path={tmp_path}: skipped 1 hidden or temporary files: _SUCCESS"
        f"source.path={tmp_path}: fields that are not used, with their rows: id 40, \\ud800 40"
    )


SURROGATES = [
    '{"instruction": "x", "references": ["a"], "\\ud83d_key": 1}',
    '{"\\ud83d_key": "x"}',
    '{"instruction": "x\\udfff", "references": ["a"]}',
    '{"instruction": "x", "references": ["a"], "answer_choices": ["a", "\\ud800"]}',
    '{"instruction": "x", "references": ["a"], "split": "\\ud800"}',
    '{"question": "x", "answer": {"\\ud800": 1}}',
    '{"messages": [{"role": "\\ud800", "content": 1}, {"role": "assistant", "content": "x"}]}',
]


@pytest.mark.parametrize("line", SURROGATES)
def test_a_lone_surrogate_anywhere_in_a_row_costs_at_most_this_row(tmp_path, line):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], line])
    for row in rows_of(files_config(path)):
        (row.to_json() if isinstance(row, DeadLetter) else row.instruction).encode()
    assert len(rows_of(files_config(path))) == 2


def test_a_csv_header_in_another_encoding_costs_no_row_if_its_column_is_not_used(tmp_path, capsys):
    (tmp_path / "c.csv").write_bytes("instruction,references,réponse\nx,a,é\n".encode("latin-1"))
    assert [row.references for row in rows_of(files_config(tmp_path / "c.csv"))] == [("a",)]
    assert "r\\udce9ponse 1" in capsys.readouterr().err


def test_a_reference_is_written_like_the_choice_that_it_is(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "x", "references": ["Yes"], "answer_choices": [" Yes", " No"]}])
    (row,) = rows_of(files_config(path))
    assert (row.references, row.answer_choices) == ((" Yes",), (" Yes", " No"))


def test_the_merged_choices_of_a_mixture_are_counted_once_although_its_rows_are_read_twice(tmp_path):
    choices = [{"idx": [0, n], "inputs_pretokenized": "q", "targets_pretokenized": f"{n}", "is_correct": n == 1} for n in range(3)]
    path = write_jsonl(tmp_path / "d.jsonl", choices)
    notes = Notes()
    source = load(None, [f"source={{kind: mixture, policy: t0, parts: [{{source: {{kind: files, path: '{path}'}}}}]}}"]).source
    (row,) = read_rows(source, 1, notes)
    assert (row.references, row.answer_choices, notes.merged) == (("1",), ("0", "1", "2"), 2)
