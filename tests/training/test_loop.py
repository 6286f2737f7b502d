from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cluster import ports
from cluster.config import ObjectiveConfig, ScorerConfig, TrainingConfig
from generation.dataset import RegressionSet
from tests.training.conftest import FAMILIES, publish, write_family
from training import batch_plan, checkpoint, encoder_kernels, loop, stream
from training.batch_plan import Size
from training.encoding import encode_pairs
from training.scorer import load_tokenizer, new_model

CONFIG = TrainingConfig(epochs=2, batch_size=15, window=64, learning_rate=1e-3)
COMPARING = ObjectiveConfig(pairwise=0.5, listwise=0.5, labels="rank")


def start(encoder: Path, dataset: str, config: TrainingConfig, rank: int = 0, world: int = 1, state: checkpoint.Checkpoint | None = None):
    """Return the model, the optimizer, the number of steps and the step results, as in a worker of `cappy train`."""
    model = new_model(encoder, ScorerConfig(max_length=32), config, seed=3)
    tokenizer = load_tokenizer(encoder, "x", "s")
    if config.parallel == "fsdp":
        loop.shard_model(model)
    optimizer = loop.new_optimizer(model, config)
    if state:
        checkpoint.restore(state, model, optimizer)
    first = state.step if state else 0
    opened = RegressionSet(dataset)
    size = stream.count_pairs(opened, "train")

    def windows():
        begin, skip, _ = batch_plan.position(first, size, config)
        for epoch in range(begin, config.epochs):
            for number, window in enumerate(
                stream.read_windows(opened, "train", batch_plan.window_size(size, config), 3, epoch, skip, config.objective.grouped), skip
            ):
                yield batch_plan.Window(
                    epoch, number, encode_pairs(tokenizer, window.instructions, window.responses, 32), window.labels, window.groups
                )
            skip = 0

    steps = batch_plan.plan_steps(windows(), config, 3, rank, world, first, size)
    total = batch_plan.steps_in_epoch(size, config) * config.epochs
    return (
        model,
        optimizer,
        total,
        loop.fit(model, steps, optimizer, config, total=total, seed=3, pad_id=0, dtype="float32", rank=rank, world=world),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish(str(tmp_path_factory.mktemp("data") / "set"), 70, 10)


def test_training_reduces_the_loss_and_ends_after_the_planned_steps(encoder: Path, dataset: str):
    config = CONFIG.model_copy(update={"epochs": 10})
    _, _, total, steps = start(encoder, dataset, config)
    losses = [(done.index, done.loss.item()) for done in steps]
    assert [index for index, _ in losses] == list(range(total))
    assert np.mean([loss for _, loss in losses[-10:]]) < 0.6 * np.mean([loss for _, loss in losses[:10]])


@pytest.mark.parametrize(("stop", "objective"), [(1, ObjectiveConfig()), (7, COMPARING), (14, ObjectiveConfig()), (15, COMPARING)])
def test_a_resumed_run_is_bit_equal_to_an_unbroken_run(stop: int, objective: ObjectiveConfig, encoder: Path, dataset: str, tmp_path: Path):
    config = CONFIG.model_copy(update={"objective": objective})
    whole, _, total, steps = start(encoder, dataset, config)
    losses = [done.loss.item() for done in steps]
    assert len(losses) == total
    broken, optimizer, _, steps = start(encoder, dataset, config)
    for done in steps:
        if done.index + 1 == stop:
            checkpoint.write(str(tmp_path), checkpoint.capture(broken, optimizer, stop, {}, []))
            break
    resumed, _, _, steps = start(encoder, dataset, config, state=checkpoint.read(str(tmp_path)))
    assert [done.loss.item() for done in steps] == losses[stop:]
    assert 0 < stop < total
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_each_step_is_the_plain_mean_squared_error_of_its_pairs(encoder: Path, dataset: str):
    model, _, _, steps = start(encoder, dataset, CONFIG)
    tokenizer = load_tokenizer(encoder, "x", "s")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    opened = RegressionSet(dataset)
    first = next(stream.read_windows(opened, "train", CONFIG.window, 3, 0))
    encoded = encode_pairs(tokenizer, first.instructions, first.responses, 32)
    rows = batch_plan.cut_pairs(encoded.lengths, CONFIG, 3, 0, 0)[0]
    inputs = tokenizer([first.instructions[row] for row in rows], [first.responses[row] for row in rows], return_tensors="pt", padding=True)
    expected = torch.nn.functional.mse_loss(model(**inputs).logits[:, 0], torch.from_numpy(first.labels[rows])).item()
    assert next(steps).loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradient_of_a_step_equal_those_of_its_pairs_computed_one_at_a_time(kind: str, tmp_path: Path):
    write_family(kind, tmp_path)
    config = TrainingConfig(batch_size=40, window=40, micro_batch_tokens=64, learning_rate=1, warmup=0, clip_norm=1e9)
    model = new_model(tmp_path, ScorerConfig(encoder=str(tmp_path), max_length=32), config, seed=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    alone = copy.deepcopy(model).train()
    encoder_kernels.restore_last_layer(alone)
    tokenizer = load_tokenizer(tmp_path, "x", "s")
    texts = [" ".join(["red fox please"] * words) for words in np.random.default_rng(0).integers(1, 9, 40)]
    encoded = encode_pairs(tokenizer, texts, ["a dog"] * 40, 32)
    window = batch_plan.Window(0, 0, encoded, np.linspace(0, 1, 40, dtype=np.float32), np.arange(40))
    (step,) = batch_plan.plan_steps([window], config, 1, 0, 1, 0, Size(40, 40))
    assert len(step.micro_batches) > 5 and max(map(len, step.micro_batches)) > 4
    plain = torch.optim.SGD(model.parameters())
    (result,) = loop.fit(model, [step], plain, config, total=1, seed=1, pad_id=tokenizer.pad_token_id, dtype="float32")
    logits = [alone(**tokenizer([text], ["a dog"], return_tensors="pt")).logits for text in texts]
    loss = (torch.cat(logits)[:, 0] - torch.from_numpy(window.labels)).square().mean()
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.cat([each.grad.flatten() for each in alone.parameters() if each.grad is not None]).norm()
    assert result.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-4)
    ended = model.state_dict()
    for name, weight in alone.named_parameters():  # one step with learning rate 1 is the gradient
        moved = weight - (0 if weight.grad is None else weight.grad)
        assert (moved - ended[name]).abs().max() < 1e-5


def test_the_learning_rate_rises_and_falls_with_optimizer_steps():
    rates = [loop.learning_rate(step, 100, CONFIG) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5e-4) and 0 < rates[99] < 2e-5
    assert loop.learning_rate(0, 1, CONFIG) > 0
    cosine = [loop.learning_rate(step, 100, CONFIG.model_copy(update={"schedule": "cosine"})) for step in range(100)]
    assert cosine[:11] == rates[:11] and cosine[55] == pytest.approx(5e-4) and cosine[30] > rates[30] and 0 < cosine[99] < rates[99]


# 210 pairs in windows of 65 and steps of 16: the small steps have 1 and 15 pairs, so one worker sometimes gets none.
PLAIN = TrainingConfig(epochs=8, batch_size=16, window=65, learning_rate=1e-3)
SHARED = PLAIN.model_copy(update={"parallel": "fsdp"})
# 70 instructions in windows of 2 and steps of one: one worker of two gets none.
COMPARED = PLAIN.model_copy(update={"objective": COMPARING, "batch_size": 4, "window": 6})
COMPARED_SHARED = COMPARED.model_copy(update={"parallel": "fsdp"})
# For each run its parts: number of workers, settings, last step.
RUNS = {
    "one": [(1, PLAIN, 100)],
    "two": [(2, PLAIN, 100)],
    "changing": [(2, SHARED, 37), (1, PLAIN, 60), (2, SHARED, 100)],
    "one comparing": [(1, COMPARED, 50)],
    "two comparing": [(2, COMPARED, 25), (2, COMPARED_SHARED, 50)],
}


def work(rank: int, port: int, encoder: Path, dataset: str, folder: Path) -> None:
    """Train `RUNS` in one of two processes. Each part resumes from the checkpoint of the part before."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, parts in RUNS.items():
        for world, config, stop in parts:
            if rank < world:
                train_up_to(stop, config, rank, world, encoder, dataset, str(folder / name))
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_up_to(stop: int, config: TrainingConfig, rank: int, world: int, encoder: Path, dataset: str, folder: str) -> None:
    state = checkpoint.read_newest(folder, pytest.fail)
    model, optimizer, _, steps = start(encoder, dataset, config, rank, world, state)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # its random draws depend on the worker
            module.p = 0.0
    done = [(result.loss.item(), result.gradient_norm.item()) for result in itertools.islice(steps, stop - (state.step if state else 0))]
    summed = loop.sum_over_workers([loss for loss, _ in done], world, torch.device("cpu"))
    before = state.trainer_state if state else {"losses": [], "norms": []}
    trainer_state = {"losses": before["losses"] + summed.tolist(), "norms": before["norms"] + [norm for _, norm in done]}
    taken = checkpoint.capture(model, optimizer, stop, trainer_state, [], keep=rank == 0)
    if taken:
        checkpoint.write(f"{folder}/{stop:08d}-x", taken)


@pytest.mark.slow
def test_losses_and_weights_are_the_same_with_any_number_of_workers_with_ddp_and_fsdp(encoder: Path, dataset: str, tmp_path: Path):
    torch.multiprocessing.spawn(work, (ports.free_port(), encoder, dataset, tmp_path), nprocs=2)
    ended = {name: checkpoint.read_newest(str(tmp_path / name), pytest.fail) for name in RUNS}
    for name, run in ended.items():
        one = ended["one comparing" if "comparing" in name else "one"]
        assert one is not None and run is not None and len(run.trainer_state["losses"]) == RUNS[name][-1][-1]
        assert np.abs(np.subtract(one.trainer_state["losses"], run.trainer_state["losses"])).max() < 1e-5
        assert run.trainer_state["norms"] == pytest.approx(one.trainer_state["norms"], rel=1e-2) and min(run.trainer_state["norms"]) > 0
        assert one.weights.keys() == run.weights.keys() and one.moments.keys() == run.moments.keys()
        assert max((value - run.weights[name]).abs().max() for name, value in one.weights.items()) < 1e-4


def test_one_worker_stops_when_requested():
    consensus = loop.StopConsensus(1)
    assert not consensus.reached()
    consensus.request()
    assert consensus.reached() and np.isscalar(consensus.reached())


def test_the_gradient_norm_is_that_before_clipping(encoder: Path, dataset: str):
    norms = []
    for clip_norm in (1e-3, 1e3):
        _, _, _, results = start(encoder, dataset, CONFIG.model_copy(update={"clip_norm": clip_norm}))
        norms.append(next(results).gradient_norm.item())
    assert norms[0] == norms[1] > 1e-3
