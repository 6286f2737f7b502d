import shutil

import pytest

from cluster.errors import UsageError
from generation.sources import folders


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    return root


def names(found, root):
    return [file.uri.removeprefix(f"{root}/") for file in found.files]


def test_hidden_and_temporary_parts_are_skipped_and_named(tmp_path):
    hidden = (
        "_SUCCESS",
        "_temporary/0/p.jsonl",
        ".ipynb_checkpoints/a.jsonl",
        "._a.jsonl",
        "x/.b.jsonl.swp.jsonl",
        "__MACOSX/a.jsonl",
        "_p.csv",
    )
    root = make(tmp_path / "set", "a.jsonl", "x/_b=1/c.jsonl", *hidden)
    found = folders.find(str(root))
    assert names(found, root) == ["a.jsonl", "x/_b=1/c.jsonl"] and sorted(found.hidden) == sorted(hidden)
    (note,) = found.notes("source.path=set")
    assert note.startswith("source.path=set: skipped 7 hidden or temporary files: ") and note.endswith(" and 2 more")
    assert names(folders.find(f"{root}/**/*.jsonl"), root) == ["a.jsonl", "x/_b=1/c.jsonl"]
    # A path that names the hidden part itself, and a hidden folder above the path, are read.
    assert len(folders.find(f"{root}/_temporary/*/*.jsonl").files) == len(folders.find(f"{root}/.ipynb_checkpoints").files) == 1


def test_other_files_are_skipped_and_named(tmp_path):
    root = make(tmp_path, "a.jsonl", "b.xlsx", "README.md", "dataset_infos.json", "data.arrow", "cache-12ab.arrow", "c.zip")
    found = folders.find(str(root))
    assert names(found, root) == ["a.jsonl", "data.arrow"]
    assert sorted(found.unsupported) == ["README.md", "b.xlsx", "c.zip", "cache-12ab.arrow", "dataset_infos.json"]
    with pytest.raises(UsageError, match=r"found no .jsonl, .* file; skipped 1 files that are not data files: b.xlsx; give a file"):
        folders.find(str(make(tmp_path / "other", "b.xlsx")))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("B.JSONL", ("lines", None)),
        ("a.jsonl.zst", ("lines", "zstd")),
        ("a.Json.BZ2", ("json", "bz2")),
        ("a.tsv.gz", ("csv", "gzip")),
        ("a.snappy.parquet", ("parquet", None)),
        ("a.ndjson.lz4", ("lines", "lz4")),
        ("a.jsonl.xz", (None, None)),
        ("jsonl", (None, None)),
        ("a.gz", (None, "gzip")),
    ],
)
def test_the_end_of_a_name_in_any_case_gives_format_and_compression(name, format):
    assert folders.file_format(name) == format


@pytest.mark.parametrize(
    "path", ["set [v2]", "set [v2]/*.jsonl", "set [v2]/rows[1].jsonl", "set [v2]/row?.jsonl", "set ?v2]/*.jsonl", "*/*"]
)
def test_a_path_that_exists_is_taken_literally_also_with_brackets(tmp_path, path):
    make(tmp_path, "set [v2]/rows[1].jsonl", "set [v2]/rows.jsonl")
    found = names(folders.find(f"{tmp_path}/{path}"), tmp_path)
    expected = {"set [v2]/rows[1].jsonl": ["set [v2]/rows[1].jsonl"], "set [v2]/row?.jsonl": ["set [v2]/rows.jsonl"]}
    assert found == expected.get(path, ["set [v2]/rows.jsonl", "set [v2]/rows[1].jsonl"])


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.jsonl", "test.jsonl"], ["validation", "train"]),
        (["train-00000-of-00002.parquet", "validation-00000-of-00001.parquet"], ["train", "validation"]),
        (["data/train/0.jsonl", "data/dev/0.jsonl", "data/more.jsonl"], ["validation", None, "train"]),
        (["squad_dev_v2.json", "squad_train_v2.json"], ["validation", "train"]),
        (["train_test.jsonl", "train.jsonl"], ["train", "validation"]),
        (["train-0.jsonl", "train-1.jsonl"], [None, None]),
        (["test.jsonl"], ["validation"]),
        (["pretraining.jsonl", "contest.jsonl"], [None, None]),
        (["split=test/a.jsonl", "split=train/a.jsonl"], [None, None]),
    ],
)
def test_the_file_names_of_a_folder_decide_the_split_if_they_differ_in_it(tmp_path, files, splits):
    found = folders.find(str(make(tmp_path / "set", *files)))
    assert [file.split for file in found.files] == splits
    assert {file.dataset for file in found.files if file.split} <= {"set"}
    assert bool(found.notes("x")) == any(splits)


def test_a_single_file_and_a_glob_of_one_split_are_split_by_hash(tmp_path):
    make(tmp_path, "train.jsonl", "test.jsonl")
    for path in ("train.jsonl", "test.jsonl", "te*.jsonl"):
        assert [file.split for file in folders.find(f"{tmp_path}/{path}").files] == [None]


def test_folder_names_give_partition_columns(tmp_path):
    root = make(tmp_path, "lang=en/kind=a%2Fb/part-0.jsonl", "lang=__HIVE_DEFAULT_PARTITION__/part-0.jsonl")
    assert [file.columns for file in folders.find(str(root)).files] == [{"lang": None}, {"lang": "en", "kind": "a/b"}]


def test_a_file_name_that_is_not_utf_8_is_an_error_of_one_line(tmp_path):
    shutil.copy(make(tmp_path / "one", "a.jsonl") / "a.jsonl", str(tmp_path).encode() + b"/caf\xe9.jsonl")
    with pytest.raises(UsageError, match="a file name there is not UTF-8; rename that file"):
        folders.find(str(tmp_path))
