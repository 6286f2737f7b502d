"""Fit a selection on labelled pools: a listwise softmax ranker with an L2 strength chosen by cross-validation. Pure numpy.

The loss of a pool is the cross entropy of two softmax distributions over its distinct responses, as in ListNet (Cao et al. 2007). The
target is the softmax of their labels at temperature `TEMPERATURE`. The loss is convex in the weights. Repeats count once: otherwise a
response that is drawn often has a large share of the softmax with any weights, and the fit learns to avoid it.

The scores of the pools must come from a scorer that was not trained on their rows. Scores of trained rows are too good, and the fit
would give them too much weight.

Shapes: N pools, C distinct responses (padded), K signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cluster.config import LabelConfig, fingerprint
from generation.logprobs import comparable_logprobs
from training.consensus import DEFAULT_METRIC
from training.selection import VARIANTS, Floats, Pool, Selection, Variant, lower_empty, signals

TEMPERATURE = 0.2
"""Divisor of the labels in the softmax: a label difference of 0.2 is a factor of e in the target."""
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The L2 strengths that cross-validation chooses from."""
FOLDS = 5
MIN_POOLS = 8
"""Smallest number of pools with different labels for a fit."""
_UNVALIDATED_STRENGTH = 0.3
_NEWTON_STEPS = 50
_MIN_SCALE = 1e-3  # of signals that are constant in every pool


class _Data(NamedTuple):
    """The distinct responses of the pools of one variant, padded."""

    features_NCK: Floats
    targets_NC: Floats
    """Softmax of the labels; 0 for padding."""
    present_NC: np.ndarray
    """bool: real responses."""

    def take(self, rows: np.ndarray) -> _Data:
        return _Data(self.features_NCK[rows], self.targets_NC[rows], self.present_NC[rows])


class Fitted(NamedTuple):
    """A fitted selection, with the picks of the cross-validation."""

    selection: Selection
    picked: Floats
    """float64: the label of the held-out pick of each pool or row, by the selection that was fitted without its group, with the first
    variant. NaN if there is one group, or if the pool has not the signals of this variant."""


def fit_selection(
    pools: Sequence[Pool],
    labels: Sequence[Sequence[float] | Floats],
    groups: Sequence[str],
    metric: LabelConfig = DEFAULT_METRIC,
    prior: Selection | None = None,
    made: Mapping[str, Any] | None = None,
    variants: Sequence[tuple[str, ...]] = VARIANTS,
) -> Fitted | None:
    """Return the selection fitted on labelled pools, None if fewer than `MIN_POOLS` of them have responses with different labels.

    Empty responses do not count, because a selection never picks them. A variant is left out if fewer than `MIN_POOLS` of these pools have
    its signals.

    Args:
        pools: the pools. Their scores must be of a scorer that was not trained on their rows.
        labels: the label of each draw of each pool, in [0, 1].
        groups: the group of each pool. The pools of a group are in one fold of the cross-validation: one task, or one row.
        metric: the label metric.
        prior: a selection that can serve as the start, such as that of the base of an adapted scorer. Cross-validation chooses for each
            variant whether the weights are regularised towards its weights or towards 0.
        made: JSON values that describe the origin of the pools and scores.
        variants: the signals of each variant, best first.
    """
    labels_of = [np.asarray(each, np.float64) for each in labels]
    distinct = [_distinct(pool.responses) for pool in pools]
    kept = [number for number, at in enumerate(distinct) if len(set(labels_of[number][at].tolist())) > 1]
    if len(kept) < MIN_POOLS:
        return None
    found = [signals(pools[number], metric) for number in kept]
    fitted: list[Variant] = []
    # If all responses have one label, every pick has it.
    values_N = np.array([each[at[0] if at else 0] if len(each) else np.nan for each, at in zip(labels_of, distinct, strict=True)])
    values_N[kept] = np.nan
    for names in variants:
        usable = [at for at, each in enumerate(found) if each.keys() >= set(names)]
        if len(usable) < MIN_POOLS:
            continue
        start = next((each for each in prior.variants if each.signals == names and each.pool_variance), None) if prior else None
        chosen = [kept[at] for at in usable]
        variant, picked = _fit_variant(
            names,
            [found[at] for at in usable],
            [labels_of[number] for number in chosen],
            [groups[number] for number in chosen],
            [pools[number].responses for number in chosen],
            start,
        )
        if not fitted and picked is not None:
            values_N[chosen] = picked
        fitted.append(variant)
    description = {
        "loss": f"listwise cross entropy with the softmax of the labels at temperature {TEMPERATURE:g}",
        "groups": len({groups[number] for number in kept}),
        "folds": min(FOLDS, len({groups[number] for number in kept})),
        "prior": prior is not None,
    }
    return Fitted(Selection(tuple(fitted), metric, {**description, **(made or {})}), values_N)


