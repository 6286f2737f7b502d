"""The selection of the choices of a pool: `serve` and `answer` use it. Pure; imports neither Ray nor a web framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config import Fallback, LabelConfig, SelectionMode
from generation.engines.contract import Candidate
from generation.logprobs import mean_logprob
from training.consensus import consensus
from training.selection import Pool, Selection, blend_selection

SelectedBy = Literal["score", "fitted", "consensus", "blend"]
"""The signals that selected the choices."""


@dataclass(frozen=True)
class Selector:
    """How the choices of a pool are ranked: the setting, and the files beside the weights of the scorer."""

    mode: SelectionMode
    """`serving.selection`."""
    metric: LabelConfig
    """Metric of the consensus."""
    selection: Selection | None = None
    """The fitted selection of the scorer, if it has one."""
    logprob_weight: float | None = None
    """Weight of the blend, if one was fitted with the scorer."""

    @property
    def is_slow(self) -> bool:
        """Whether `rank` can compare long responses, which takes long. Its compiled code releases the GIL."""
        return self.mode == "consensus" or self.selection is not None

    def rank(
        self, instruction: str, candidates: Sequence[Candidate], scores: Sequence[float], *, scored: bool, fallback: Fallback | None
    ) -> tuple[SelectedBy | None, list[float]]:
        """Return the signals that select, None by a fallback or without a scorer, and the scores that rank the candidates.

        Args:
            instruction: the text that the scorer reads as the instruction.
            candidates: the pool, in the order of sampling.
            scores: the raw logit of each candidate, NaN without a score.
            scored: whether a scorer scored the pool.
            fallback: the fallback that applies, because the scorer failed; None without one.
        """
        if self.mode == "consensus" or fallback == "consensus":
            return (None if fallback else "consensus"), fallback_ranking_scores(candidates, "consensus", self.metric)
        if fallback or not scored:
            return None, fallback_ranking_scores(candidates, fallback or "first", self.metric)
        if self.mode == "blend" and self.logprob_weight is not None:
            return "blend", ranking_scores(instruction, candidates, scores, blend_selection(self.logprob_weight))
        if self.mode in ("scorer", "fitted") and self.selection is not None:
            return "fitted", ranking_scores(instruction, candidates, scores, self.selection)
        return "score", ranking_scores(instruction, candidates, scores, None)


def abstains(best_score: float, min_score: float | None, fallback: Fallback | None = None) -> bool:
    """Return whether a pool has no answer: the score of its best candidate is below `min_score`, or is NaN."""
    # Not `<`: NaN must abstain too.
    return min_score is not None and fallback is None and not best_score >= min_score


def distinct_responses(candidates: Sequence[Candidate]) -> list[str]:
    """Return the different responses of the candidates, in order; the scorer reads each once."""
    return list(dict.fromkeys(candidate["response"] for candidate in candidates))


def rank_candidates(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[int]:
    """Return the positions of the candidates, best first.

    Equal scores stay in the order of sampling. Empty responses and candidates without a score (NaN) are last.
    """

    def key(position: int) -> tuple[bool, float]:
        score = scores[position]
        return (not candidates[position]["response"] or math.isnan(score), 0.0 if math.isnan(score) else -score)

    return sorted(range(len(candidates)), key=key)


def select_choices(candidates: Sequence[Candidate], scores: Sequence[float], n: int) -> list[int]:
    """Return the positions of the `n` choices, best first; see `rank_candidates`.

    A response is chosen once. With fewer than `n` different responses, the repeated ones follow at the end.
    """
    first_of: dict[str, int] = {}
    ranked = rank_candidates(candidates, scores)
    for position in ranked:
        first_of.setdefault(candidates[position]["response"], position)
    firsts = set(first_of.values())
    return [*first_of.values(), *(position for position in ranked if position not in firsts)][:n]


def ranking_scores(instruction: str, candidates: Sequence[Candidate], scores: Sequence[float], selection: Selection | None) -> list[float]:
    """Return the scores that rank the candidates of an instruction: `scores`, or the values of a selection.

    A candidate without a score (NaN) gets NaN, and the selection ranks the others as one pool.
    """
    if selection is None:
        return list(scores)
    ranked = [position for position, score in enumerate(scores) if not math.isnan(score)]
    pool = [candidates[position] for position in ranked]
    values = selection.rank(
        Pool(
            [each["response"] for each in pool],
            [scores[position] for position in ranked],
            [each["logprob"] for each in pool],
            [each["tokens"] for each in pool],
            instruction,
        )
    )
    value_of = dict(zip(ranked, values.tolist(), strict=True))
    return [value_of.get(position, math.nan) for position in range(len(candidates))]


def fallback_ranking_scores(candidates: Sequence[Candidate], fallback: Fallback, metric: LabelConfig) -> list[float]:
    """Return the scores that rank the candidates without a scorer.

    `self_score` ranks by the mean log-probability, if every candidate has one. `consensus` ranks by the mean agreement with the other
    candidates by `metric`. All other cases rank in the order of sampling.
    """
    if fallback == "consensus":
        return [float(value) for value in consensus([each["response"] for each in candidates], metric)]
    means = [mean_logprob(each["logprob"], each["tokens"]) for each in candidates]
    known = [mean for mean in means if mean is not None]
    if fallback == "self_score" and len(known) == len(means):
        return known
    return [-float(position) for position in range(len(candidates))]
