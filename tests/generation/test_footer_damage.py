"""Parquet footers have no checksum: every reader of a set compares the SHA-256 of a shard with the manifest."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from cappy import inspection
from cluster import storage
from cluster.config import Config
from cluster.errors import CappyError
from evaluation import evaluate
from generation.dataset import RegressionSet
from tests.generation.made_set import publish
from training import stream, task_rows, train

READERS = {
    "batches": lambda uri: list(RegressionSet(uri).batches("train")),
    "pairs": lambda uri: list(RegressionSet(uri).pairs("train")),
    "one dataset": lambda uri: list(RegressionSet(uri).batches("train", columns=["id", "dataset"], only="task 1")),
    "to_pandas": lambda uri: RegressionSet(uri).to_pandas(),
    "to_ray": lambda uri: RegressionSet(uri).to_ray(),
    "training windows": lambda uri: list(stream.read_windows(RegressionSet(uri), "train", 16, seed=1, epoch=0)),
    "count": lambda uri: stream.count_pairs(RegressionSet(uri), "train"),
    "adapt": lambda uri: task_rows.collect_pairs(RegressionSet(uri), None, 10, 1),
    "evaluate": lambda uri: evaluate.read_rows(RegressionSet(uri), "train"),
    "train": lambda uri: train.run_train(Config(dataset=uri, scorer_path=f"{uri}-scorer", scorer={"encoder": "minilm-l6"})),
    "inspect --no-verify": lambda uri: inspection.run_inspect(uri, verify=False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    publish(str(folder), train=(12,))
    (shard,) = (folder / "data" / "train").iterdir()
    return folder, shard


def flips(data, count):
    """Yield copies of a Parquet file, each with one bit of its footer flipped."""
    draw = random.Random(5)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    for _ in range(count):
        damaged = bytearray(data)
        damaged[len(data) - footer + draw.randrange(footer)] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_in_a_footer_is_one_line_that_names_the_shard(reader, made):
    folder, shard = made
    data = shard.read_bytes()
    try:
        for damaged in flips(data, 3 if reader == "train" else 20):
            shard.write_bytes(damaged)
            with pytest.raises(CappyError, match=rf"{re.escape(shard.name)} (is damaged|does not match)") as caught:
                READERS[reader](str(folder))
            assert "\n" not in str(caught.value)
    finally:
        shard.write_bytes(data)
    assert len(RegressionSet(str(folder)).to_pandas()) == 12


def test_a_shard_is_compared_once_for_each_opened_set(made, monkeypatch):
    read = []
    real = storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda uri: read.append(Path(uri).name) or real(uri))
    opened = RegressionSet(str(made[0]))
    opened.verify("train", "validation")
    for _ in range(2):
        assert sum(map(len, opened.batches("train"))) == 12
    assert read == ["part-00000.parquet"] * 2  # one shard of each split
    assert sum(map(len, RegressionSet(str(made[0]), verified=True).batches("train"))) == 12 and len(read) == 2
