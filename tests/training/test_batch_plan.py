from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.config import ObjectiveConfig, TrainingConfig
from training import batch_plan
from training.batch_plan import Size, batch_by_tokens
from training.encoding import encode_pairs
from training.scorer import load_tokenizer

CONFIG = TrainingConfig(epochs=2, batch_size=15, window=64, learning_rate=1e-3)
COMPARING = ObjectiveConfig(pairwise=0.5, listwise=0.5, labels="rank")


def test_the_module_imports_neither_torch_nor_ray():
    script = "import sys; import training.batch_plan; print(sorted({'torch', 'ray', 'pydantic', 'transformers'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_a_window_is_cut_into_steps_of_similar_lengths_with_each_row_once():
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    config = TrainingConfig(batch_size=32)
    steps = batch_plan.cut_pairs(lengths, config, 1, 0, 0)
    assert sorted(np.concatenate(steps).tolist()) == list(range(1000))
    assert sorted(map(len, steps)) == [8] + [32] * 31
    padded = sum(len(step) * lengths[step].max() for step in steps)
    assert padded < 1.08 * lengths.sum()
    assert [step.tolist() for step in batch_plan.cut_pairs(lengths, config, 1, 0, 0)] == [step.tolist() for step in steps]
    assert [step.tolist() for step in batch_plan.cut_pairs(lengths, config, 1, 1, 0)] != [step.tolist() for step in steps]


@pytest.mark.parametrize(("pairs", "batch_size"), [(1000, 32), (1000, 1), (33, 32), (5, 32)])
def test_steps_cut_by_tokens_have_about_equal_tokens(pairs: int, batch_size: int):
    lengths = np.random.default_rng(0).integers(5, 500, pairs)
    config = TrainingConfig(batch_size=batch_size, batch_by="tokens")
    steps = batch_plan.cut_pairs(lengths, config, 1, 0, 0)
    assert len(steps) == len(batch_plan.cut_pairs(lengths, TrainingConfig(batch_size=batch_size), 1, 0, 0))
    assert sorted(np.concatenate(steps).tolist()) == list(range(pairs))
    if batch_size < pairs and batch_size > 1:
        assert max(lengths[step].sum() for step in steps) - min(lengths[step].sum() for step in steps) <= 3 * lengths.max()


@pytest.mark.parametrize("batch_by", ["pairs", "tokens"])
def test_all_pairs_have_the_same_weight_and_all_workers_about_equal_tokens(batch_by: str, encoder: Path):
    draw = np.random.default_rng(0)
    texts = [" ".join(["red"] * words) for words in draw.integers(1, 29, 512)]
    encoded = encode_pairs(load_tokenizer(encoder, "x", "s"), texts, ["a"] * 512, 32)
    config = TrainingConfig(batch_size=64, window=512, batch_by=batch_by)
    window = batch_plan.Window(0, 0, encoded, np.zeros(512, np.float32), np.arange(512))
    plans = [list(batch_plan.plan_steps([window], config, 1, rank, 2, 0, Size(512, 512))) for rank in (0, 1)]
    weights = np.array([step.weight / step.size.pairs for step in plans[0]])
    assert np.allclose(weights, 1 / 64)
    for pair in zip(*plans, strict=True):
        rows = [np.concatenate(step.micro_batches) for step in pair]
        assert set(rows[0]).isdisjoint(rows[1]) and len(rows[0]) + len(rows[1]) == pair[0].size.pairs
        left, right = (encoded.lengths[mine].sum() for mine in rows)
        assert abs(left - right) <= encoded.lengths.max()