def fit_on_rows(
    rows: pa.Table, scores: Sequence[np.ndarray], metric: LabelConfig, prior: Selection | None = None, made: Mapping[str, Any] | None = None
) -> Fitted | None:
    """Return the selection fitted on the sampled candidates of rows, and the label of the held-out pick of each row.

    Cross-validation is over datasets if the rows have `FOLDS` of them or more, else over instructions. The pick of a row without sampled
    candidates is NaN.

    Args:
        rows: rows with columns `dataset`, `instruction` and `candidates`.
        scores: the held-out scores of the candidates of each row, (candidates,).
        metric: the metric of the labels.
        prior: as for `fit_selection`.
        made: as for `fit_selection`.
    """
    pools, labels, datasets, instructions, positions = [], [], [], [], []
    columns = (rows[name].to_pylist() for name in ("dataset", "instruction", "candidates"))
    for position, (dataset, instruction, candidates, scores_C) in enumerate(zip(*columns, scores, strict=True)):
        sampled = [at for at, each in enumerate(candidates) if each["source"] == "sampled"]
        if not sampled:
            continue
        kept = [candidates[at] for at in sampled]
        fields = {name: [each[name] for each in kept] for name in ("response", "tokens", "label")}
        pools.append(Pool(fields["response"], scores_C[sampled].tolist(), comparable_logprobs(kept), fields["tokens"], instruction))
        labels.append(fields["label"])
        datasets.append(dataset)
        instructions.append(instruction)
        positions.append(position)
    groups = datasets if len(set(datasets)) >= FOLDS else instructions
    fitted = fit_selection(pools, labels, groups, metric, prior, made)
    if fitted is None:
        return None
    values_R = np.full(len(rows), np.nan)
    values_R[positions] = fitted.picked
    return fitted._replace(picked=values_R)


def _fit_variant(
    names: tuple[str, ...],
    found: Sequence[Mapping[str, Floats]],
    labels: Sequence[Floats],
    groups: Sequence[str],
    responses: Sequence[Sequence[str]],
    prior: Variant | None,
) -> tuple[Variant, Floats | None]:
    """Fit one variant: choose the start and the L2 strength by the held-out loss, then fit on all pools.

    Return it with the label of the held-out pick of each pool, (N,); None without folds.
    """
    scales = tuple(_typical_deviation(each[name] for each in found) for name in names)
    unfitted = Variant(names, (0.0,) * len(names), scales)
    distinct = [_distinct(each) for each in responses]
    features = [unfitted.features(each) for each in found]
    data = _pad(
        [each[at] for each, at in zip(features, distinct, strict=True)], [each[at] for each, at in zip(labels, distinct, strict=True)]
    )
    starts = [np.array(each.weights) for each in (prior, unfitted) if each]
    folds_N = _folds(groups)
    chosen, measured, picked_N = (_UNVALIDATED_STRENGTH, 0), {}, None
    if folds_N.max() > 0:
        # The strongest first: of equal losses it is chosen.
        options = [(strength, start) for strength in reversed(STRENGTHS) for start in range(len(starts))]
        losses = dict.fromkeys(options, 0.0)
        weights_of: dict[tuple[float, int, int], Floats] = {}
        for fold in range(folds_N.max() + 1):
            train, held_out = data.take(folds_N != fold), data.take(folds_N == fold)
            for strength, start in options:
                weights_K = weights_of[strength, start, fold] = _fit_weights(train, strength, starts[start])
                losses[strength, start] += _loss(held_out, weights_K) * len(held_out.targets_NC)
        chosen = min(options, key=lambda option: losses[option])
        fitted = [each @ weights_of[(*chosen, int(fold))] for each, fold in zip(features, folds_N, strict=True)]
        picked_N = _pick(fitted, labels, responses)
        measured = {"fitted": float(picked_N.mean())}
        measured |= {name: float(_pick([each[name] for each in found], labels, responses).mean()) for name in names}
        measured |= {"random": _mean(each.mean() for each in labels), "oracle": _mean(each.max() for each in labels)}
    weights_K = _fit_weights(data, chosen[0], starts[chosen[1]])
    return Variant(names, tuple(weights_K.tolist()), scales, l2=chosen[0], rows=len(found), cross_validated=measured), picked_N


