from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from tests.training.conftest import publish
from training import stream


@pytest.fixture
def dataset(tmp_path: Path) -> RegressionSet:
    return RegressionSet(publish(str(tmp_path / "set"), 300, 10, row_group=50))


def test_an_epoch_has_every_pair_once(dataset: RegressionSet):
    plain = sorted((i, r) for pairs in dataset.pairs("train") for i, r in zip(pairs.instructions, pairs.responses, strict=True))
    made = list(stream.read_windows(dataset, "train", 128, seed=5, epoch=0))
    assert sorted((i, r) for pairs in made for i, r in zip(pairs.instructions, pairs.responses, strict=True)) == plain
    assert {len(pairs) for pairs in made[:-1]} == {128}
    assert stream.count_pairs(dataset, "train").pairs == len(plain) == sum(map(len, made))


def test_windows_of_whole_instructions_have_all_their_pairs(dataset: RegressionSet):
    made = list(stream.read_windows(dataset, "train", 40, seed=5, epoch=0, whole=True))
    assert [len(set(window.groups)) for window in made] == [40] * 7 + [20]
    seen = [group for window in made for group in set(window.groups)]
    assert len(seen) == len(set(seen)) == stream.count_pairs(dataset, "train").instructions
    assert sum(map(len, made)) == stream.count_pairs(dataset, "train").pairs
    rest = list(stream.read_windows(dataset, "train", 40, seed=5, epoch=0, skip=6, whole=True))
    assert [window.responses for window in rest] == [window.responses for window in made[6:]]


def test_a_reader_that_skips_gets_the_same_windows(dataset: RegressionSet):
    whole = list(stream.read_windows(dataset, "train", 128, seed=5, epoch=1))
    rest = list(stream.read_windows(dataset, "train", 128, seed=5, epoch=1, skip=3))
    assert [window.responses for window in rest] == [window.responses for window in whole[3:]]


def test_epochs_differ_and_a_window_mixes_the_whole_set(dataset: RegressionSet):
    first, second = (next(stream.read_windows(dataset, "train", 128, seed=5, epoch=epoch)) for epoch in (0, 1))
    assert first.instructions != second.instructions
    position = {row: index for index, row in enumerate(dict.fromkeys(i for pairs in dataset.pairs("train") for i in pairs.instructions))}
    positions = [position[instruction] for instruction in first.instructions]
    assert min(positions) < 60 and max(positions) > 240


def test_a_damaged_shard_is_named(dataset: RegressionSet):
    (uri,) = dataset.shards("train")
    data = bytearray(storage.read_bytes(uri))
    for byte in range(len(data) // 4, len(data) // 2, 64):
        data[byte] ^= 0xFF
    storage.write_bytes(uri, bytes(data))
    with pytest.raises(CappyError, match=r"part-00000.parquet is damaged"):
        list(stream.read_windows(dataset, "train", 128, seed=5, epoch=0))


def test_the_next_item_is_computed_ahead_and_an_error_is_raised_in_its_place():
    made: list[int] = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise CappyError("a shard is damaged")

    reader = stream.prefetch(items())
    assert next(reader) == 0
    wait_until(lambda: made == [0, 1])
    assert next(reader) == 1 and next(reader) == 2
    with pytest.raises(CappyError, match="a shard is damaged"):
        next(reader)
    assert list(stream.prefetch(iter("abc"))) == ["a", "b", "c"]


def wait_until(reached, seconds=30):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_held_out_instructions_are_in_no_window_and_keep_their_rows(dataset: RegressionSet):
    windows = list(stream.read_windows(dataset, "train", 128, seed=5, epoch=0, held_out=0.25))
    size = stream.count_pairs(dataset, "train", seed=5, held_out=0.25)
    trained = {text for pairs in windows for text in pairs.instructions}
    rows = stream.read_held_out(dataset, "train", 5, 0.25, 1000)
    held_out = set(rows["instruction"].to_pylist())
    everything = {text for pairs in stream.read_windows(dataset, "train", 128, seed=5, epoch=0) for text in pairs.instructions}
    assert size.pairs == sum(map(len, windows))
    assert not trained & held_out and trained | held_out == everything
    assert 0.1 < len(held_out) / len(everything) < 0.4
    assert stream.read_held_out(dataset, "train", 5, 0.25, 3)["instruction"].to_pylist() == rows["instruction"].to_pylist()[:3]
    assert set(stream.read_held_out(dataset, "train", 6, 0.25, 1000)["instruction"].to_pylist()) != held_out
