"""Selection: rank the candidates of a pool by a fitted combination of several signals. No model, no Ray; files only in `read`.

A selection is a linear ranker over the signals of `signals`. It has one variant for each set of signals that a pool can have:
endpoints may give no log-probabilities, and without a scorer there is no score. `training.selection_fit` fits it on train rows. The
file `selection.json` in the folder of a scorer holds it. `evaluate` and `serve` use the same code.

Shapes: C draws of a pool, K signals of a variant.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import models, storage
from cluster.config import LabelConfig
from cluster.errors import CappyError
from generation.logprobs import mean_logprobs
from training.consensus import DEFAULT_METRIC, agreement_matrix, weighted_agreement
from training.records import SelectionSummary

Floats = NDArray[np.float64]

FILE = "selection.json"
"""Name of the file in the folder of a scorer."""
VERSION = 1
TEXT_SIGNALS = ("consensus", "frequency", "length", "overlap")
"""Signals that every pool has."""
LOGPROB_SIGNALS = ("logprob_mean", "logprob_sum")
"""Signals of pools with log-probabilities and token counts."""
SCORE_SIGNALS = ("score", "score_consensus")
"""Signals of scored pools."""
VARIANTS = (
    (*SCORE_SIGNALS, *LOGPROB_SIGNALS, *TEXT_SIGNALS),
    (*SCORE_SIGNALS, *TEXT_SIGNALS),
    (*LOGPROB_SIGNALS, *TEXT_SIGNALS),
    TEXT_SIGNALS,
)
"""The signals of each variant, best first: all, without log-probabilities, without a score, without both."""

_AGREEMENT_SIGNALS = ("consensus", "score_consensus")
# Standard deviations below this are rounding errors.
_SMALLEST_SCALE = 1e-6
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pool:
    """The sampled candidates of one instruction, repeats included."""

    responses: Sequence[str]
    scores: Sequence[float] | Floats | None = None
    """The scorer's raw logits."""
    logprobs: Sequence[float | None] | Floats | None = None
    """Log-probabilities of the responses in nats, the sum over their tokens."""
    tokens: Sequence[int | None] | Floats | None = None
    """Numbers of sampled tokens."""
    instruction: str = ""
    """The text that the responses answer, as the scorer reads it."""


def signals(pool: Pool, metric: LabelConfig = DEFAULT_METRIC) -> dict[str, Floats]:
    """Return the signals of the draws of a pool by name, each (C,) and finite. Repeats of a response have the same values.

    - `score`: the scorer's raw logit.
    - `logprob_mean`, `logprob_sum`: the log-probability in nats, per token and in all.
    - `frequency`: the share of the draws that have this response, in (0, 1].
    - `length`: ln(1 + number of words), words separated by white space.
    - `overlap`: the share of the words of the response that the instruction has, in [0, 1], without case and punctuation.
    - `consensus`: the mean agreement with the other draws, in [0, 1]; see `training.consensus`.
    - `score_consensus`: the same with each other draw weighted by the softmax of the scores, standardised within the pool.

    A value that repeats of a response differ in is averaged over them. A pool with one score that is unknown, NaN or infinite has no
    signals of the score. The same applies to its log-probabilities and token counts.

    Raises `ValueError` if the lists of the pool differ in length.
    """
    found = value_signals(pool)
    return found | agreement_signals(pool.responses, metric, found.get("score"))


