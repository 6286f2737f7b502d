import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import load
from cluster.errors import UsageError
from generation import instructions
from generation.instructions import DeadLetter, Instruction, Pools, read

GOOD = [{"instruction": f"say {n}", "references": [f"{n}", f"number {n}"], "dataset": "d"} for n in range(40)]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def files(path, *overrides):
    return load(None, [f"source={{kind: files, path: '{path}'}}", *overrides])


def rows_of(config):
    return list(read(config.source, config.seed))


BAD = [
    ({"references": ["a"]}, "`instruction` is missing; the row has references"),
    ({"instruction": "x"}, "`references` is missing"),
    ({"instruction": "x", "references": []}, "`references` is empty"),
    ({"instruction": "x", "references": "a"}, "`references` is a str; it must be a list of texts"),
    ({"instruction": "x", "references": ["a", 3]}, "`references` holds a int"),
    ({"instruction": "x", "references": ["a", "  "]}, "`references` holds an empty text"),
    ({"instruction": 5, "references": ["a"]}, "`instruction` is a int; it must be text"),
    ({"instruction": " ", "references": ["a"]}, "`instruction` is empty"),
    ({"instruction": "x", "references": ["a"], "split": "test"}, "`split` is 'test'; it must be train or validation"),
    ({"instruction": "x", "references": ["a"], "answer_choices": []}, "`answer_choices` is empty"),
    ('{"instruction": "x", "references": ["\\ud800"]}', "lone surrogate"),
    ('{"instruction": ', "the line is not JSON"),
    ("[1, 2]", "the row is a list"),
    ("[" * 100_000, "the line is not JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_row_becomes_a_dead_letter_with_place_and_reason_and_the_rest_goes_on(tmp_path, row, reason):
    path = write(tmp_path / "rows.jsonl", [GOOD[0], row, GOOD[1]])
    first, letter, last = rows_of(files(path))
    assert isinstance(letter, DeadLetter) and reason in letter.reason
    assert letter.where == f"{path}:2" and len(letter.row) <= 500
    assert json.loads(letter.to_json())["stage"] == "read"
    assert (first.instruction, last.instruction) == ("say 0", "say 1")


def test_bytes_that_are_no_text_are_a_dead_letter(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"instruction": "\xff\xfe"}\n' + json.dumps(GOOD[0]).encode())
    letter, row = rows_of(files(tmp_path / "rows.jsonl"))
    assert isinstance(letter, DeadLetter) and isinstance(row, Instruction)


def test_a_source_without_one_usable_row_is_an_error_that_shows_the_shape(tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    with pytest.raises(UsageError, match=r"no row can be used; each needs `instruction` \(text\) and `references`"):
        rows_of(files(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("pattern", ["missing.jsonl", "*.csv", ""])
def test_a_path_without_files_is_an_error(tmp_path, pattern):
    with pytest.raises(UsageError, match=r"no .jsonl, .jsonl.gz or .parquet file is there"):
        rows_of(files(tmp_path / pattern))


def test_jsonl_gzip_parquet_and_s3_hold_the_same_rows(tmp_path, bucket):
    from cluster import storage

    plain = rows_of(files(write(tmp_path / "d.jsonl", GOOD)))
    (tmp_path / "z").mkdir()
    with gzip.open(tmp_path / "z" / "d.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in GOOD)
    pq.write_table(pa.Table.from_pylist(GOOD), tmp_path / "d.parquet")
    storage.upload_file(tmp_path / "d.jsonl", f"{bucket}/in/d.jsonl")
    storage.upload_file(tmp_path / "z" / "d.jsonl.gz", f"{bucket}/zip/d.jsonl.gz")
    for path in (tmp_path / "z", tmp_path / "d.parquet", f"{bucket}/in/*.jsonl", f"{bucket}/zip/"):
        assert rows_of(files(path)) == plain
    assert len(plain) == 40


def test_the_split_is_by_hash_of_the_instruction_unless_the_row_says(tmp_path):
    rows = rows_of(files(write(tmp_path / "d.jsonl", [*GOOD, {**GOOD[0], "split": "validation"}, {**GOOD[0], "split": "train"}])))
    assert [row.split for row in rows[-2:]] == ["validation", "train"]
    counts = [row.split for row in rows[:40]].count("validation")
    assert 2 <= counts <= 16
    assert all(row.split == "train" for row in rows_of(files(tmp_path / "d.jsonl", "source.validation_fraction=0"))[:40])


def test_limits_hold_for_each_dataset_and_split(tmp_path):
    rows = [{**row, "dataset": name, "split": split} for row in GOOD for name in "ab" for split in ("train", "validation")]
    config = files(write(tmp_path / "d.jsonl", rows), "source.train_rows=3", "source.validation_rows=2")
    taken = [(row.dataset, row.split) for row in rows_of(config)]
    assert {key: taken.count(key) for key in taken} == {
        ("a", "train"): 3,
        ("b", "train"): 3,
        ("a", "validation"): 2,
        ("b", "validation"): 2,
    }


def rows_for_pools():
    return [Instruction("d", template, "train", f"{template} {n}", (f"answer {n}",)) for template in ("t", "u") for n in range(8)]


def test_shots_come_from_train_rows_of_the_template_and_never_from_the_row_itself():
    rows = rows_for_pools()
    held_out = Instruction("d", "t", "validation", "t 99", ("answer 99",))
    pools = Pools([*rows, held_out], seed=1)
    for row in [*rows, held_out]:
        shots = pools.shots(row, 3)
        assert len(shots) == 3 and row not in shots
        assert {shot.template for shot in shots} == {row.template} and held_out not in shots
    assert pools.shots(held_out, 3) == Pools(rows, seed=1).shots(held_out, 3) != Pools(rows, seed=2).shots(held_out, 3)


def test_a_small_template_borrows_shots_from_its_dataset():
    lone = Instruction("d", "lone", "train", "alone", ("answer",))
    shots = Pools([*rows_for_pools(), lone], seed=1).shots(lone, 3)
    assert len(shots) == 3 and lone not in shots


def test_mismatched_references_are_of_other_rows_and_depend_on_the_row_alone(tmp_path):
    config = files(write(tmp_path / "d.jsonl", GOOD), "source.validation_fraction=0", "generate.mismatched=2")
    forward = {row["id"]: row for _, row in instructions.prepared(config)}
    backward_config = files(write(tmp_path / "d.jsonl", GOOD), "source.validation_fraction=0", "generate.mismatched=2")
    assert {row["id"]: row for _, row in instructions.prepared(backward_config)} == forward
    for row in forward.values():
        assert len(row["mismatched"]) == 4 and not set(row["mismatched"]) & set(row["references"])


def test_a_classification_row_borrows_no_references(tmp_path):
    rows = [*GOOD, {"instruction": "fox?", "references": ["yes"], "answer_choices": ["yes", "no"], "dataset": "d"}]
    row = [row for _, row in instructions.prepared(files(write(tmp_path / "d.jsonl", rows)))][-1]
    assert row["answer_choices"] == ["yes", "no"] and row["mismatched"] == []
