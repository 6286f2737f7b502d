"""Response bodies of the OpenAI routes.

Imports neither Ray nor a web framework. `drawn` in the API means sampled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from cluster.config import Fallback
from generation.engines.contract import Candidate
from serving.api_model import ApiModel
from serving.completions_api import SampleRequest, TextRequest
from serving.ranking import SelectedBy, abstains, rank_candidates, select_choices
from training.early_stopping import StopReason

_WORDS = re.compile(r"\s*\S+|\s+$")
"""A word with the white space before it, or white space at the end; the matches of a text join to the text."""


class ChoiceMessage(ApiModel):
    """The text of a choice, or a refusal that gives the reason for none."""

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
        """Return this choice as the `choices` entries of a stream's chunks, one word in each."""
        message = self.message
        deltas: list[dict[str, Any]] = [{"role": message.role, "content": ""}]
        deltas += [{"content": word} for word in _WORDS.findall(message.content or "")]
        deltas += [{"refusal": message.refusal}] * (message.refusal is not None)
        entries = [{"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        return [*entries, {"index": self.index, "delta": {}, "logprobs": None, "finish_reason": self.finish_reason}]


class TextChoice(ApiModel):
    """One returned candidate of a text completion; index 0 is the best."""

    index: int
    text: str
    finish_reason: str
    logprobs: None = None

    def deltas(self) -> list[dict[str, Any]]:
        """Return this choice as the `choices` entries of a stream's chunks, one word in each."""
        entries = [{"index": self.index, "text": word, "logprobs": None, "finish_reason": None} for word in _WORDS.findall(self.text)]
        return [*entries, {"index": self.index, "text": "", "logprobs": None, "finish_reason": self.finish_reason}]


class Usage(ApiModel):
    """Tokens of the prompt and of the returned choices; `CappyAnswer.sampled_tokens` counts all candidates."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ScoredCandidate(ApiModel):
    """A candidate with its score."""

    response: str
    score: float | None
    """The scorer's raw logit, an estimate of Rouge-L that can be below 0 or above 1; null if there is no score."""
    decoding: str
    tokens: int
    logprob: float | None
    finish_reason: str
    chosen: bool
    """Whether the candidate is one of the choices."""


class Latency(ApiModel):
    """Time of each stage in seconds, including waiting."""

    sampling_s: float
    scoring_s: float


class CappyAnswer(ApiModel):
    """The `cappy` object of an answer, an extension of OpenAI's API.

    An answer has it if the request sets an option in `cappy`, or if the fallback selected the choices, or if no candidate reached
    `min_score`. It also has it after sampling in rounds, and if the LLM is an endpoint with prices.
    """

    candidates: list[ScoredCandidate]
    """Every candidate, best first, if the request has `return_candidates`."""
    fallback: Fallback | None = None
    """How the choices were selected if the scorer failed or timed out."""
    selection: SelectedBy | None = None
    """How the choices were selected otherwise; null for the LLM alone."""
    abstained: bool = False
    """Whether no candidate reached `min_score`."""
    drawn: int
    """Number of sampled candidates."""
    stopped: StopReason | None = None
    """The reason for the end of sampling: target or minimum gain reached, all candidates sampled, or scorer failed. Null without rounds."""
    scorer: str | None
    """Name of the scorer; null if the model is the LLM alone."""
    scorer_version: str | None = None
    """Version of the scorer; it changes with each publication. Null if no `cappy` command published the scorer or it gave no scores."""
    sampled_tokens: int
    """Tokens of all candidates."""
    cost: float | None = None
    """Cost of sampling in US dollars, if the LLM is an endpoint with prices."""
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
    """An error."""

    message: str
    """One line: the field, its value and the correction."""
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    """Name of the request field that caused the error."""
    code: str | None = None
    """Machine-readable error code."""


class ErrorAnswer(ApiModel):
    """The body of every error."""

    error: ErrorDetail


class ModelParts(ApiModel):
    """The LLM and the scorer of a model name."""

    llm: bool
    scorer: str | None


class Model(ApiModel):
    """A valid value of `model`."""

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


def build_completion(
    request: SampleRequest,
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    ranking: Sequence[float],
    *,
    prompt_tokens: int,
    scorer: str | None,
    latency: Latency,
    completion_id: str,
    created: int,
    version: str | None = None,
    fallback: Fallback | None = None,
    selection: SelectedBy | None = None,
    cost: float | None = None,
    stopped: StopReason | None = None,
) -> Completion:
    """Return the answer with the best `request.n` candidates as choices, or a refusal if the best is below `min_score`.

    A text completion cannot carry a refusal; its text is then empty. The answer has a `cappy` object in the cases that `CappyAnswer`
    lists.

    Args:
        request: The parsed request.
        candidates: The pool, in the order of sampling.
        scores: The scorer's raw logit of each candidate, NaN without a score.
        ranking: The scores that rank the candidates; see `ranking_scores` and `fallback_ranking_scores`.
        prompt_tokens: Tokens of the prompt.
        scorer: Name of the scorer, None for the LLM alone.
        latency: Time of each stage.
        completion_id: Random part of the answer's id.
        created: Unix time in seconds.
        version: Version of the scorer.
        fallback: The fallback that made `ranking`, None if the scorer did.
        selection: The selection that made `ranking`, None if a fallback did.
        cost: Cost of sampling in US dollars, if known.
        stopped: The reason for the end of sampling, None without rounds.
    """
    chosen = select_choices(candidates, ranking, request.n)
    min_score = request.cappy.min_score
    abstained = abstains(scores[chosen[0]], min_score, fallback)
    refusal = None
    if abstained:
        refusal = f"no candidate scored {min_score:g} (cappy.min_score); the best of {len(candidates)} scored {scores[chosen[0]]:.3f}"
        chosen = []
    completion_tokens = sum(candidates[position]["tokens"] for position in chosen)
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=prompt_tokens + completion_tokens)
    common: dict[str, Any] = {"id": f"{request.id_prefix}-{completion_id}", "created": created, "model": request.model, "usage": usage}
    winners = [candidates[position] for position in chosen]
    answer: Completion
    if isinstance(request, TextRequest):
        answer = TextCompletion(**common, choices=_text_choices(winners))
    else:
        answer = ChatCompletion(**common, choices=_chat_choices(winners, refusal))
    if request.cappy.model_fields_set or fallback or abstained or stopped or cost is not None:
        shown = rank_candidates(candidates, ranking) if request.cappy.return_candidates else []
        answer.cappy = CappyAnswer(
            candidates=[build_scored_candidate(candidates[position], scores[position], position in chosen) for position in shown],
            fallback=fallback,
            selection=selection,
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


def build_scored_candidate(candidate: Candidate, score: float, chosen: bool) -> ScoredCandidate:
    """Return a candidate as the answer lists it; a score that is not finite is null."""
    # JSON has no NaN and no infinity.
    logprob = candidate["logprob"] if candidate["logprob"] is not None and math.isfinite(candidate["logprob"]) else None
    return ScoredCandidate(**{**candidate, "logprob": logprob}, score=score if math.isfinite(score) else None, chosen=chosen)


def merge_completions(answers: Sequence[Completion]) -> Completion:
    """Return one answer from the answers to the prompts of a request: all choices and candidates in the order of the prompts.

    Tokens and costs are sums, and latencies are those of the slowest prompt. Other fields of `cappy` are those of the first prompt
    for which they are set.
    """
    first, *others = answers
    if not others:
        return first
    choices: list[Any] = [choice for answer in answers for choice in answer.choices]
    usage = Usage(**{name: sum(getattr(answer.usage, name) for answer in answers) for name in Usage.model_fields})
    update = {"choices": [choice.model_copy(update={"index": index}) for index, choice in enumerate(choices)], "usage": usage}
    extras = [answer.cappy for answer in answers if answer.cappy is not None]
    return first.model_copy(update=update | {"cappy": _merge_extras(extras) if extras else None})


def _merge_extras(extras: Sequence[CappyAnswer]) -> CappyAnswer:
    """Return one `cappy` object for several prompts; see `merge_completions`."""
    costs = [each.cost for each in extras if each.cost is not None]
    return CappyAnswer(
        candidates=[candidate for each in extras for candidate in each.candidates],
        fallback=next((each.fallback for each in extras if each.fallback), None),
        selection=extras[0].selection,
        abstained=any(each.abstained for each in extras),
        drawn=sum(each.drawn for each in extras),
        stopped=next((each.stopped for each in extras if each.stopped), None),
        scorer=extras[0].scorer,
        scorer_version=next((each.scorer_version for each in extras if each.scorer_version), None),
        sampled_tokens=sum(each.sampled_tokens for each in extras),
        cost=sum(costs) if costs else None,
        latency=Latency(
            sampling_s=max(each.latency.sampling_s for each in extras), scoring_s=max(each.latency.scoring_s for each in extras)
        ),
    )