def value_signals(pool: Pool) -> dict[str, Floats]:
    """Return the signals of `signals` that compare no two responses."""
    count = len(pool.responses)
    numbers = {response: number for number, response in enumerate(dict.fromkeys(pool.responses))}
    positions_C = np.array([numbers[response] for response in pool.responses], np.int64)
    repeats_D = np.bincount(positions_C, minlength=len(numbers))

    def known(values: Sequence[float | None] | Sequence[float] | Floats | None) -> Floats | None:
        """Return finite values, averaged over repeats; None if one is unknown."""
        if values is None:
            return None
        if len(values) != count:
            raise ValueError(f"{len(values)} values for a pool of {count} responses; give one for each response")
        values_C = np.array([math.nan if value is None else value for value in values], np.float64)
        if not np.isfinite(values_C).all():
            return None
        return np.asarray((np.bincount(positions_C, values_C, len(numbers)) / repeats_D)[positions_C], np.float64)

    found: dict[str, Floats] = {}
    scores_C, logprobs_C, tokens_C = known(pool.scores), known(pool.logprobs), known(pool.tokens)
    if scores_C is not None:
        found["score"] = scores_C
    if logprobs_C is not None and tokens_C is not None:
        found["logprob_mean"] = mean_logprobs(logprobs_C, tokens_C)
        found["logprob_sum"] = logprobs_C
    found["frequency"] = repeats_D[positions_C] / max(count, 1)
    found["length"] = np.log1p(np.array([len(response.split()) for response in pool.responses], np.float64))
    known_words = set(_words(pool.instruction))
    overlap = {response: _share([word in known_words for word in _words(response)]) for response in numbers}
    found["overlap"] = np.array([overlap[response] for response in pool.responses], np.float64)
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(len(flags), 1)


def agreement_signals(responses: Sequence[str], metric: LabelConfig, scores_C: Floats | None) -> dict[str, Floats]:
    """Return `consensus` and, with scores, `score_consensus`; see `signals`."""
    agreement_CC = agreement_matrix(responses, metric)
    found = {"consensus": weighted_agreement(agreement_CC, np.zeros(len(responses)))}
    if scores_C is not None:
        found["score_consensus"] = weighted_agreement(agreement_CC, _standardise(scores_C, _SMALLEST_SCALE, 1.0))
    return found


def _standardise(values_C: Floats, scale: float, pool_variance: float) -> Floats:
    """Return the values minus their mean, over the root of `scale` ** 2 + `pool_variance` * their variance.

    With `pool_variance` 1 a signal that varies much in a pool counts by its rank, and one that hardly varies counts little.
    """
    centred_C = values_C - values_C.mean() if len(values_C) else values_C
    return np.asarray(centred_C / math.sqrt(scale**2 + pool_variance * float(np.square(centred_C).mean() if len(values_C) else 0)))


