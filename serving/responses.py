"""Response bodies of the OpenAI routes, the selection of the choices, and the chunks of a stream.

Imports neither Ray nor a web framework.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from cluster.config import Fallback
from generation.engines.contract import Candidate
from generation.logprobs import mean_logprob
from serving.completions_api import ApiModel, SampleRequest, TextRequest
from serving.early_stopping import StopReason
from training.blend import blend_scores

_WORDS = re.compile(r"\s*\S+|\s+$")


class ChoiceMessage(ApiModel):
    """The text of a choice, or why there is none."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(ApiModel):
    """One returned candidate; index 0 is the best."""

    index: int
    message: ChoiceMessage
    finish_reason: str
    logprobs: None = None

    def deltas(self) -> list[dict[str, Any]]:
        """Return the choices of a stream's chunks that make this one, word by word."""
        said = self.message
        pieces: list[dict[str, Any]] = [{"role": said.role, "content": ""}]
        pieces += [{"content": piece} for piece in _WORDS.findall(said.content or "")]
        pieces += [{"refusal": said.refusal}] * (said.refusal is not None)
        made = [{"index": self.index, "delta": piece, "logprobs": None, "finish_reason": None} for piece in pieces]
        return [*made, {"index": self.index, "delta": {}, "logprobs": None, "finish_reason": self.finish_reason}]


class TextChoice(ApiModel):
    """One returned candidate of a text completion; index 0 is the best."""

    index: int
    text: str
    finish_reason: str
    logprobs: None = None

    def deltas(self) -> list[dict[str, Any]]:
        """Return the choices of a stream's chunks that make this one, word by word."""
        made = [{"index": self.index, "text": piece, "logprobs": None, "finish_reason": None} for piece in _WORDS.findall(self.text)]
        return [*made, {"index": self.index, "text": "", "logprobs": None, "finish_reason": self.finish_reason}]


class Usage(ApiModel):
    """Tokens of the prompt and of the returned choices; `CappyAnswer.sampled_tokens` counts all candidates."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ScoredCandidate(ApiModel):
    """A candidate as the scorer saw it."""

    response: str
    score: float | None
    """The scorer's raw logit, an estimate of Rouge-L in [0, 1] that may leave it; null where the scorer gave no number."""
    decoding: str
    tokens: int
    logprob: float | None
    finish_reason: str
    chosen: bool
    """Whether it is among the choices."""


class Latency(ApiModel):
    """Where the time went, in seconds, waiting included."""

    sampling_s: float
    scoring_s: float


class CappyAnswer(ApiModel):
    """Our extension of the answer, for a request that has it too, where the scorer did not choose or chose none, and where sampling
    costs money."""

    candidates: list[ScoredCandidate]
    """Every candidate, best first, where asked for."""
    fallback: Fallback | None = None
    """How the choices were chosen, where the scorer was down or late."""
    abstained: bool = False
    """Whether no candidate reached `min_score`."""
    drawn: int
    """Candidates that were drawn."""
    stopped: StopReason | None = None
    """Why no more were: the target or the least gain was reached, all were drawn, or the scorer failed; null where there were no rounds."""
    scorer: str | None
    """Its name; null where the model is the LLM alone."""
    scorer_version: str | None = None
    """Changes when the scorer is published anew; null where no verb of ours published it, or it did not answer."""
    sampled_tokens: int
    """Tokens of all candidates."""
    cost: float | None = None
    """Dollars the sampling cost, where the LLM is an endpoint with prices."""
    latency: Latency


class ChatCompletion(ApiModel):
    """The answer to POST /v1/chat/completions."""

    chunk: ClassVar[str] = "chat.completion.chunk"
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[Choice]
    usage: Usage
    cappy: CappyAnswer | None = None


class TextCompletion(ApiModel):
    """The answer to POST /v1/completions."""

    chunk: ClassVar[str] = "text_completion"
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[TextChoice]
    usage: Usage
    cappy: CappyAnswer | None = None


Completion = ChatCompletion | TextCompletion


class ErrorDetail(ApiModel):
    """What went wrong."""

    message: str
    """One line: the field, its value and what would be right."""
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    """The field it is about."""
    code: str | None = None
    """For programs."""


class ErrorAnswer(ApiModel):
    """Every answer that is an error."""

    error: ErrorDetail


class ModelParts(ApiModel):
    """What stands behind a name."""

    llm: bool
    scorer: str | None


class Model(ApiModel):
    """What `model` may be."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time in seconds."""
    owned_by: str
    cappy: ModelParts


