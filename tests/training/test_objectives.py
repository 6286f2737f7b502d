from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from cluster.config import ObjectiveConfig, load
from cluster.errors import UsageError
from training import objectives
from training.batch_plan import Size

LABELS = np.array([1.0, 0.5, 0.5, 0.0, 0.3, 0.3, 1.0, 0.2], np.float32)
GROUPS = np.array([7, 7, 7, 7, 2, 2, 9, 9])
LOGITS = np.array([0.4, 0.1, -0.2, 0.7, 0.0, 1.0, 0.3, 0.9], np.float32)


def parts(rows: list[list[int]], config: ObjectiveConfig) -> tuple[float, np.ndarray]:
    """Return the loss and the gradient of the step when it is computed in these parts."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    wanted = torch.from_numpy(objectives.transform_labels(LABELS, GROUPS, config))
    total = torch.zeros(())
    for part in rows:
        total = total + objectives.compute_loss(logits[part], wanted[part], torch.from_numpy(GROUPS[part]), Size(8, 3), config)
    total.backward()
    assert logits.grad is not None
    return total.item(), logits.grad.numpy()


def by_hand(config: ObjectiveConfig) -> float:
    wanted = objectives.transform_labels(LABELS, GROUPS, config).astype(float)
    pairwise = listwise = 0.0
    for group in set(GROUPS):
        rows = np.flatnonzero(group == GROUPS)
        gaps = [(wanted[a] - wanted[b], LOGITS[a] - LOGITS[b]) for a in rows for b in rows if wanted[a] > wanted[b]]
        if gaps:
            pairwise += sum(gap * np.log1p(np.exp(-d / config.temperature)) for gap, d in gaps) / sum(gap for gap, _ in gaps)
        p, q = (np.exp(each[rows] / config.temperature) for each in (wanted, LOGITS.astype(float)))
        p, q = p / p.sum(), q / q.sum()
        listwise += float((p * np.log(p / q)).sum())
    return config.mse * float(((LOGITS - wanted) ** 2).mean()) + (config.pairwise * pairwise + config.listwise * listwise) / 3


ALL = ObjectiveConfig(mse=0.5, pairwise=0.7, listwise=1.3, temperature=0.3)


@pytest.mark.parametrize("config", [ObjectiveConfig(), ALL, ALL.model_copy(update={"labels": "rank"}), ALL.model_copy(update={"mse": 0})])
def test_the_loss_equals_its_formula_for_any_division_of_the_instructions(config: ObjectiveConfig):
    whole, gradient = parts([[*range(8)]], config)
    assert whole == pytest.approx(by_hand(config), rel=1e-5)
    for sharing in ([[0, 1, 2, 3], [4, 5], [6, 7]], [[6, 7, 3, 2, 1, 0], [5, 4]]):
        assert parts(sharing, config)[0] == pytest.approx(whole, rel=1e-5)
        assert np.abs(parts(sharing, config)[1] - gradient).max() < 1e-6


def test_terms_compare_within_an_instruction_only_and_are_lowest_when_scores_equal_labels():
    config = ObjectiveConfig(mse=0, listwise=1, temperature=0.3)
    logits = torch.tensor(LABELS + 0.4 * GROUPS, dtype=torch.float32, requires_grad=True)
    value = objectives.compute_loss(logits, torch.from_numpy(LABELS), torch.from_numpy(GROUPS), Size(8, 3), config)
    value.backward()
    assert abs(value.item()) < 1e-6 and logits.grad is not None and logits.grad.abs().max() < 1e-6
    config = ObjectiveConfig(mse=0, pairwise=1)
    _, gradient = parts([[*range(8)]], config)
    assert gradient[0] < 0 < gradient[3]  # a step raises the best score and lowers the worst
    assert gradient[4] == gradient[5] == 0  # equal labels are not compared


def test_label_transforms():
    power = objectives.transform_labels(LABELS, GROUPS, ObjectiveConfig(labels="power", power=0.5))
    assert power == pytest.approx(np.sqrt(LABELS))
    rank = objectives.transform_labels(LABELS, GROUPS, ObjectiveConfig(labels="rank"))
    assert rank[:4] == pytest.approx((rankdata(LABELS[:4]) - 1) / 3)
    assert rank[4:].tolist() == pytest.approx([0.3, 0.3, 1, 0])
    assert rank.dtype == power.dtype == np.float32


def test_an_objective_without_a_term_is_refused():
    with pytest.raises(UsageError, match="mse, pairwise and listwise are all 0"):
        load(None, ["training.objective.mse=0"])