@dataclass(frozen=True)
class Variant:
    """A linear ranker over some signals."""

    signals: tuple[str, ...]
    weights: tuple[float, ...]
    """The weight of each standardised signal."""
    scales: tuple[float, ...]
    """The scale of each signal, in its unit: its usual standard deviation within a pool."""
    pool_variance: float = 1.0
    """1 standardises a signal by its scale and its variance in the pool together, 0 by its scale alone."""
    l2: float | None = None
    """Strength of the L2 regularisation; None if the weights were not fitted."""
    rows: int = 0
    """Number of pools that it was fitted on."""
    cross_validated: dict[str, float] = field(default_factory=dict)
    """Mean label of the picks on held-out pools, in [0, 1]: `fitted`, each single signal, `random` and `oracle`. Empty if unknown."""

    def rank(self, found: Mapping[str, Floats]) -> Floats:
        """Return the value of each draw, (C,); the highest is the best. `found` are the signals of the pool."""
        return np.asarray(self.features(found) @ np.array(self.weights), np.float64)

    def features(self, found: Mapping[str, Floats]) -> Floats:
        """Return the standardised signals, (C, K)."""
        columns = [_standardise(found[name], scale, self.pool_variance) for name, scale in zip(self.signals, self.scales, strict=True)]
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Selection:
    """A fitted ranker of candidates."""

    variants: tuple[Variant, ...]
    """The variants, best first. A pool is ranked by the first one whose signals it has."""
    metric: LabelConfig = DEFAULT_METRIC
    """The label metric, which also compares two responses in the consensus."""
    made: dict[str, Any] = field(default_factory=dict)
    """How it was fitted: JSON values for people, for example the origin of the scores."""

    def variant(self, found: Collection[str]) -> Variant | None:
        """Return the variant for a pool with the signals of these names; None if there is none."""
        return next((each for each in self.variants if set(found) >= set(each.signals)), None)

    def rank(self, pool: Pool) -> Floats:
        """Return a finite value for each draw of a pool, (C,); the highest is the best, of equal values the first.

        Repeats of a response get equal values. Empty responses get the lowest value. Without a variant for the signals of the pool, the
        scores decide, else the consensus.
        """
        found = value_signals(pool)
        scored = "score" in found
        variant = self.variant({*found, *_AGREEMENT_SIGNALS[: 1 + scored]})
        wanted = variant.signals if variant else ("score",) if scored else ("consensus",)
        if set(wanted) & set(_AGREEMENT_SIGNALS):  # the slow part
            found |= agreement_signals(pool.responses, self.metric, found.get("score"))
        return lower_empty(variant.rank(found) if variant else found[wanted[0]], pool.responses)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `selection.json`."""
        label = {"metric": self.metric.metric, "mode": self.metric.mode}
        return {"version": VERSION, "label": label, "made": self.made, "variants": [asdict(each) for each in self.variants]}

    @classmethod
    def from_json(cls, tree: Any, name: str = FILE) -> Selection:
        """Return the selection of the content of a `selection.json`. Raises `CappyError`, which names `name`, for any other content."""
        try:
            if tree["version"] > VERSION:
                raise CappyError(f"{name} has version {tree['version']}, and this Cappy reads up to {VERSION}; update Cappy")
            variants = tuple(_read_variant(each) for each in tree["variants"])
            return cls(variants, LabelConfig.model_validate(tree["label"]), dict(tree["made"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CappyError(f"{name} is not a selection ({error!r}); publish the scorer again or delete the file") from None


def _read_variant(tree: Mapping[str, Any]) -> Variant:
    names = tuple(map(str, tree["signals"]))
    weights, scales = (tuple(float(value) for value in tree[key]) for key in ("weights", "scales"))
    if not names or set(names) - set(VARIANTS[0]):
        raise ValueError(f"signals={list(names)}")
    pool_variance = float(tree["pool_variance"])
    valid = all(map(math.isfinite, weights)) and all(0 < each < math.inf for each in scales) and 0 <= pool_variance < math.inf
    if not len(names) == len(weights) == len(scales) or not valid:
        raise ValueError("weights, scales or pool_variance")
    l2 = None if tree["l2"] is None else float(tree["l2"])
    measured = {str(key): float(value) for key, value in tree["cross_validated"].items()}
    return Variant(names, weights, scales, pool_variance, l2, int(tree["rows"]), measured)


def blend_selection(weight: float) -> Selection:
    """Return the selection by score + `weight` * mean log-probability per token (`training.blend`), or by score if that is unknown."""
    blend = Variant(("score", "logprob_mean"), (1.0, weight), (1.0, 1.0), pool_variance=0.0)
    return Selection((blend,))


def lower_empty(values_C: Floats, responses: Sequence[str]) -> Floats:
    """Return the values with those of empty responses below all others."""
    empty_C = np.array([not response for response in responses], bool)
    if not empty_C.any():
        return values_C
    return np.where(empty_C, values_C.min() - 1.0, values_C)


def read(folder: str) -> Selection | None:
    """Return the selection of a scorer's folder, a local path or `s3://`; None if it has none.

    Raises `CappyError` for a damaged file.
    """
    if folder in models.EMBEDDED:
        folder = str(models.resolve(folder, "scorer_path"))
    uri = storage.join(folder, FILE)
    try:
        tree = storage.read_json(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise CappyError(f"{uri} is not JSON ({error}); publish the scorer again or delete the file") from None
    return Selection.from_json(tree, uri)


def summarise(selection: Selection | None) -> SelectionSummary | None:
    """Return the figures of the first variant, which has the most signals; None without a selection or a variant."""
    if selection is None or not selection.variants:
        return None
    first = selection.variants[0]
    weights = dict(zip(first.signals, first.weights, strict=True))
    return {"rows": first.rows, "l2": first.l2, "weights": weights, "cross_validated": first.cross_validated}


def to_text(selection: Selection) -> str:
    """Return the content of the file `selection.json`."""
    return json.dumps(selection.to_json(), indent=2) + "\n"