class ModelList(ApiModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


def distinct_responses(candidates: Sequence[Candidate]) -> list[str]:
    """Return the different responses among the candidates, in order: what the scorer has to read."""
    return list(dict.fromkeys(candidate["response"] for candidate in candidates))


def rank_candidates(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[int]:
    """Return the candidates' positions, best first; of equal scores the first drawn, and empty or scoreless ones last."""

    def key(position: int) -> tuple[bool, float]:
        score = scores[position]
        return (not candidates[position]["response"] or math.isnan(score), 0.0 if math.isnan(score) else -score)

    return sorted(range(len(candidates)), key=key)


def select_choices(candidates: Sequence[Candidate], scores: Sequence[float], n: int) -> list[int]:
    """Return the positions of the `n` choices, best first (see `rank`).

    Equal responses stand once; they come again, after all others, only where there are fewer than `n` different ones.
    """
    first_of: dict[str, int] = {}
    ranked = rank_candidates(candidates, scores)
    for position in ranked:
        first_of.setdefault(candidates[position]["response"], position)
    firsts = set(first_of.values())
    return [*first_of.values(), *(position for position in ranked if position not in firsts)][:n]


def ranking_scores(candidates: Sequence[Candidate], scores: Sequence[float], weight: float | None) -> list[float]:
    """Return what candidates are ranked by: their scores, or with `weight` the blend with the LLM's mean log-probability.

    The scores alone where one of the candidates has no log-probability: its rank would be chance.
    """
    means = [mean_logprob(each["logprob"], each["tokens"]) for each in candidates]
    known = [mean for mean in means if mean is not None]
    if weight is None or len(known) < len(means):
        return list(scores)
    return [float(value) for value in blend_scores(np.array(scores), np.array(known), weight)]


def fallback_ranking_scores(candidates: Sequence[Candidate], fallback: Fallback) -> list[float]:
    """Return what candidates are ranked by without a scorer: their mean log-probability, or with `first` the order they were drawn in.

    The order drawn also where `self_score` lacks a log-probability.
    """
    means = [mean_logprob(each["logprob"], each["tokens"]) for each in candidates]
    known = [mean for mean in means if mean is not None]
    if fallback == "self_score" and len(known) == len(means):
        return known
    return [-float(position) for position in range(len(candidates))]


def build_completion(
    request: SampleRequest,
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    preferences: Sequence[float],
    *,
    prompt_tokens: int,
    scorer: str | None,
    latency: Latency,
    identity: str,
    created: int,
    version: str | None = None,
    fallback: Fallback | None = None,
    cost: float | None = None,
    stopped: StopReason | None = None,
) -> Completion:
    """Return the answer: the `request.n` most preferred candidates as choices, or a refusal where the best is below `min_score`.

    A text completion has no refusals: its text is empty then. The answer to a request with anything in `cappy` has it too, with all
    candidates where asked; `cost` (dollars) stands there wherever it is known; `fallback` says how `preferences` came about without the
    scorer, `stopped` why no more candidates were drawn.
    """
    chosen = select_choices(candidates, preferences, request.n)
    least = request.cappy.min_score
    # Not `<`: a score that is no number is no good either.
    abstained = least is not None and fallback is None and not scores[chosen[0]] >= least
    refusal = None
    if abstained:
        refusal = f"no candidate scored {least:g} (cappy.min_score); the best of {len(candidates)} scored {scores[chosen[0]]:.3f}"
        chosen = []
    completion_tokens = sum(candidates[position]["tokens"] for position in chosen)
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=prompt_tokens + completion_tokens)
    common: dict[str, Any] = {"id": f"{request.id_prefix}-{identity}", "created": created, "model": request.model, "usage": usage}
    winners = [candidates[position] for position in chosen]
    answer: Completion
    if isinstance(request, TextRequest):
        answer = TextCompletion(**common, choices=_text_choices(winners))
    else:
        answer = ChatCompletion(**common, choices=_chat_choices(winners, refusal))
    if request.cappy.model_fields_set or fallback or abstained or stopped or cost is not None:
        shown = rank_candidates(candidates, preferences) if request.cappy.return_candidates else []
        answer.cappy = CappyAnswer(
            candidates=[_scored_candidate(candidates[position], scores[position], position in chosen) for position in shown],
            fallback=fallback,
            abstained=abstained,
            drawn=len(candidates),
            stopped=stopped,
            scorer=scorer,
            scorer_version=version,
            sampled_tokens=sum(candidate["tokens"] for candidate in candidates),
            cost=cost,
            latency=latency,
        )
    return answer


def _chat_choices(winners: Sequence[Candidate], refusal: str | None) -> list[Choice]:
    if refusal is not None:
        return [Choice(index=0, message=ChoiceMessage(content=None, refusal=refusal), finish_reason="stop")]
    return [
        Choice(index=index, message=ChoiceMessage(content=each["response"]), finish_reason=each["finish_reason"])
        for index, each in enumerate(winners)
    ]


def _text_choices(winners: Sequence[Candidate]) -> list[TextChoice]:
    return [
        TextChoice(index=index, text=each.get("text", each["response"]), finish_reason=each["finish_reason"])
        for index, each in enumerate(winners)
    ] or [TextChoice(index=0, text="", finish_reason="stop")]


def _scored_candidate(candidate: Candidate, score: float, chosen: bool) -> ScoredCandidate:
    return ScoredCandidate(**candidate, score=score if math.isfinite(score) else None, chosen=chosen)


def build_progress_chunk(
    request: SampleRequest, candidates: Sequence[Candidate], scores: Sequence[float], *, identity: str, created: int
) -> dict[str, Any]:
    """Return a chunk without choices that tells of the candidates so far, in the order drawn; none is chosen yet."""
    kind = TextCompletion.chunk if isinstance(request, TextRequest) else ChatCompletion.chunk
    same = {"id": f"{request.id_prefix}-{identity}", "object": kind, "created": created, "model": request.model}
    same |= {"usage": None} if request.include_usage else {}
    told = [_scored_candidate(candidate, score, False).model_dump() for candidate, score in zip(candidates, scores, strict=True)]
    return {**same, "choices": [], "cappy": {"progress": told}}


def build_chunks(answer: Completion, *, usage: bool) -> list[dict[str, Any]]:
    """Return an answer as OpenAI's chunks: the choices in turn, word by word.

    With `usage` one without choices follows. `cappy`, where the answer has it, stands in the last.
    """
    same = {"id": answer.id, "object": answer.chunk, "created": answer.created, "model": answer.model}
    same |= {"usage": None} if usage else {}
    made: list[dict[str, Any]] = [{**same, "choices": [delta]} for choice in answer.choices for delta in choice.deltas()]
    if usage:
        made.append({**same, "choices": [], "usage": answer.usage.model_dump()})
    if answer.cappy is not None:
        made[-1]["cappy"] = answer.cappy.model_dump()
    return made
