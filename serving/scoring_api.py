"""Requests and answers of the routes that only score: /v1/score, /v1/rerank, /v2/rerank and /v1/classify.

Imports neither Ray nor a web framework. Each request gives pairs of an instruction and a response (`pairs`), and their scores make
the answer. A score is the scorer's raw logit: an estimate of Rouge-L that can be below 0 or above 1. The formats are those of vLLM
(score), Jina and Cohere (rerank); `classify` selects the best of several answers (paper, section 3.2).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, model_validator

from cluster.config import ServingConfig
from serving import completions_api, request_fields
from serving.api_model import ApiModel, make_model_optional
from serving.backend import ApiError, Scored

_NO_TOKEN_LIMIT = 4096
"""Cohere's default of `max_tokens_per_doc`. From this value on the scorer's own limit of a pair applies."""
_DOCUMENTS_PER_SEARCH = 100
"""Documents of one search unit in Cohere's billing."""


def _as_list(texts: Any) -> Any:
    return [texts] if isinstance(texts, str) else texts


def _document_text(documents: Any) -> Any:
    """Replace `{"text": ...}` documents of Cohere and Jina by their text; other values are unchanged, and the field's type checks them.

    A document with an image or another medium beside its text is unchanged, so that it is refused.
    """
    if not isinstance(documents, list):
        return documents
    return [
        each["text"]
        if isinstance(each, dict) and isinstance(each.get("text"), str) and request_fields.MEDIA_KEYS.isdisjoint(each)
        else each
        for each in documents
    ]


class Document(ApiModel):
    """A document in the format of Cohere's and Jina's clients."""

    text: str


# `fail_fast`: a report of every invalid item would need more time and memory than the request.
_Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Texts = Annotated[_Texts, BeforeValidator(_as_list, json_schema_input_type=str | _Texts)]
Documents = Annotated[_Texts, BeforeValidator(_document_text, json_schema_input_type=Annotated[list[str | Document], Field(min_length=1)])]


class ScoringRequest(ApiModel):
    """Fields that all routes share."""

    model_config = ConfigDict(strict=True, json_schema_extra=make_model_optional)
    model: str
    """Name of a scorer or of a model with one; absent or null means `serving.scorer_name`."""

    @abstractmethod
    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the instructions and the responses, of equal length."""


class TokenLimits(ScoringRequest):
    """Limits of vLLM and Cohere for one text. A scorer cuts long pairs itself, so a limit may only be one that cuts nothing."""

    max_tokens_per_query: int | None = Field(None, ge=0)
    """0, a value of 4096 or more, or a value that no query exceeds."""
    max_tokens_per_doc: int | None = Field(None, ge=0)
    """0, a value of 4096 or more, or a value that no document exceeds."""

    @model_validator(mode="after")
    def _check_token_limits(self) -> TokenLimits:
        for (name, limit), texts in zip(
            (("max_tokens_per_query", self.max_tokens_per_query), ("max_tokens_per_doc", self.max_tokens_per_doc)),
            self.pairs(),
            strict=True,
        ):
            # A text has at most as many tokens as bytes.
            if limit and limit < _NO_TOKEN_LIMIT and any(len(text.encode()) > limit for text in set(texts)):
                raise ValueError(
                    f"{name}={limit} is not supported, because it could cut a text; shorten the texts, or use 0 for the scorer's own limit"
                )
        return self


class ScoreRequest(TokenLimits):
    """The body of POST /v1/score in vLLM's format: one text with one or many others, or two lists of equal length."""

    text_1: Texts = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    """Instructions; `queries` and `data_1` are aliases."""
    text_2: Texts = Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))
    """Responses; `documents`, `items` and `data_2` are aliases."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_two_names(cls, tree: Any) -> Any:
        for field in ("text_1", "text_2"):
            alias = cls.model_fields[field].validation_alias
            assert isinstance(alias, AliasChoices)
            given = [str(name) for name in alias.choices if tree.get(name) is not None]
            if len(given) > 1:
                raise ValueError(f"{given[0]} and {given[1]} are names of the same field; send one of them")
            for name in alias.choices:  # null is absent
                if name in tree and tree[name] is None:
                    tree = {key: value for key, value in tree.items() if key != name}
        return tree

    @model_validator(mode="after")
    def _check_lengths(self) -> ScoreRequest:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise ValueError(
                f"text_1 has {len(self.text_1)} texts and text_2 has {len(self.text_2)}; send one text_1, or one for each text_2"
            )
        return self

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the instructions and the responses, of equal length."""
        return (self.text_1 if len(self.text_1) > 1 else self.text_1 * len(self.text_2)), self.text_2


