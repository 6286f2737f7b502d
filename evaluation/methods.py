"""Methods that rank the candidates of one instruction, by name. Pure: no Ray, no files, no model.

A method is a function from an instruction and its candidates to scores; the candidate with the highest score is selected. A rival method
is added here: a function, and its entry in `sampled_methods` or `choice_methods`.

Candidates are dicts with `response` and, if known, `decoding`, `tokens`, `logprob` (sum, in nats) and `label`. Scores of models are
fields too: `scorer` (zero-shot), `scorer_fitted`, `adapted`, `fitted`, and for choices `likelihood` and `unconditional`.

Shapes: C candidates of one instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config import LabelConfig
from generation import labels
from generation.logprobs import mean_logprobs

Floats = NDArray[np.float64]
Candidate = Mapping[str, Any]
Rank = Callable[[str, Sequence[Candidate]], Floats | None]
"""Takes the instruction and its candidates. Returns a score for each, (C,), or None without a field that it reads."""


@dataclass(frozen=True)
class Method:
    """A method with its role in a comparison."""

    name: str
    role: Literal["baseline", "trained", "oracle"]
    """`trained` methods use a trained scorer, `baseline` methods do not, and the oracle reads the labels."""
    rank: Rank
    ties: Literal["first", "mean"] = "first"
    """The value of candidates with the same highest score: that of the first one, or their mean, which is the expectation of a random
    choice among them."""
    title: str = ""
    """Name for reports; the default is `name`."""

    def value(self, instruction: str, candidates: Sequence[Candidate], labels_C: Floats) -> float:
        """Return the expected label of the selected candidate, in [0, 1]; NaN if the method cannot rank this instruction."""
        scores_C = self.rank(instruction, candidates)
        if scores_C is None:
            return float("nan")
        if self.ties == "first":
            return float(labels_C[int(np.argmax(scores_C))])
        return float(labels_C[scores_C == scores_C.max()].mean())


def sampled_methods(decodings: Sequence[Mapping[str, Any]], label: LabelConfig, models: Sequence[str]) -> list[Method]:
    """Return the methods for sampled candidates, in display order.

    Args:
        decodings: the decodings of the pool, with `name` and `temperature`.
        label: the metric by which the consensus compares two candidates.
        models: the fields with scores of models that the candidates have, e.g. `scorer` and `fitted`.
    """
    greedy = [each["name"] for each in decodings if each["temperature"] == 0]
    others = [each["name"] for each in decodings if each["temperature"] > 0]
    titles = {
        "scorer": "Scorer, zero-shot",
        "scorer_fitted": "Fitted selection, zero-shot",
        "adapted": "Scorer, adapted",
        "fitted": "Fitted selection, adapted",
    }
    return [
        *(Method("greedy", "baseline", _of_decoding(name), title="Greedy") for name in greedy[:1]),
        *(Method("sample", "baseline", _of_decoding(name), title="One sample") for name in others[:1]),
        *(Method(f"decoding:{name}", "baseline", _of_decoding(name), "mean", f"One sample of {name}") for name in others),
        Method("self_sum", "baseline", _sum_logprob, title="Self-score, sum"),
        Method("self_mean", "baseline", _mean_logprob, title="Self-score, mean"),
        Method("consensus", "baseline", _consensus(label), title="Consensus"),
        Method("random", "baseline", _equal, "mean", "Random pick"),
        *(Method(name, "trained", _field(name), title=titles.get(name, name)) for name in models),
        Method("oracle", "oracle", _field("label"), title="Oracle"),
    ]


def choice_methods(models: Sequence[str], likelihood: bool) -> list[Method]:
    """Return the methods for answer choices, in display order. The order of the choices never decides: ties count as a random pick."""
    by_likelihood = [
        Method("likelihood_sum", "baseline", _field("likelihood"), "mean", "Likelihood, sum"),
        Method("likelihood_mean", "baseline", _mean_likelihood, "mean", "Likelihood, mean"),
        Method("likelihood_pmi", "baseline", _calibrated_likelihood, "mean", "Likelihood, calibrated"),
    ]
    return [
        Method("random", "baseline", _equal, "mean", "Random pick"),
        *(by_likelihood if likelihood else []),
        *(Method(name, "trained", _field(name), "mean", "Scorer, zero-shot" if name == "scorer" else name) for name in models),
    ]


def _equal(instruction: str, candidates: Sequence[Candidate]) -> Floats:
    return np.zeros(len(candidates))


def _of_decoding(name: str) -> Rank:
    """Return a method that ranks the candidates of one decoding first."""

    def rank(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
        drawn_C = np.asarray([each["decoding"] == name for each in candidates], np.float64)
        return drawn_C if drawn_C.any() else None

    return rank


def _field(name: str) -> Rank:
    """Return a method that ranks by a field of the candidates."""

    def rank(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
        values = [each.get(name) for each in candidates]
        return None if any(value is None for value in values) else np.asarray(values, np.float64)

    return rank


_sum_logprob = _field("logprob")


def _mean_logprob(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
    if any(each.get("logprob") is None or each.get("tokens") is None for each in candidates):
        return None
    return np.asarray(mean_logprobs([each["logprob"] for each in candidates], [each["tokens"] for each in candidates]), np.float64)


def _mean_likelihood(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
    sums_C = _field("likelihood")(instruction, candidates)
    return None if sums_C is None else np.asarray(sums_C / np.asarray([each["tokens"] for each in candidates]), np.float64)


def _calibrated_likelihood(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
    """Rank by log p(choice | instruction) - log p(choice | neutral prompt), the domain-conditional PMI of Holtzman et al. 2021."""
    sums_C, unconditional_C = _field("likelihood")(instruction, candidates), _field("unconditional")(instruction, candidates)
    return None if sums_C is None or unconditional_C is None else np.asarray(sums_C - unconditional_C)


def _consensus(label: LabelConfig) -> Rank:
    """Return a method that ranks a candidate by its mean label against each other draw, repeats included."""

    def rank(instruction: str, candidates: Sequence[Candidate]) -> Floats:
        responses = [each["response"] for each in candidates]
        pairs = [(left, right) for left in range(len(responses)) for right in range(len(responses)) if left != right]
        if not pairs:
            return np.zeros(len(responses))
        texts, others = (pa.array([[responses[pair[side]]] for pair in pairs], labels.TEXTS) for side in (0, 1))
        values = np.asarray(labels.compute_labels(texts, others, label), np.float64)
        return np.asarray(values.reshape(len(responses), -1).mean(axis=1))

    return rank
