from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.config import load
from cluster.errors import CappyError
from generation import shards, units
from generation.sampler import SAMPLED
from generation.schema import DATASET, PREPARED
from tests.generation.made_set import damage_page

CONFIG = load(None, ["sampler.prompt.form=raw"])
CANDIDATE = {"response": "number 1", "decoding": "greedy", "tokens": 3, "finish_reason": "stop", "logprob": -1.0}


def save_unit(staging, number, rows, failed=0):
    """Save a finished unit with `rows` instructions, of which `failed` are dead letters; it costs 0.5 dollars."""
    common = {"dataset": "d", "template": None, "references": ["number 1"], "answer_choices": None, "shots": [], "mismatched": []}
    table = pa.Table.from_pylist([{**common, "id": f"{number}-{row}", "instruction": f"say {row}"} for row in range(rows)], PREPARED)
    table = table.append_column("sampled", pa.array([[CANDIDATE]] * rows, SAMPLED))
    table = table.append_column("error", pa.array(["too long" if row < failed else None for row in range(rows)], pa.string()))
    table = table.append_column("cost", pa.array([0.5 / rows] * rows, pa.float64()))
    units.save_unit(staging, f"train-{number:06d}", table, CONFIG)
    return f"train-{number:06d}"


def test_units_fill_shards_in_order_up_to_the_limit():
    assert list(shards.group_by_size({"a": 4, "b": 4, "c": 9, "d": 1, "e": 1}, 8)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(shards.group_by_size({}, 8)) == []


@pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
def test_a_shard_has_the_rows_of_its_units_in_order_and_their_sums(place):
    staging = f"{place}/_staging"
    names = [save_unit(staging, 0, 4), save_unit(staging, 1, 3, failed=1), save_unit(staging, 2, 2)]
    target = f"{place}/{shards.shard_path('train', 0, '0123abcd')}"
    merged = shards.write_shard(names, staging, target, 5, lambda: None)
    assert (merged["entry"]["rows"], merged["letters"], merged["cost"]) == (8, 1, pytest.approx(1.5))
    assert merged["statistics"]["instructions"] == 8 and merged["statistics"]["sources"] == {"reference": 8, "sampled": 8}
    fs, path = storage.filesystem(target)
    with fs.open_input_file(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        assert parquet.schema_arrow.equals(DATASET)
        assert [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)] == [5, 1, 2]
        assert parquet.read()["id"].to_pylist() == ["0-0", "0-1", "0-2", "0-3", "1-1", "1-2", "2-0", "2-1"]
    (letter,) = storage.read_bytes(shards.dead_letters_uri(staging, target)).decode().splitlines()
    assert (json.loads(letter)["where"], json.loads(letter)["reason"]) == ("1-0", "too long")


def test_a_shard_counts_the_empty_and_the_missing_responses_of_its_units(tmp_path):
    """Three decodings: one row has all responses, one of them empty; the content filter stopped two of the other row's."""
    staging, target = f"{tmp_path}/_staging", f"{tmp_path}/{shards.shard_path('train', 0, '0123abcd')}"
    config = load(None, ["sampler.decodings=[{name: greedy, temperature: 0}, {name: warm, n: 2}]"])
    pools = [[CANDIDATE, CANDIDATE, {**CANDIDATE, "response": ""}], [CANDIDATE]]
    common = {"dataset": "d", "template": None, "references": ["number 1"], "answer_choices": None, "shots": [], "mismatched": []}
    table = pa.Table.from_pylist([{**common, "id": f"{row}", "instruction": f"say {row}"} for row in range(2)], PREPARED)
    table = table.append_column("sampled", pa.array(pools, SAMPLED)).append_column("error", pa.nulls(2, pa.string()))
    counts = units.save_unit(staging, "train-000000", table.append_column("cost", pa.array([0.0, 0.0])), config)
    assert (counts["candidates"], counts["empty"], counts["missing"]) == (4, 1, 2)
    merged = shards.write_shard(["train-000000"], staging, target, 5, lambda: None)
    assert (merged["sampled"], merged["empty"], merged["missing"]) == (4, 1, 2)


def test_a_run_that_lost_its_lease_writes_no_shard(tmp_path):
    name = save_unit(str(tmp_path), 0, 2)

    def lost():
        raise CappyError("lease lost")

    with pytest.raises(CappyError, match="lease lost"):
        shards.write_shard([name], str(tmp_path), f"{tmp_path}/data/train/part-00000-0123abcd.parquet", 5, lost)
    assert not (tmp_path / "data").exists() and not (tmp_path / "letters").exists()


def test_a_damaged_and_a_missing_unit_are_errors_with_the_fix(tmp_path):
    name = save_unit(str(tmp_path), 0, 2)
    file = tmp_path / "units" / f"{name}.parquet"
    damage_page(file)
    with pytest.raises(CappyError, match=rf"{name}.parquet is damaged .*; delete it and run `cappy generate` again"):
        shards.write_shard([name], str(tmp_path), f"{tmp_path}/shard.parquet", 5, lambda: None)
    file.unlink()
    with pytest.raises(CappyError, match=rf"{name}.parquet was deleted after it was written; run `cappy generate` again"):
        shards.write_shard([name], str(tmp_path), f"{tmp_path}/shard.parquet", 5, lambda: None)


def test_only_unpublished_shards_are_removed_and_only_after_the_check(tmp_path):
    published = shards.shard_path("train", 0, "0123abcd")
    superseded = [shards.shard_path("train", 1, "89abcdef"), "data/validation/part-00000.parquet"]
    for name in (published, *superseded, "data/train/notes.txt"):
        storage.write_bytes(f"{tmp_path}/{name}", b"content")

    def lost():
        raise CappyError("lease lost")

    with pytest.raises(CappyError, match="lease lost"):
        shards.remove_superseded(str(tmp_path), [published], lost)
    assert all((tmp_path / name).exists() for name in superseded)
    shards.remove_superseded(str(tmp_path), [published], lambda: None)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"part-00000-0123abcd.parquet", "notes.txt"}


def test_a_run_removes_only_its_own_shards(tmp_path):
    own, other = (shards.shard_path("train", 0, run) for run in ("0123abcd", "89abcdef"))
    for name in (own, other):
        storage.write_bytes(f"{tmp_path}/{name}", b"content")
    shards.remove_own(str(tmp_path), "0123abcd")
    assert not (tmp_path / own).exists() and (tmp_path / other).exists()


def test_temporary_files_of_shards_that_killed_runs_left_are_removed(tmp_path):
    shard = shards.shard_path("train", 0, "0123abcd")
    folder, _, file = shard.rpartition("/")
    for name in (shard, f"{folder}/.{file}.{'0' * 32}", f"{folder}/.part-00007-89abcdef.parquet.{'1' * 32}", f"{folder}/.notes.{'1' * 32}"):
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    shards.remove_superseded(str(tmp_path), [shard], lambda: None)
    assert set(storage.list_files(str(tmp_path))) == {shard, f"{folder}/.notes.{'1' * 32}"}
