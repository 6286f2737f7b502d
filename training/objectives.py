"""The training objective: label transforms and the terms of the loss. torch and numpy: no model, no Ray, no files.

The objective of the Cappy paper is the mean squared error of the raw logit. The other terms compare the candidates of one
instruction, so a forward pass must hold all of them (see `batch_plan`). Each term is a sum over pairs or instructions, divided
by their number in the whole step. The result does not depend on how many workers and forward passes share a step.

Shapes: B pairs of a forward pass, G instructions in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.batch_plan import Size, rows_by_group

if TYPE_CHECKING:  # the config needs pydantic, and `benchmarks/training_step.py` runs without it
    from cluster.config import ObjectiveConfig


def transform_labels(labels: np.ndarray, groups: np.ndarray, config: ObjectiveConfig) -> np.ndarray:
    """Return the training targets of whole instructions, float32 (pairs,) in [0, 1]. `groups` is equal within an instruction.

    `plain` returns the labels, `power` raises them to `config.power`. `rank` gives the lowest label of an instruction 0, its
    highest label 1, and the others their average rank between. Equal labels of a whole instruction stay as they are.
    """
    if config.labels == "power":
        powers: np.ndarray = np.power(labels, config.power, dtype=np.float32)
        return powers
    if config.labels == "rank":
        ranked = labels.astype(np.float32)
        for rows in rows_by_group(groups):
            above = np.sign(np.subtract.outer(labels[rows], labels[rows])).sum(axis=1)
            if above.any():
                ranked[rows] = (above - above.min()) / (above.max() - above.min())
        return ranked
    return labels.astype(np.float32, copy=False)


def compute_loss(logits_B: Tensor, targets_B: Tensor, groups_B: Tensor, size: Size, config: ObjectiveConfig) -> Tensor:
    """Return the part of a step's loss that these pairs contribute. The parts of a step add up to

        mse * mean over pairs of (logit - target)^2
        + pairwise * mean over instructions of the logistic loss of score differences, weighted by the gaps between targets
        + listwise * mean over instructions of the cross entropy from softmax(target / t) to softmax(logit / t)

    with t = `config.temperature` and the pairs and instructions of `size`.

    Logits and targets are float32 (B,). `groups_B` is int64 (B,), equal within an instruction. All pairs of each instruction
    must be present.
    """
    total = logits_B.new_zeros(())
    if config.mse:
        total = total + config.mse * (logits_B - targets_B).square().sum() / size.pairs
    if config.pairwise:
        total = total + config.pairwise * _pairwise_loss(logits_B, targets_B, groups_B, config.temperature) / size.instructions
    if config.listwise:
        total = total + config.listwise * _listwise_loss(logits_B, targets_B, groups_B, config.temperature) / size.instructions
    return total


def _pairwise_loss(logits_B: Tensor, targets_B: Tensor, groups_B: Tensor, temperature: float) -> Tensor:
    """Return the sum over instructions of softplus(-(logit difference) / t), the mean over their pairs weighted by target gaps."""
    _, groups_B = groups_B.unique(return_inverse=True)
    gaps_BB = (targets_B[:, None] - targets_B[None, :]).clamp(min=0) * (groups_B[:, None] == groups_B[None, :])
    gaps_G = gaps_BB.new_zeros(int(groups_B.max()) + 1).index_add(0, groups_B, gaps_BB.sum(dim=1))
    weights_BB = gaps_BB / gaps_G[groups_B].clamp(min=torch.finfo(gaps_BB.dtype).tiny)[:, None]
    return (weights_BB * functional.softplus((logits_B[None, :] - logits_B[:, None]) / temperature)).sum()


def _listwise_loss(logits_B: Tensor, targets_B: Tensor, groups_B: Tensor, temperature: float) -> Tensor:
    """Return the sum over instructions of the KL divergence from the targets' softmax to the logits' softmax; 0 when they are equal.

    Its gradient is that of the cross entropy: the entropy of the targets is constant.
    """
    _, groups_B = groups_B.unique(return_inverse=True)
    same_BB = groups_B[:, None] == groups_B[None, :]
    target_logs_B = _log_softmax(targets_B / temperature, same_BB)
    logit_logs_B = _log_softmax(logits_B / temperature, same_BB)
    return (target_logs_B.exp() * (target_logs_B - logit_logs_B)).sum()


def _log_softmax(values_B: Tensor, same_BB: Tensor) -> Tensor:
    """Return the log-softmax of each value within its instruction; `same_BB` is True for pairs of the same instruction."""
    return values_B - torch.where(same_BB, values_B[None, :], -torch.inf).logsumexp(dim=1)
