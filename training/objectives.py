"""What the scorer is trained towards: label transforms and the terms of the loss. No model, no Ray, no files.

The paper's objective is the mean squared error of the raw logit. The others compare the candidates of one instruction, so
they need all of them at once: `cut`, `share` and `micro_batches` keep an instruction whole in a step, a worker and a forward
pass. Each term is a sum over pairs or instructions divided by their number in the whole step, so how many workers and
forward passes share a step changes nothing. Shapes: B pairs of a forward pass, G instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.batch_plan import Size, rows_by_group

if TYPE_CHECKING:  # the loop needs no pydantic
    from cluster.config import ObjectiveConfig


def transform_labels(labels: np.ndarray, groups: np.ndarray, config: ObjectiveConfig) -> np.ndarray:
    """Return what logits are trained towards, float32 (pairs,) in [0, 1], from labels and whole instructions (`groups`).

    `power` raises labels to `config.power`; `rank` gives an instruction's lowest label 0, its highest 1 and the rest their
    average rank between; where its labels are all equal they stay.
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
    """Return these pairs' part of a step's loss; the parts of a step add up to

        mse * mean over pairs of (logit - target)^2
        + pairwise * mean over instructions of the logistic loss of score differences, weighted by the gaps between targets
        + listwise * mean over instructions of the cross entropy from softmax(target / t) to softmax(logit / t)

    with t = `config.temperature`. float32 logits (B,); `groups_B` int64, equal within an instruction, whose pairs must all be here.
    """
    total = logits_B.new_zeros(())
    if config.mse:
        total = total + config.mse * (logits_B - targets_B).square().sum() / size.pairs
    if config.pairwise:
        total = total + config.pairwise * _pairwise(logits_B, targets_B, groups_B, config.temperature) / size.instructions
    if config.listwise:
        total = total + config.listwise * _listwise(logits_B, targets_B, groups_B, config.temperature) / size.instructions
    return total


def _pairwise(logits_B: Tensor, targets_B: Tensor, groups_B: Tensor, temperature: float) -> Tensor:
    """The sum over instructions of softplus(-(difference of logits) / t), averaged over their pairs with the gaps as weights."""
    _, groups_B = groups_B.unique(return_inverse=True)
    gaps_BB = (targets_B[:, None] - targets_B[None, :]).clamp(min=0) * (groups_B[:, None] == groups_B[None, :])
    gaps_G = gaps_BB.new_zeros(int(groups_B.max()) + 1).index_add(0, groups_B, gaps_BB.sum(dim=1))
    weights_BB = gaps_BB / gaps_G[groups_B].clamp(min=torch.finfo(gaps_BB.dtype).tiny)[:, None]
    return (weights_BB * functional.softplus((logits_B[None, :] - logits_B[:, None]) / temperature)).sum()


def _listwise(logits_B: Tensor, targets_B: Tensor, groups_B: Tensor, temperature: float) -> Tensor:
    """The sum over instructions of the divergence from the targets' distribution to the logits': 0 where they agree.

    It has the gradient of the cross entropy, from which only the targets' own entropy is missing.
    """
    _, groups_B = groups_B.unique(return_inverse=True)
    same_BB = groups_B[:, None] == groups_B[None, :]
    wanted_B = _log_softmax(targets_B / temperature, same_BB)
    given_B = _log_softmax(logits_B / temperature, same_BB)
    return (wanted_B.exp() * (wanted_B - given_B)).sum()


def _log_softmax(values_B: Tensor, same_BB: Tensor) -> Tensor:
    return values_B - torch.where(same_BB, values_B[None, :], -torch.inf).logsumexp(dim=1)
