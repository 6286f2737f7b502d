"""The answer of a batch row: its pool of candidates, the rule to stop, and the selection of `serve`. Pure: no Ray, no files, no model.

A row is a dict with the columns of `prompt_units.PROMPTS`. A row that was sampled in rounds has `round`, and the candidates of its earlier
rounds in `pool`. `Answers.finish_or_continue` takes a sampled and scored row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.config import Config, DecodingConfig, Fallback
from generation.engines.contract import Candidate
from generation.labels import describe_metric
from generation.prompt_units import PROMPTS
from generation.schema import SAMPLED
from generation.sources.row import DeadLetter
from serving.ranking import Selector, abstains, distinct_responses, select_choices
from serving.sampling_policy import active_rule, share_pool
from training import early_stopping
from training.consensus import consensus_metric

SCORED = pa.list_(pa.struct([*SAMPLED.value_type, pa.field("score", pa.float64())]))
"""The candidates of a row with their scores, null without a score."""

ANSWER_COLUMNS = (
    pa.field("response", pa.string()),  # null if the row abstained
    pa.field("score", pa.float64()),  # of the best candidate; null without a score
    pa.field("n_candidates", pa.int32(), nullable=False),
    pa.field("tokens", pa.int64(), nullable=False),  # of all candidates
    pa.field("cost", pa.float64(), nullable=False),  # dollars
    pa.field("abstained", pa.bool_(), nullable=False),
    pa.field("selected_by", pa.string()),  # score | fitted | consensus | blend | choices | self_score | first; null without candidates
)
"""The columns that `answer` adds to a row."""

ROW_COLUMNS = tuple(PROMPTS.field(name) for name in ("id", "dataset", "template", "instruction", "references", "answer_choices"))
"""The columns of a row, beside its own ones."""
ROW_NAMES = tuple(field.name for field in ROW_COLUMNS)

ANSWERED = pa.schema([*ROW_COLUMNS, PROMPTS.field("own"), PROMPTS.field("position"), *ANSWER_COLUMNS, pa.field("candidates", SCORED)])
"""A row of a finished unit."""

OPEN = pa.schema([*PROMPTS, pa.field("round", pa.int32()), pa.field("pool", SCORED), pa.field("spent", pa.float64())])
"""A prepared row of a later round: its candidates so far, and their cost in dollars."""


def plan_decodings(config: Config) -> list[list[DecodingConfig]]:
    """Return the decodings of each round. Without early stopping all candidates are one round."""
    decodings = list(config.sampler.decodings)
    if config.answer.candidates is not None:
        shares = share_pool(config.answer.candidates, decodings)
        decodings = [decoding.model_copy(update={"n": n}) for decoding, n in shares if n]
    rule = active_rule(config.serving.adaptive)
    return [decodings] if rule is None else early_stopping.plan_rounds(decodings, 1, rule.round_size)


def needs_scores(config: Config) -> bool:
    """Return whether the scores of sampled candidates are used: by the selection, `min_score`, early stopping or the kept pool."""
    answer, serving = config.answer, config.serving
    kept = answer.keep_candidates or answer.min_score is not None
    return serving.selection != "consensus" or kept or active_rule(serving.adaptive) is not None


@dataclass(frozen=True)
class Scores:
    """The scores of the distinct responses of a row."""

    by_response: Mapping[str, float]
    """Raw logits."""
    error: str | None = None
    """The reason why the scorer failed, else None. Earlier rounds can have scores."""

    def of(self, candidates: Sequence[Candidate]) -> list[float]:
        """Return the score of each candidate, NaN without one."""
        return [self.by_response.get(candidate["response"], math.nan) for candidate in candidates]


class Answers:
    """Make the answers of rows by the settings of a run.

    Args:
        config: The settings.
        rounds: The result of `plan_decodings`.
        selector: The ranking of candidates.
    """

    def __init__(self, config: Config, rounds: Sequence[Sequence[DecodingConfig]], selector: Selector) -> None:
        self._config, self._rounds, self._selector = config, rounds, selector
        self._rule = active_rule(config.serving.adaptive)
        # The LLM reports probabilities at temperature 1; see `best_of_n.draw_pool`.
        self._use_logprobs = all(decoding.temperature <= 1 for decodings in rounds for decoding in decodings)
        self._scored = needs_scores(config)

    def responses_to_score(self, row: Mapping[str, Any]) -> list[str]:
        """Return the responses of a row that have no score yet: its choices, or its new distinct candidates."""
        if row["answer_choices"] is not None:
            return list(row["answer_choices"])
        if not self._scored:
            return []
        known = {each["response"] for each in row.get("pool") or ()}
        return [response for response in distinct_responses(row["sampled"]) if response not in known]

    def finish_or_continue(self, row: Mapping[str, Any], scored: Scores) -> tuple[dict[str, Any] | None, DeadLetter | None]:
        """Return the answered row, or the dead letter of a row without an answer, or neither if the row needs another round.

        Args:
            row: The sampled row; `error` is the reason why this round has no candidates.
            scored: The scores of `responses_to_score`.
        """
        if row["answer_choices"] is not None:
            return self._classify(row, scored)
        candidates = pool_of(row)
        if not candidates:
            return None, _dead_letter(row, "sample", row["error"] or "the row has no candidates")
        known = {each["response"]: each["score"] for each in row.get("pool") or () if each["score"] is not None}
        scores = Scores({**known, **scored.by_response}, scored.error)
        if self._continues(row, candidates, scores):
            return None, None
        return self._select(row, candidates, scores)

    def next_round(self, row: Mapping[str, Any], scored: Scores) -> dict[str, Any]:
        """Return the prepared row of the next round of a row that `finish_or_continue` continues; see `OPEN`."""
        pool = _with_scores(row["sampled"], scored.of(row["sampled"]))
        earlier = row.get("pool") or []
        repeated = {each["response"]: each["score"] for each in earlier}
        pool = [{**each, "score": repeated.get(each["response"], each["score"])} for each in pool]
        plain = {name: row[name] for name in PROMPTS.names}
        return {**plain, "round": (row.get("round") or 0) + 1, "pool": [*earlier, *pool], "spent": _cost(row)}

    def _continues(self, row: Mapping[str, Any], candidates: Sequence[Candidate], scores: Scores) -> bool:
        if self._rule is None or scores.error or row["error"] or (row.get("round") or 0) + 1 >= len(self._rounds):
            return False
        reason = early_stopping.stop_reason(candidates, scores.of(candidates), self._rule, 1, use_logprobs=self._use_logprobs)
        return reason is None

    def _select(
        self, row: Mapping[str, Any], candidates: Sequence[Candidate], scored: Scores
    ) -> tuple[dict[str, Any] | None, DeadLetter | None]:
        scores = scored.of(candidates)
        fallback: Fallback | None = None
        if scored.error and all(map(math.isnan, scores)) and self._selector.mode != "consensus":
            fallback = self._config.serving.fallback
            if fallback == "none":
                return None, _dead_letter(row, "score", f"the scorer failed ({scored.error}), and serving.fallback=none")
        ranked_by, values = self._selector.rank(row["instruction"], candidates, scores, scored=self._scored, fallback=fallback)
        best = select_choices(candidates, values, 1)[0]
        answer = _answer(row, candidates[best]["response"], scores[best], self._config.answer.min_score, fallback)
        counts = {"n_candidates": len(candidates), "tokens": sum(each["tokens"] for each in candidates), "cost": _cost(row)}
        kept = _with_scores(candidates, scores) if self._config.answer.keep_candidates else None
        return {**answer, **counts, "selected_by": ranked_by or fallback, "candidates": kept}, None

    def _classify(self, row: Mapping[str, Any], scored: Scores) -> tuple[dict[str, Any] | None, DeadLetter | None]:
        """Select the choice with the highest score, of equal scores the first."""
        choices: Sequence[str] = row["answer_choices"]
        scores = [scored.by_response.get(choice, math.nan) for choice in choices]
        if scored.error or all(map(math.isnan, scores)):
            return None, _dead_letter(row, "score", f"the scorer failed ({scored.error or 'no score is a number'})")
        best = max(range(len(choices)), key=lambda position: -math.inf if math.isnan(scores[position]) else scores[position])
        answer = _answer(row, choices[best], scores[best], self._config.answer.min_score, None)
        pool = [Candidate(response=choice, decoding="choice", tokens=0, finish_reason="stop", logprob=None) for choice in choices]
        kept = _with_scores(pool, scores) if self._config.answer.keep_candidates else None
        counts = {"n_candidates": len(choices), "tokens": 0, "cost": 0.0}
        return {**answer, **counts, "selected_by": "choices", "candidates": kept}, None


def build_selector(config: Config, selection: Any, logprob_weight: float | None) -> Selector:
    """Return the ranking of `serving.selection`. `selection` and `logprob_weight` are those of the scorer, None without one."""
    return Selector(config.serving.selection, consensus_metric(describe_metric(config.generate.label)), selection, logprob_weight)


def pool_of(row: Mapping[str, Any]) -> list[Candidate]:
    """Return all candidates of a sampled row, those of its earlier rounds first."""
    earlier = [{name: value for name, value in each.items() if name != "score"} for each in row.get("pool") or ()]
    return [*earlier, *row["sampled"]]  # type: ignore[list-item]


def _answer(row: Mapping[str, Any], response: str, score: float, min_score: float | None, fallback: Fallback | None) -> dict[str, Any]:
    abstained = abstains(score, min_score, fallback)
    plain = {name: row[name] for name in ANSWERED.names if name in PROMPTS.names}
    known = score if math.isfinite(score) else None
    return {**plain, "response": None if abstained else response, "score": known, "abstained": abstained}


def _with_scores(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {**{name: candidate.get(name) for name in SAMPLED.value_type.names}, "score": score if math.isfinite(score) else None}
        for candidate, score in zip(candidates, scores, strict=True)
    ]


def _cost(row: Mapping[str, Any]) -> float:
    """Return the dollars of all rounds of a row."""
    return float(row["cost"]) + float(row.get("spent") or 0.0)


def _dead_letter(row: Mapping[str, Any], stage: str, reason: str) -> DeadLetter:
    # The own columns first: they identify the row, and the text is cut.
    plain = json.loads(row["own"]) if row["own"] else {}
    plain |= {name: row[name] for name in ROW_NAMES if name != "id"}
    return DeadLetter(where=row["id"], stage=stage, reason=reason, row=json.dumps(plain, ensure_ascii=False)[:500])
