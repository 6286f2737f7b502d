"""The training loop, in torch alone: no Ray, no files.

Order, batches and dropout are functions of (seed, epoch, window, step, worker), never of what ran before, so a run that
stops at any step and goes on from its saved state ends with the weights of an unbroken one. Shapes: B pairs in a
micro-batch, W workers, N pairs in a step over all workers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from training import objectives
from training.batch_plan import Step
from training.encoding import pad
from training.scorer import autocast

if TYPE_CHECKING:  # it needs pydantic, and `benchmarks/training_step.py` runs where there is none
    from cluster.config import TrainingConfig

# Up to this length the backward pass of plain attention beats the fused kernel's on CPU (x1.4 at 40 tokens, x1.1 at 160,
# x0.7 at 320; MiniLM, bfloat16); scoring has no backward pass and stays with the fused one.
_PLAIN_ATTENTION_TOKENS = 192


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step."""

    index: int
    epoch: int
    loss: Tensor
    """float32 (): this worker's part of the step's loss; the sum over workers is the step's."""
    squared_error: Tensor
    """float32 (): as `loss`, of the plain mean squared error between logits and labels, whatever is trained towards."""
    size: int
    learning_rate: float
    tokens: int
    """Tokens of this worker's pairs."""
    padded_tokens: int
    """Tokens the model was given on this worker, padding and all."""
    squared_lengths: int
    """Sum of the squares of the lengths of this worker's pairs: what attention looks at."""
    cut: int
    """Pairs cut to the length limit in the window this step ends; 0 elsewhere."""


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Return the rate of optimizer step `step` of `total`: a linear rise over the warmup, then a fall to 0 along `schedule`."""
    warmup = int(total * config.warmup)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    left = (total - step) / max(total - warmup, 1)
    return config.learning_rate * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def shard_model(model: nn.Module) -> None:
    """Share weights, gradients and moments over the workers (FSDP2), layer by layer; comes before `new_optimizer`."""
    from torch.distributed.fsdp import fully_shard  # here: its import takes a second

    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block)
    fully_shard(model)


def new_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW in its fused kernel; biases and norms are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def fit(
    model: nn.Module,
    steps: Iterable[Step],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    *,
    total: int,
    seed: int,
    pad_id: int,
    dtype: Literal["bfloat16", "float32"],
    rank: int = 0,
    world: int = 1,
) -> Iterator[StepResult]:
    """Take the optimizer steps and yield after each; `total` is the length of the whole run, for the schedule.

    The loss is that of `config.objective` over a step's N pairs of all workers, so the gradient does not depend on how many
    workers share it. With several, the process group must be up; the caller's `model` holds the weights throughout.
    """
    device = next(model.parameters()).device
    sharded = hasattr(model, "set_requires_gradient_sync")
    copies = world > 1 and not sharded
    parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if copies else None
    forward: Callable[..., Any] = parallel or model
    window, targets = None, np.zeros(0, np.float32)
    for step in steps:
        if step.window is not window:
            window = step.window
            targets = objectives.transform_labels(window.labels, window.groups, config.objective)
        model.train()
        torch.manual_seed(int(np.random.SeedSequence([seed, 3, step.index, rank]).generate_state(1, np.uint64)[0] >> 1))
        batches = [(rows, 1.0) for rows in step.micro_batches]
        # A worker with too few pairs still meets the others in what they do together: with any pair of the window, at no weight.
        batches += [(np.zeros(1, np.int64), 0.0)] * (step.passes - len(batches))
        loss, squared_error = torch.zeros((), device=device), torch.zeros((), device=device)
        padded_tokens = 0
        for place, (rows, weight) in enumerate(batches):
            last = place == len(batches) - 1
            if sharded:
                model.set_requires_gradient_sync(last)
            with parallel.no_sync() if parallel is not None and not last else nullcontext():
                inputs = pad(step.window.encoded, rows, pad_id, device)
                padded_tokens += inputs["input_ids"].numel()
                targets_B = torch.from_numpy(targets[rows]).to(device)
                groups_B = torch.from_numpy(step.window.groups[rows]).to(device)
                with autocast(dtype, device), _attention(inputs["input_ids"].shape[1], device):
                    logits_B1 = forward(**inputs).logits
                logits_B = logits_B1[:, 0].float()
                part = weight * objectives.compute_loss(logits_B, targets_B, groups_B, step.size, config.objective)
                # The gradients of the W workers are averaged; their sum is meant.
                (part * step.weight * world).backward()
            loss += part.detach()
            labels_B = torch.from_numpy(step.window.labels[rows]).to(device)
            squared_error += weight * (logits_B.detach() - labels_B).square().sum() / step.size.pairs
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        rate = learning_rate(step.index, total, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        encoded = step.window.encoded
        lengths = encoded.lengths[np.concatenate([np.zeros(0, np.int64), *step.micro_batches])]
        yield StepResult(
            index=step.index,
            epoch=step.window.epoch,
            loss=loss,
            squared_error=squared_error,
            size=step.size.pairs,
            learning_rate=rate,
            tokens=int(lengths.sum()),
            padded_tokens=padded_tokens,
            squared_lengths=int(np.square(lengths).sum()),
            cut=encoded.cut_pairs if step.last_of_window else 0,
        )


def _attention(length: int, device: torch.device) -> AbstractContextManager[Any]:
    """The faster of torch's attention kernels for training on inputs of `length` tokens."""
    plain = device.type == "cpu" and length <= _PLAIN_ATTENTION_TOKENS
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


class StopConsensus:
    """Whether any worker was asked something, known to all of them at the same step. Made and read by all alike."""

    def __init__(self, world: int) -> None:
        self._asked = threading.Event()
        # Over the CPU, whatever carries the gradients: waiting for a GPU each step would cost.
        self._group = torch.distributed.new_group(backend="gloo") if world > 1 else None

    def ask(self) -> None:
        self._asked.set()

    def reached(self) -> bool:
        if self._group is None:
            return self._asked.is_set()
        asked = torch.tensor([float(self._asked.is_set())])
        torch.distributed.all_reduce(asked, group=self._group)
        return bool(asked.item())


def sum_over_workers(values: Sequence[float] | np.ndarray, world: int, device: torch.device) -> np.ndarray:
    """Return the element-wise sum of every worker's `values`, float64; with one worker just those."""
    sums = torch.tensor(np.asarray(values, np.float64), device=device)
    if world > 1:
        torch.distributed.all_reduce(sums)
    summed: np.ndarray = sums.cpu().numpy()
    return summed