@pytest.mark.parametrize("pairs", [1, 64, 65, 200, 640])
def test_position_counts_windows_and_epochs(pairs: int):
    walked = []
    for epoch in range(2):
        for window, size in enumerate([64] * (pairs // 64) + ([pairs % 64] if pairs % 64 else [])):
            walked += [(epoch, window, step) for step in range(len(batch_plan.cut_pairs(np.ones(size, int), CONFIG, 1, epoch, window)))]
    assert [batch_plan.position(step, Size(pairs, pairs), CONFIG) for step in range(len(walked))] == walked
    assert batch_plan.steps_in_epoch(Size(pairs, pairs), CONFIG) * 2 == len(walked)


@pytest.mark.parametrize("pairs", [3, 64, 65, 210, 642])
def test_position_counts_windows_of_whole_instructions(pairs: int):
    config = CONFIG.model_copy(update={"objective": COMPARING})
    size = Size(pairs, pairs // 3)
    window = batch_plan.window_size(size, config)
    walked = []
    for epoch in range(2):
        for number, begin in enumerate(range(0, size.instructions, window)):
            held = min(window, size.instructions - begin)
            walked += [(epoch, number, step) for step in range(batch_plan.count_steps(held, 15, 3))]
    assert [batch_plan.position(step, size, config) for step in range(len(walked))] == walked
    assert batch_plan.steps_in_epoch(size, config) * 2 == len(walked)


def window(seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 20, 60)
    groups = np.repeat(draw.permutation(1000)[:60], sizes)
    return np.repeat(draw.integers(5, 200, 60), sizes) + draw.integers(0, 10, len(groups)), groups


@pytest.mark.parametrize("world", [1, 2, 3])
def test_instructions_stay_whole_and_each_pair_is_used_once(world: int):
    lengths, groups = window(world)
    count = batch_plan.count_steps(60, 32, len(groups) / 60)
    steps = batch_plan.cut_instructions(lengths, groups, count, np.random.default_rng(1))
    assert len(steps) == count and max(map(len, steps)) < 32 + 20
    seen: list[int] = []
    for rows in steps:
        for rank in range(world):
            mine = batch_plan.deal_instructions(rows, lengths, groups, rank, world)
            for batch in batch_plan.batch_instructions(mine, lengths, groups, 2000):
                alone = len(set(groups[batch])) == 1
                assert alone or len(batch) * lengths[batch].max() <= 2000
                assert all((groups == group).sum() == (groups[batch] == group).sum() for group in set(groups[batch]))
                seen += batch.tolist()
    assert sorted(seen) == list(range(len(groups)))
    padded = sum(len(rows) * lengths[rows].max() for rows in steps)
    assert padded < 1.25 * lengths.sum()


def test_the_workers_of_a_step_get_about_as_many_tokens():
    groups = np.repeat([0, 1, 2, 3, 4], [16, 2, 3, 9, 2])
    lengths = np.full(32, 10)
    shares = [batch_plan.deal_instructions(np.arange(32), lengths, groups, rank, 2) for rank in range(2)]
    assert sorted(map(len, shares)) == [16, 16]
    assert sorted(np.concatenate(shares).tolist()) == list(range(32))


def test_a_worker_may_get_no_instruction_and_no_step_is_empty():
    lengths, groups = np.array([5, 6]), np.array([1, 1])
    assert [
        each.tolist() for each in batch_plan.cut_instructions(lengths, groups, batch_plan.count_steps(1, 1, 2), np.random.default_rng(0))
    ] == [[0, 1]]
    assert batch_plan.batch_instructions(batch_plan.deal_instructions(np.array([0, 1]), lengths, groups, 1, 2), lengths, groups, 100) == []
    skewed = np.repeat([0, 1, 2], [50, 1, 1])
    assert all(len(step) for step in batch_plan.cut_instructions(np.ones(52, int), skewed, 3, np.random.default_rng(0)))


def test_token_batches_have_each_pair_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    batches = batch_by_tokens(lengths, 1024)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 1024 for batch in batches)
    assert sum(len(batch) * lengths[batch].max() for batch in batches) < 1.1 * lengths.sum()
    assert [batch.tolist() for batch in batch_by_tokens(np.array([5000, 3]), 1024)] == [[1], [0]]
