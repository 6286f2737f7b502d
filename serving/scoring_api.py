"""The scorer without the LLM: vLLM's `/score`, Jina's and Cohere's `/rerank`, and `/v1/classify` (paper, section 3.2). Pure.

A request becomes pairs of an instruction and a response (`pairs`), and their scores the answer. A score is the scorer's raw
logit, an estimate of Rouge-L in [0, 1] that may leave it, as vLLM gives for a scorer of ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, model_validator

from cluster.config import ServingConfig
from serving import completions_api
from serving.backend import ApiError, Scored
from serving.completions_api import ApiModel

# Fields of vLLM's, Jina's and Cohere's requests that would change a score: see `completions_api._UNSUPPORTED`.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "truncate_prompt_tokens": (None,),
    "max_tokens_per_doc": (None,),
    "max_chunks_per_doc": (None, 1),
    "activation": (None, False),
    "use_activation": (None, False),
    "rank_fields": (None, ["text"]),
    "chat_template": (None,),
}


def _as_list(texts: Any) -> Any:
    return [texts] if isinstance(texts, str) else texts


def _document_text(documents: Any) -> Any:
    """Take the text out of Cohere's and Jina's `{"text": ...}` documents; all else is left for the types to judge."""
    if not isinstance(documents, list):
        return documents
    return [each["text"] if isinstance(each, dict) and isinstance(each.get("text"), str) else each for each in documents]


class Document(ApiModel):
    """A document as Cohere's and Jina's clients may send it, and get it back."""

    text: str


# Fails fast: each further error would cost more than the text it is about.
_Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Texts = Annotated[_Texts, BeforeValidator(_as_list, json_schema_input_type=str | _Texts)]
Documents = Annotated[_Texts, BeforeValidator(_document_text, json_schema_input_type=Annotated[list[str | Document], Field(min_length=1)])]


class ScoreRequest(ApiModel):
    """The body of POST /v1/score, as vLLM takes it: one text against one or many, or lists of equal length pair by pair."""

    model_config = ConfigDict(strict=True)
    model: str
    text_1: Texts = Field(validation_alias=AliasChoices("text_1", "queries"))
    """Instructions; `queries` is the same."""
    text_2: Texts = Field(validation_alias=AliasChoices("text_2", "documents"))
    """Responses; `documents` is the same."""

    @model_validator(mode="after")
    def _paired(self) -> ScoreRequest:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise ValueError(
                f"text_1 has {len(self.text_1)} texts and text_2 {len(self.text_2)}; give one text_1, or one for each of text_2"
            )
        return self

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the instructions and the responses, of equal length."""
        return (self.text_1 if len(self.text_1) > 1 else self.text_1 * len(self.text_2)), self.text_2


class RerankRequest(ApiModel):
    """The body of POST /v1/rerank (Jina's, vLLM's) and /v2/rerank (Cohere's): documents ranked as responses to a query."""

    model_config = ConfigDict(strict=True)
    model: str
    query: str = Field(min_length=1)
    documents: Documents
    top_n: int | None = Field(None, ge=0)
    """Results returned, best first; all of them when null or 0."""
    return_documents: bool | None = None
    """Whether a result carries its document; when null /v1/rerank does and /v2/rerank does not."""

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the instructions and the responses, of equal length."""
        return [self.query] * len(self.documents), self.documents


class ClassifyRequest(ApiModel):
    """The body of POST /v1/classify: which of the choices answers the instruction."""

    model_config = ConfigDict(strict=True)
    model: str
    instruction: str = Field(min_length=1)
    choices: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2, fail_fast=True)

    @model_validator(mode="after")
    def _distinct(self) -> ClassifyRequest:
        # Counted, not compared with each other: the list is a client's, as long as a body may be.
        choice, times = Counter(self.choices).most_common(1)[0]
        if times > 1:
            raise ValueError(f"choices has {completions_api.json_preview(choice)} {times} times; give each choice once")
        return self

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the instructions and the responses, of equal length."""
        return [self.instruction] * len(self.choices), self.choices