def _distinct(responses: Sequence[str]) -> list[int]:
    """Return the positions of the first draw of each distinct response that is not empty."""
    first: dict[str, int] = {}
    for position, response in enumerate(responses):
        if response:
            first.setdefault(response, position)
    return list(first.values())


def _typical_deviation(values: Iterable[Floats]) -> float:
    """Return the root of the mean variance of a signal within a pool."""
    return max(float(np.sqrt(_mean(each.var() for each in values))), _MIN_SCALE)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _pick(values: Sequence[Floats], labels: Sequence[Floats], responses: Sequence[Sequence[str]]) -> Floats:
    """Return the label of the draw with the highest value of each pool, (N,)."""
    picks = [labels_C[lower_empty(each, texts).argmax()] for each, labels_C, texts in zip(values, labels, responses, strict=True)]
    return np.array(picks, np.float64)


def _folds(groups: Sequence[str]) -> np.ndarray:
    """Return the fold of each pool, int64 (N,): groups are dealt to at most `FOLDS` folds in the order of a hash."""
    ordered = sorted(set(groups), key=lambda group: (fingerprint(group), group))
    fold_of = {group: number % FOLDS for number, group in enumerate(ordered)}
    return np.array([fold_of[group] for group in groups], np.int64)


def _pad(features: Sequence[Floats], labels: Sequence[Floats]) -> _Data:
    most = max(map(len, labels))
    features_NCK = np.zeros((len(labels), most, features[0].shape[1]))
    targets_NC = np.zeros((len(labels), most))
    for number, (features_CK, labels_C) in enumerate(zip(features, labels, strict=True)):
        features_NCK[number, : len(labels_C)] = features_CK
        weights_C = np.exp((labels_C - labels_C.max()) / TEMPERATURE)
        targets_NC[number, : len(labels_C)] = weights_C / weights_C.sum()
    return _Data(features_NCK, targets_NC, targets_NC > 0)


def _softmax(data: _Data, weights_K: Floats) -> tuple[Floats, float]:
    """Return the softmax of the values of each pool, (N, C), and the mean loss over the pools."""
    values_NC = np.where(data.present_NC, data.features_NCK @ weights_K, -np.inf)
    values_NC -= values_NC.max(axis=1, keepdims=True)
    exponentials_NC = np.exp(values_NC)
    totals_N1 = exponentials_NC.sum(axis=1, keepdims=True)
    losses_NC = np.where(data.present_NC, data.targets_NC * (np.log(totals_N1) - np.where(data.present_NC, values_NC, 0.0)), 0.0)
    return exponentials_NC / totals_N1, float(losses_NC.sum(axis=1).mean())


def _loss(data: _Data, weights_K: Floats) -> float:
    return _softmax(data, weights_K)[1]


def _fit_weights(data: _Data, strength: float, start_K: Floats) -> Floats:
    """Minimise the mean loss plus `strength` / 2 * |weights - start|^2 by Newton's method with step halving."""
    weights_K = start_K.copy()
    count, _, size = data.features_NCK.shape

    def objective(candidate_K: Floats) -> float:
        return _loss(data, candidate_K) + strength / 2 * float(np.square(candidate_K - start_K).sum())

    current = objective(weights_K)
    for _ in range(_NEWTON_STEPS):
        shares_NC, _ = _softmax(data, weights_K)
        gradient_K = np.einsum("nc,nck->k", shares_NC - data.targets_NC, data.features_NCK) / count + strength * (weights_K - start_K)
        means_NK = np.einsum("nc,nck->nk", shares_NC, data.features_NCK)
        centred_NCK = data.features_NCK - means_NK[:, None, :]
        curvature_KK = np.einsum("nc,nck,ncl->kl", shares_NC, centred_NCK, centred_NCK, optimize=True) / count
        step_K = np.linalg.solve(curvature_KK + strength * np.eye(size), gradient_K)
        length = 1.0
        while length > 1e-6 and objective(weights_K - length * step_K) > current:
            length /= 2
        weights_K = weights_K - length * step_K
        improved = objective(weights_K)
        if current - improved < 1e-10:
            break
        current = improved
    return weights_K
