"""Methods that rank the candidates of one instruction, by name. Pure: no Ray, no files, no model.

A method is a function from an instruction and its candidates to scores; the candidate with the highest score is selected. A rival method
is added here: a function, and its entry in `sampled_methods` or `choice_methods`.

Candidates are dicts with `response` and, if known, `decoding`, `tokens`, `logprob` (sum, in nats) and `label`. Scores of models are
fields too: `scorer` (zero-shot) and `adapted`, and for choices `likelihood` and `unconditional`.

Shapes: C candidates of one instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.config import LabelConfig
from generation.labels import describe_metric
from generation.logprobs import comparable_logprobs, mean_logprobs
from training.consensus import consensus, consensus_metric
from training.selection import Pool, Selection

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


def sampled_methods(
    decodings: Sequence[Mapping[str, Any]], label: LabelConfig, models: Mapping[str, Rank], rivals: Mapping[str, str] | None = None
) -> list[Method]:
    """Return the methods for sampled candidates, in display order.

    Args:
        decodings: the decodings of the pool, with `name` and `temperature`.
        label: the metric by which the consensus compares two candidates.
        models: the methods with a trained scorer, by name, e.g. `{"scorer": rank_by("scorer")}`.
        rivals: the titles of the methods of other papers, by the field of the candidates with their numbers.
    """
    greedy = [each["name"] for each in decodings if each["temperature"] == 0]
    others = [each["name"] for each in decodings if each["temperature"] > 0]
    titles = {
        "scorer": "Scorer, zero-shot",
        "scorer_fitted": "Fitted selection, zero-shot",
        "adapted": "Scorer, adapted",
        "fitted_no_scorer": "Fitted selection, no scorer",
        "fitted": "Fitted selection, adapted",
    }
    return [
        *(Method("greedy", "baseline", _of_decoding(name), title="Greedy") for name in greedy[:1]),
        *(Method("sample", "baseline", _of_decoding(name), title="One sample") for name in others[:1]),
        *(Method(f"decoding:{name}", "baseline", _of_decoding(name), "mean", f"One sample of {name}") for name in others),
        Method("self_sum", "baseline", _sum_logprob, title="Self-score, sum"),
        Method("self_mean", "baseline", _mean_logprob, title="Self-score, mean"),
        Method("consensus", "baseline", consensus_rank(label), title="Consensus"),
        *(Method(name, "baseline", rank_by(name), title=title) for name, title in (rivals or {}).items()),
        Method("random", "baseline", _equal, "mean", "Random pick"),
        *(Method(name, "trained", rank, title=titles.get(name, name)) for name, rank in models.items()),
        Method("oracle", "oracle", rank_by("label"), title="Oracle"),
    ]


def choice_methods(models: Mapping[str, Rank], likelihood: bool, rivals: Mapping[str, str] | None = None) -> list[Method]:
    """Return the methods for answer choices, in display order. The order of the choices never decides: ties count as a random pick.

    `rivals` is as for `sampled_methods`.
    """
    by_likelihood = [
        Method("likelihood_sum", "baseline", rank_by("likelihood"), "mean", "Likelihood, sum"),
        Method("likelihood_mean", "baseline", _mean_likelihood, "mean", "Likelihood, mean"),
        Method("likelihood_pmi", "baseline", _calibrated_likelihood, "mean", "Likelihood, calibrated"),
    ]
    return [
        Method("random", "baseline", _equal, "mean", "Random pick"),
        *(by_likelihood if likelihood else []),
        *(Method(name, "baseline", rank_by(name), "mean", title) for name, title in (rivals or {}).items()),
        *(Method(name, "trained", rank, "mean", "Scorer, zero-shot" if name == "scorer" else name) for name, rank in models.items()),
    ]


def _equal(instruction: str, candidates: Sequence[Candidate]) -> Floats:
    return np.zeros(len(candidates))


def _of_decoding(name: str) -> Rank:
    """Return a method that ranks the candidates of one decoding first."""

    def rank(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
        drawn_C = np.asarray([each["decoding"] == name for each in candidates], np.float64)
        return drawn_C if drawn_C.any() else None

    return rank


def rank_by(name: str) -> Rank:
    """Return a method that ranks by a field of the candidates."""

    def rank(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
        values = [each.get(name) for each in candidates]
        return None if any(value is None for value in values) else np.asarray(values, np.float64)

    return rank


def _sum_logprob(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
    values = comparable_logprobs(candidates)
    return None if None in values else np.asarray(values, np.float64)


def _mean_logprob(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
    sums_C = _sum_logprob(instruction, candidates)
    if sums_C is None or any(each.get("tokens") is None for each in candidates):
        return None
    return np.asarray(mean_logprobs(sums_C, [each["tokens"] for each in candidates]), np.float64)


def _mean_likelihood(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
    sums_C = rank_by("likelihood")(instruction, candidates)
    return None if sums_C is None else np.asarray(sums_C / np.asarray([each["tokens"] for each in candidates]), np.float64)


def _calibrated_likelihood(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
    """Rank by log p(choice | instruction) - log p(choice | neutral prompt), the domain-conditional PMI of Holtzman et al. 2021."""
    sums_C, unconditional_C = rank_by("likelihood")(instruction, candidates), rank_by("unconditional")(instruction, candidates)
    return None if sums_C is None or unconditional_C is None else np.asarray(sums_C - unconditional_C)


def consensus_rank(label: LabelConfig) -> Rank:
    """Return a method that ranks a candidate by its mean agreement with each other draw (`training.consensus`)."""
    metric = consensus_metric(describe_metric(label))

    def rank(instruction: str, candidates: Sequence[Candidate]) -> Floats:
        return consensus([each["response"] for each in candidates], metric)

    return rank


def fitted_rank(selection: Selection | None, scores: str | None) -> Rank:
    """Return a method that ranks by a fitted selection, with the field `scores` as the scorer's scores, or without scores.

    Without a selection it ranks by the scores, and with neither by the consensus.
    """

    def rank(instruction: str, candidates: Sequence[Candidate]) -> Floats | None:
        values = None if scores is None else rank_by(scores)(instruction, candidates)
        if scores is not None and (selection is None or values is None):
            return values
        pool = Pool(
            [each["response"] for each in candidates],
            values,
            comparable_logprobs(candidates),
            [each.get("tokens") for each in candidates],
            instruction,
        )
        return (selection or Selection(())).rank(pool)

    return rank