class ScoreUsage(ApiModel):
    """Tokens the scorer read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class PairScore(ApiModel):
    """The score of one pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(ApiModel):
    """The answer to POST /v1/score."""

    id: str
    object: Literal["list"] = "list"
    created: int
    """Unix time in seconds."""
    model: str
    data: list[PairScore]
    """In the order of the pairs."""
    usage: ScoreUsage


class RankedDocument(ApiModel):
    """One document, by its place in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankAnswer(ApiModel):
    """The answer to POST /v1/rerank and /v2/rerank."""

    id: str
    model: str
    results: list[RankedDocument]
    """Best first; of equal scores the first given."""
    usage: ScoreUsage
    meta: dict[str, Any]
    """For Cohere's client: the version of its API and what it bills, one search a request."""


class Classification(ApiModel):
    """The answer to POST /v1/classify."""

    id: str
    object: Literal["classification"] = "classification"
    created: int
    """Unix time in seconds."""
    model: str
    choice: str
    """The choice with the highest score; the first of equals."""
    index: int
    scores: list[float]
    """One for each choice, in the order given."""
    usage: ScoreUsage


RequestT = TypeVar("RequestT", ScoreRequest, RerankRequest, ClassifyRequest)


def parse_scoring_request(kind: type[RequestT], body: bytes, serving: ServingConfig) -> RequestT:
    """Return the request in `body`. Raises `ApiError` (400) naming what is wrong, its pairs above the server's limits included."""
    request = completions_api.parse_request(kind, body, _UNSUPPORTED)
    instructions, responses = request.pairs()
    if (count := len(responses)) > (limit := serving.max_pairs):
        raise ApiError(f"the request has {count} pairs to score, this server's limit is {limit} (serving.max_pairs)", code="invalid_value")
    if (chars := sum(map(len, instructions)) + sum(map(len, responses))) > (limit := serving.max_pairs_chars):
        raise ApiError(
            f"the request's {count} pairs have {chars:,} characters, this server's limit is {limit:,} (serving.max_pairs_chars)",
            code="invalid_value",
        )
    return request


def build_score_answer(request: ScoreRequest, scored: Scored, identity: str, created: int) -> ScoreAnswer:
    """Return vLLM's answer."""
    data = [PairScore(index=index, score=score) for index, score in enumerate(_finite_scores(scored))]
    return ScoreAnswer(id=f"score-{identity}", created=created, model=request.model, data=data, usage=_usage(scored))


def build_rerank_answer(request: RerankRequest, scored: Scored, identity: str, *, version: Literal[1, 2]) -> RerankAnswer:
    """Return Jina's and vLLM's (`version` 1) or Cohere's (2) answer."""
    scores = _finite_scores(scored)
    best_first = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n or None]
    shown = version == 1 if request.return_documents is None else request.return_documents
    results = [
        RankedDocument(index=index, relevance_score=scores[index], document=Document(text=request.documents[index]) if shown else None)
        for index in best_first
    ]
    meta = {"api_version": {"version": str(version)}, "billed_units": {"search_units": 1}}
    return RerankAnswer(id=f"rerank-{identity}", model=request.model, results=results, usage=_usage(scored), meta=meta)


def build_classification(request: ClassifyRequest, scored: Scored, identity: str, created: int) -> Classification:
    """Return the choice with the highest score, and all scores."""
    scores = _finite_scores(scored)
    index = max(range(len(scores)), key=lambda place: (scores[place], -place))
    return Classification(
        id=f"classify-{identity}",
        created=created,
        model=request.model,
        choice=request.choices[index],
        index=index,
        scores=scores,
        usage=_usage(scored),
    )


def _finite_scores(scored: Scored) -> Sequence[float]:
    """Return the scores; JSON has no NaN, and a rank among them would be chance."""
    scores = scored["scores"]
    bad = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
    if bad is not None:
        raise ApiError(f"the scorer gave no number for pair {bad}; its weights may be damaged", 500, code="scorer_failed")
    return scores


def _usage(scored: Scored) -> ScoreUsage:
    return ScoreUsage(prompt_tokens=sum(scored["tokens"]), total_tokens=sum(scored["tokens"]))