class RerankRequest(TokenLimits):
    """The body of POST /v1/rerank (Jina, vLLM) and /v2/rerank (Cohere): documents to rank as responses to a query."""

    query: str = Field(min_length=1)
    documents: Documents
    top_n: int | None = Field(None, ge=0)
    """Number of results, best first; null or 0 means all."""
    return_documents: bool | None = None
    """Whether each result contains its document; null means yes for /v1/rerank and no for /v2/rerank."""

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the instructions and the responses, of equal length."""
        return [self.query] * len(self.documents), self.documents


class ClassifyRequest(ScoringRequest):
    """The body of POST /v1/classify: an instruction and the choices to select from."""

    instruction: str = Field(min_length=1)
    choices: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2, fail_fast=True)

    @model_validator(mode="after")
    def _check_distinct(self) -> ClassifyRequest:
        # A count takes linear time. A client's list may be as long as a body.
        choice, times = Counter(self.choices).most_common(1)[0]
        if times > 1:
            raise ValueError(f"choices contains {request_fields.json_preview(choice)} {times} times; send each choice once")
        return self

    def pairs(self) -> tuple[list[str], list[str]]:
        """Return the instructions and the responses, of equal length."""
        return [self.instruction] * len(self.choices), self.choices


class ScoreUsage(ApiModel):
    """Number of tokens that the scorer read."""

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
    """The score of one document; `index` is its position in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankAnswer(ApiModel):
    """The answer to POST /v1/rerank and /v2/rerank."""

    id: str
    model: str
    results: list[RankedDocument]
    """Best first; equal scores stay in the order of the request."""
    usage: ScoreUsage
    meta: dict[str, Any]
    """Fields that Cohere's client and proxies read: the API version, the tokens, and one billed search for each 100 documents."""


class Classification(ApiModel):
    """The answer to POST /v1/classify."""

    id: str
    object: Literal["classification"] = "classification"
    created: int
    """Unix time in seconds."""
    model: str
    choice: str
    """The choice with the highest score; the first of equal scores."""
    index: int
    scores: list[float]
    """One score per choice, in the order of the request."""
    usage: ScoreUsage


RequestT = TypeVar("RequestT", ScoreRequest, RerankRequest, ClassifyRequest)


def parse_scoring_request(kind: type[RequestT], body: bytes, serving: ServingConfig) -> RequestT:
    """Return the request in `body`. Raises `ApiError` (400) for an invalid body or for pairs above the server's limits."""
    request = completions_api.parse_request(kind, body, request_fields.SCORING, serving.scorer_name)
    instructions, responses = request.pairs()
    if (count := len(responses)) > (limit := serving.max_pairs):
        raise ApiError(
            f"the request has {count} pairs to score, this server's limit is {limit} (serving.max_pairs); send fewer", code="invalid_value"
        )
    if (chars := sum(map(len, instructions)) + sum(map(len, responses))) > (limit := serving.max_pairs_chars):
        raise ApiError(
            f"the request's {count} pairs have {chars:,} characters, this server's limit is {limit:,} (serving.max_pairs_chars); "
            "send less text",
            code="invalid_value",
        )
    return request


def build_score_answer(request: ScoreRequest, scored: Scored, answer_id: str, created: int) -> ScoreAnswer:
    """Return the answer in vLLM's format."""
    data = [PairScore(index=index, score=score) for index, score in enumerate(_finite_scores(scored))]
    return ScoreAnswer(id=f"score-{answer_id}", created=created, model=request.model, data=data, usage=_usage(scored))


def build_rerank_answer(request: RerankRequest, scored: Scored, answer_id: str, *, version: Literal[1, 2]) -> RerankAnswer:
    """Return the answer in the format of Jina and vLLM (`version` 1) or of Cohere (2)."""
    scores = _finite_scores(scored)
    best_first = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n or None]
    with_documents = version == 1 if request.return_documents is None else request.return_documents
    results = [
        RankedDocument(
            index=index, relevance_score=scores[index], document=Document(text=request.documents[index]) if with_documents else None
        )
        for index in best_first
    ]
    usage = _usage(scored)
    meta = {
        "api_version": {"version": str(version)},
        "billed_units": {"search_units": math.ceil(len(request.documents) / _DOCUMENTS_PER_SEARCH)},
        "tokens": {"input_tokens": usage.prompt_tokens, "output_tokens": 0},
    }
    return RerankAnswer(id=f"rerank-{answer_id}", model=request.model, results=results, usage=usage, meta=meta)


def build_classification(request: ClassifyRequest, scored: Scored, answer_id: str, created: int) -> Classification:
    """Return the answer with the best choice and all scores."""
    scores = _finite_scores(scored)
    index = max(range(len(scores)), key=lambda position: (scores[position], -position))
    return Classification(
        id=f"classify-{answer_id}",
        created=created,
        model=request.model,
        choice=request.choices[index],
        index=index,
        scores=scores,
        usage=_usage(scored),
    )


def _finite_scores(scored: Scored) -> Sequence[float]:
    """Return the scores. Raises `ApiError` (500) for one that is not finite, because JSON has no NaN and NaN has no rank."""
    scores = scored["scores"]
    bad = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
    if bad is not None:
        raise ApiError(f"the scorer's score of pair {bad} is not a finite number; its weights may be damaged", 500, code="scorer_failed")
    return scores


def _usage(scored: Scored) -> ScoreUsage:
    return ScoreUsage(prompt_tokens=sum(scored["tokens"]), total_tokens=sum(scored["tokens"]))
