from __future__ import annotations

import json

import pytest

from cluster.errors import CappyError, UsageError
from generation.pair_units import read_pairs
from generation.sources.pair_rows import Pair
from generation.sources.row import DeadLetter
from tests.generation.made_set import LABELS, publish


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_are_read_in_order_and_bad_rows_are_dead_letters(tmp_path):
    write(tmp_path / "b.jsonl", {"prompt": "q3", "completion": "a"})
    write(tmp_path / "a.jsonl", {"prompt": "q1", "completion": "a"}, {"text": "no pair"}, {"prompt": "q2", "completion": "a"})
    (tmp_path / "c.csv").write_text("question,answer\nq4,a\n")
    found = list(read_pairs(f"{tmp_path}"))
    assert [each.instruction for each in found if isinstance(each, Pair)] == ["q1", "q2", "q3", "q4"]
    (letter,) = (each for each in found if isinstance(each, DeadLetter))
    assert letter.where == f"{tmp_path}/a.jsonl:2"
    assert len(list(read_pairs(f"{tmp_path}/*.csv"))) == 1


def test_a_published_set_gives_all_candidates_and_reads_only_its_data(tmp_path):
    publish(f"{tmp_path}/set", letters='{"prompt": "not a row", "completion": "x"}\n')
    found = list(read_pairs(f"{tmp_path}/set"))
    assert len(found) == 13 * (2 + len(LABELS)) and all(isinstance(each, Pair) for each in found)
    own = json.loads(found[2].own)
    assert own["source"] == "sampled" and own["label"] == LABELS[0] and own["dataset"] == "task 0"


def test_a_damaged_published_file_is_named(tmp_path):
    publish(f"{tmp_path}/set")
    file = tmp_path / "set/data/train/part-00001.parquet"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CappyError, match=r"SRC=.*/set: data/train/part-00001\.parquet has .* bytes.*; copy or make it again"):
        list(read_pairs(f"{tmp_path}/set"))


def test_a_source_without_pairs_is_one_line_with_the_columns(tmp_path):
    source = write(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(UsageError, match=r"SRC=.*rows\.jsonl: no row can be scored; .* it has text; .* at .*rows\.jsonl:1$") as caught:
        list(read_pairs(source))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"SRC=/none/x: found no \.jsonl"):
        list(read_pairs("/none/x"))
