"""The training loop in torch. No Ray, no files.

Order, batches and dropout are functions of (seed, epoch, window, step, worker) and of no earlier state. A run that stops at any
step and resumes from its saved state ends with the weights of an unbroken run.

Shapes: B pairs of a micro-batch.
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

if TYPE_CHECKING:  # the config needs pydantic, and `benchmarks/training_step.py` runs without it
    from cluster.config import TrainingConfig

# On CPU, plain attention with its backward pass is faster than the fused kernel up to about this length (docs/results.md).
# Scoring has no backward pass and uses the fused kernel.
_PLAIN_ATTENTION_TOKENS = 192


@dataclass(frozen=True)
class StepResult:
    """The measurements of one finished optimizer step."""

    index: int
    """Position in the whole run, from 0."""
    epoch: int
    loss: Tensor
    """float32 (): this worker's part of the step's loss. The sum over workers is the loss of the step."""
    squared_error: Tensor
    """float32 (): this worker's part of the mean squared error between logits and labels, with any objective."""
    gradient_norm: Tensor
    """float32 (): global norm of the step's gradient before clipping, equal on all workers."""
    size: int
    """Pairs of the step, over all workers."""
    learning_rate: float
    tokens: int
    """Tokens of this worker's pairs, without padding."""
    padded_tokens: int
    """Tokens of this worker's model inputs, with padding."""
    squared_lengths: int
    """Sum over this worker's pairs of the square of their length; the cost of attention is proportional to it."""
    cut: int
    """Pairs cut to the length limit in a window, on the last step of the window; 0 on the others."""


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step `step` of `total`: a linear rise over the warmup, then a fall to 0 by `schedule`."""
    warmup = int(total * config.warmup)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    left = (total - step) / max(total - warmup, 1)
    return config.learning_rate * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def shard_model(model: nn.Module) -> None:
    """Shard weights, gradients and optimizer moments over the workers (FSDP2), layer by layer. Call it before `new_optimizer`."""
    from torch.distributed.fsdp import fully_shard  # its import takes a second

    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block)
    fully_shard(model)


def new_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW with its fused kernel. Weight decay applies to matrices, not to biases and norms."""
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
    """Run the optimizer steps and yield the result of each. `total` is the number of steps of the whole run, for the schedule.

    The loss is `config.objective` over the pairs of all workers, so the gradient does not depend on the number of workers. With
    several workers the process group must be initialised. The weights are updated in `model`.
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
        # A worker without pairs still joins the collective operations of the others: it passes one pair with weight 0.
        batches += [(np.zeros(1, np.int64), 0.0)] * (step.passes - len(batches))
        loss, squared_error = torch.zeros((), device=device), torch.zeros((), device=device)
        padded_tokens = 0
        for number, (rows, weight) in enumerate(batches):
            last = number == len(batches) - 1
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
                # DDP and FSDP average the gradients of the workers; multiplying by their number gives the sum.
                (part * step.weight * world).backward()
            loss += part.detach()
            labels_B = torch.from_numpy(step.window.labels[rows]).to(device)
            squared_error += weight * (logits_B.detach() - labels_B).square().sum() / step.size.pairs
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        if sharded:  # the norm of sharded gradients is a DTensor
            norm = norm.full_tensor()
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
            gradient_norm=norm,
            size=step.size.pairs,
            learning_rate=rate,
            tokens=int(lengths.sum()),
            padded_tokens=padded_tokens,
            squared_lengths=int(np.square(lengths).sum()),
            cut=encoded.cut_pairs if step.last_of_window else 0,
        )


def _attention(length: int, device: torch.device) -> AbstractContextManager[Any]:
    """Select the faster of torch's attention kernels for training on inputs of `length` tokens."""
    plain = device.type == "cpu" and length <= _PLAIN_ATTENTION_TOKENS
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


class StopConsensus:
    """An agreement of all workers to stop after the same step. Every worker creates one and calls `reached` after each step."""

    def __init__(self, world: int) -> None:
        self._requested = threading.Event()
        # On the CPU, also when gradients are on a GPU: synchronising with the GPU at each step costs time.
        self._group = torch.distributed.new_group(backend="gloo") if world > 1 else None

    def request(self) -> None:
        """Request to stop. May be called on any worker and from any thread."""
        self._requested.set()

    def reached(self) -> bool:
        """Return whether a worker has requested to stop; the same value on all workers. A collective operation."""
        if self._group is None:
            return self._requested.is_set()
        requested = torch.tensor([float(self._requested.is_set())])
        torch.distributed.all_reduce(requested, group=self._group)
        return bool(requested.item())


def sum_over_workers(values: Sequence[float] | np.ndarray, world: int, device: torch.device) -> np.ndarray:
    """Return the element-wise sum of `values` over all workers, in float64. A collective operation."""
    sums = torch.tensor(np.asarray(values, np.float64), device=device)
    if world > 1:
        torch.distributed.all_reduce(sums)
    summed: np.ndarray = sums.cpu().numpy()
    return summed
