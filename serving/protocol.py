"""What clients send and get: OpenAI's chat and text completions, its errors, and our `cappy` object. Pure: no Ray, no web server.

A request is parsed (`parse`, `parse_text`), becomes a pool of decodings (`decodings_for`) for the LLM to sample, and once the
candidates have scores the best are chosen (`select`) and put into OpenAI's shape (`completion`). Whatever a client can do wrong
is an `ApiError`, which knows its status and its body.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.config import AdaptiveConfig, Config, DecodingConfig, Fallback
from cluster.errors import CappyError
from generation.engines.contract import Candidate
from generation.logprobs import mean_logprob
from generation.prompts import Message
from serving import strict_json
from serving.early_stopping import StopReason
from training.blend import blend_scores

M = TypeVar("M", bound=BaseModel)
_PIECES = re.compile(r"\s*\S+|\s+$")


class ApiError(CappyError):
    """An answer that is an error: an HTTP status and OpenAI's error body."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None, retry_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is pickled by its message alone; Ray carries this one out of a replica.
        return ApiError, (str(self), self.status, self.param, self.code, self.retry_s)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: when to come back, how to say who one is."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (429, 503):
            return {"Retry-After": str(max(1, math.ceil(self.retry_s or 0)))}
        if self.status in (408, 413):  # the rest of the body is not waited for
            return {"Connection": "close"}
        return {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Shape(BaseModel):
    """Something sent or got; the docstrings of its fields are the schema's descriptions."""

    model_config = ConfigDict(use_attribute_docstrings=True)


Early = Callable[[Sequence[str]], None]
"""Is told responses that have ended before the whole pool has."""


class Sampled(TypedDict):
    """What the LLM gives back for one prompt."""

    candidates: list[Candidate]
    prompt_tokens: int
    cost: NotRequired[float | None]
    """Dollars, where an endpoint has prices."""


def joined(parts: Sequence[Scored]) -> Scored:
    """Return what the scorer gave back for some pairs from what it gave back for parts of them, in order; the rest is the last one's."""
    scores = [score for part in parts for score in part["scores"]]
    return {**parts[-1], "scores": scores, "tokens": [count for part in parts for count in part["tokens"]]}


class Scored(TypedDict):
    """What the scorer gives back for some pairs, in their order."""

    scores: list[float]
    """Raw logits."""
    tokens: list[int]
    """Tokens the scorer read of each pair."""
    version: NotRequired[str]
    """Of the scorer's weights: changes when it is published anew. Absent for a scorer that no verb of ours published."""
    logprob_weight: NotRequired[float]
    """The blend's weight of the LLM's mean log-probability, absent where none was fitted with the scorer."""


# What OpenAI's API or vLLM's server would act on and we do not: any value but the harmless ones is refused, because an answer
# that ignores it would look right and be wrong. Fields not named anywhere (`user`, `metadata`, ...) change no answer and pass.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "best_of": (None,),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
}
_UNSUPPORTED_TEXT: dict[str, tuple[Any, ...]] = {**_UNSUPPORTED, "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1)}


def _plain_text(content: Any) -> Any:
    """Join OpenAI's text parts to one text; a text stays as it is."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"a part of type {short(kind)} is not supported; only parts {{'type': 'text', 'text': ...}} are")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError("give a text or a list of text parts")
    return content


def _one_prompt(prompt: Any) -> Any:
    """Take the text out of a list of one prompt; all else is left for the types to judge."""
    if not isinstance(prompt, list):
        return prompt
    if any(isinstance(each, int | list) for each in prompt):
        raise ValueError("token ids are not supported; give the prompt as a text")
    if len(prompt) != 1:
        raise ValueError(f"{len(prompt)} prompts in one request are not supported; send a request for each")
    return prompt[0]


def _stop_strings(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class TextPart(Shape):
    """A part of a message; parts are joined by line breaks."""

    type: Literal["text"]
    text: str


class ChatMessage(Shape):
    """One turn of the conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_plain_text, json_schema_input_type=str | list[TextPart])]


_StopString = Annotated[str, Field(min_length=1, max_length=1024)]
_StopStrings = Annotated[list[_StopString], Field(max_length=16, fail_fast=True)]


class CappyOptions(Shape):
    """Our extension of the request, sent as `extra_body={"cappy": {...}}` by OpenAI's client."""

    model_config = ConfigDict(strict=True, extra="forbid")
    candidates: int | None = Field(None, ge=1)
    """Candidates to sample and score; the server's `serving.candidates` (at least `n`) when null."""
    decodings: Annotated[list[str], Field(min_length=1, max_length=64, fail_fast=True)] | None = None
    """Names of the server's decodings to sample with; all of them when null. Not together with `temperature` or `top_p`."""
    return_candidates: bool = False
    """Whether the answer carries every candidate with its score under `cappy`."""
    min_score: float | None = Field(None, allow_inf_nan=False)
    """The best candidate must score this much; else the answer is a refusal that says so. Without effect in a fallback."""
    fallback: Fallback | None = None
    """How to choose when the scorer is down or late; the server's `serving.fallback` when null."""
    scorer: str | None = None
    """The name of the scorer that chooses; the one `model` names when null."""
    min_gain: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Draw no more candidates when the next is expected to raise the best score by less; 0 draws them all."""
    target_score: float | None = Field(None, allow_inf_nan=False)
    """Draw no more candidates once the best (with `n` choices the n-th) scores this much. Where a request gives neither of the two, the
    server's `serving.adaptive` decides."""
    progress: bool = False
    """Whether a stream tells of the candidates as they are drawn and scored."""


class StreamOptions(Shape):
    """What a stream tells beside the choices."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    """Whether a last chunk has the usage."""


class SampleRequest(Shape):
    """What chat and text completions have in common."""

    identity: ClassVar[str]
    """What the answers' ids begin with."""
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str
    n: int = Field(1, ge=1)
    """Choices returned, best first."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens a candidate may have; each decoding's own limit when null."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[_StopStrings, BeforeValidator(_stop_strings, json_schema_input_type=_StopString | _StopStrings)] | None = None
    """Strings that end a candidate, next to those of the server's decodings."""
    seed: int | None = None
    """The same request with the same seed draws the same candidates, as far as the engine's batching allows."""
    stream: bool = False
    """Whether the choices come as server-sent events: keep-alives while candidates are sampled, then the winners in chunks."""
    stream_options: StreamOptions | None = None
    cappy: CappyOptions = CappyOptions()

    @field_validator("n", "stream", "cappy", mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].get_default() if value is None else value

    @model_validator(mode="after")
    def _streamable(self) -> SampleRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; give it with stream=true")
        if self.cappy.progress and not self.stream:
            raise ValueError("cappy.progress is for streams; give it with stream=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def length(self) -> tuple[str, int | None]:
        """The field that limits a candidate's tokens, and the limit."""
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def instruction(self) -> str:
        """The bare instruction the scorer reads."""


class ChatRequest(SampleRequest):
    """The body of POST /v1/chat/completions."""

    identity = "chatcmpl"
    messages: list[ChatMessage] = Field(min_length=1, max_length=2048, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    """As `max_tokens`, over which it wins."""

    @model_validator(mode="after")
    def _answerable(self) -> ChatRequest:
        last = self.messages[-1]
        if last.role != "user":
            raise ValueError(f"messages must end with the user's turn, the instruction; they end with role={last.role!r}")
        if not last.content.strip():
            raise ValueError("messages end with an empty text; give the instruction to answer")
        return self

    @property
    def length(self) -> tuple[str, int | None]:
        return ("max_completion_tokens", self.max_completion_tokens) if self.max_completion_tokens else super().length

    @property
    def instruction(self) -> str:
        """The last message alone."""
        return self.messages[-1].content.strip()


class TextRequest(SampleRequest):
    """The body of POST /v1/completions: a prompt the LLM continues as it stands, without a chat template."""

    identity = "cmpl"
    prompt: Annotated[str, BeforeValidator(_one_prompt)]
    """A text, or a list with one."""

    @model_validator(mode="after")
    def _continuable(self) -> TextRequest:
        if not self.prompt.strip():
            raise ValueError("prompt is empty; give the text to continue")
        return self

    @property
    def instruction(self) -> str:
        """The whole prompt."""
        return self.prompt.strip()


class ChoiceMessage(Shape):
    """The text of a choice, or why there is none."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(Shape):
    """One returned candidate; index 0 is the best."""

    index: int
    message: ChoiceMessage
    finish_reason: str
    logprobs: None = None

    def deltas(self) -> list[dict[str, Any]]:
        """Return the choices of a stream's chunks that make this one, word by word."""
        said = self.message
        pieces: list[dict[str, Any]] = [{"role": said.role, "content": ""}]
        pieces += [{"content": piece} for piece in _PIECES.findall(said.content or "")]
        pieces += [{"refusal": said.refusal}] * (said.refusal is not None)
        made = [{"index": self.index, "delta": piece, "logprobs": None, "finish_reason": None} for piece in pieces]
        return [*made, {"index": self.index, "delta": {}, "logprobs": None, "finish_reason": self.finish_reason}]


class TextChoice(Shape):
    """One returned candidate of a text completion; index 0 is the best."""

    index: int
    text: str
    finish_reason: str
    logprobs: None = None

    def deltas(self) -> list[dict[str, Any]]:
        """Return the choices of a stream's chunks that make this one, word by word."""
        made = [{"index": self.index, "text": piece, "logprobs": None, "finish_reason": None} for piece in _PIECES.findall(self.text)]
        return [*made, {"index": self.index, "text": "", "logprobs": None, "finish_reason": self.finish_reason}]


class Usage(Shape):
    """Tokens of the prompt and of the returned choices; `CappyAnswer.sampled_tokens` counts all candidates."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ScoredCandidate(Shape):
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


class Latency(Shape):
    """Where the time went, in seconds, waiting included."""

    sampling_s: float
    scoring_s: float


class CappyAnswer(Shape):
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


class ChatCompletion(Shape):
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


class TextCompletion(Shape):
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


class ErrorDetail(Shape):
    """What went wrong."""

    message: str
    """One line: the field, its value and what would be right."""
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    """The field it is about."""
    code: str | None = None
    """For programs."""


class ErrorAnswer(Shape):
    """Every answer that is an error."""

    error: ErrorDetail


class Behind(Shape):
    """What stands behind a name."""

    llm: bool
    scorer: str | None


class Model(Shape):
    """What `model` may be."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time in seconds."""
    owned_by: str
    cappy: Behind


class ModelList(Shape):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


def parse(body: bytes) -> ChatRequest:
    """Return the chat request in `body`. Raises `ApiError` (400) naming the field, its value and what would be right."""
    return parse_as(ChatRequest, body, _UNSUPPORTED)


def parse_text(body: bytes) -> TextRequest:
    """Return the request for a text completion in `body`. Raises `ApiError` (400) as `parse` does."""
    return parse_as(TextRequest, body, _UNSUPPORTED_TEXT)


def parse_as(kind: type[M], body: bytes, unsupported: Mapping[str, tuple[Any, ...]]) -> M:
    """Return the request of a kind in `body`; `unsupported` has the fields that would change the answer, each with its harmless values.

    Raises `ApiError` (400) naming the field, its value and what would be right.
    """
    try:
        tree = strict_json.load(body)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        wanted = " and ".join(f"`{name}`" for name, field in kind.model_fields.items() if field.is_required())
        raise ApiError(f"the body is a JSON {type(tree).__name__}; send an object with {wanted}", code="invalid_json")
    for name, harmless in unsupported.items():
        if name in tree and not any(_same(tree[name], value) for value in harmless):
            raise ApiError(f"{name}={short(tree[name])} is not supported yet; leave {name} out", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        path, message = _explain(error)
        raise ApiError(message, param=path or None, code="invalid_value") from None


def check_length(texts: Iterable[str], config: Config, param: str) -> None:
    """Raise `ApiError` (400) for a prompt no tokenizer should be troubled with; the LLM itself counts tokens."""
    chars = sum(map(len, texts))
    if chars > config.serving.max_prompt_chars:
        raise ApiError(
            f"{param}: {chars:,} characters are above this server's limit of {config.serving.max_prompt_chars:,} "
            f"(serving.max_prompt_chars); shorten them",
            param=param,
            code="context_length_exceeded",
        )


def pool_size(request: SampleRequest, config: Config, named: Sequence[DecodingConfig], scored: bool) -> int:
    """Return how many candidates to sample: of a pool that is not `scored` no more than `n`, unless asked; of `named` decodings that
    are all greedy one each.

    Raises `ApiError` (400) where `n`, `candidates` and the server's limit do not fit.
    """
    limit = config.serving.max_candidates
    asked = request.cappy.candidates
    if asked is not None and asked > limit:
        raise ApiError(f"cappy.candidates={asked} is above this server's limit of {limit}", param="cappy.candidates", code="invalid_value")
    if request.n > limit:
        raise ApiError(f"n={request.n} is above this server's limit of {limit} candidates", param="n", code="invalid_value")
    if asked is not None and request.n > asked:
        raise ApiError(
            f"n={request.n} choices cannot come out of cappy.candidates={asked}; ask for more candidates", param="n", code="invalid_value"
        )
    if request.temperature == 0:
        if max(request.n, asked or 1) > 1:
            raise ApiError(
                "temperature=0 draws the same candidate every time; with more than one candidate or choice give a higher temperature, "
                "or none to use the server's decodings",
                param="temperature",
                code="invalid_value",
            )
        return 1
    if named and all(decoding.temperature == 0 for decoding in named):
        if max(request.n, asked or 1) > len(named):
            raise ApiError(
                f"the {len(named)} of cappy.decodings are greedy and draw one candidate each; name one that samples too, or ask for less",
                param="cappy.decodings",
                code="invalid_value",
            )
        return asked or len(named)
    return asked or (max(config.serving.candidates, request.n) if scored else request.n)


def named_decodings(request: SampleRequest, config: Config) -> list[DecodingConfig]:
    """Return the decodings the request names, in the server's order; none where it names none.

    Raises `ApiError` (400) for a name the server does not have, or where the request says beside how to sample.
    """
    names = request.cappy.decodings or []
    served = [decoding.name for decoding in config.sampler.decodings]
    for name in names:
        if name not in served:
            raise ApiError(
                f"cappy.decodings: {short(name)} is not one of this server's: {', '.join(served)}",
                param="cappy.decodings",
                code="invalid_value",
            )
    for field in ("temperature", "top_p") if names else ():
        if (value := getattr(request, field)) is not None:
            raise ApiError(
                f"{field}={value:g} and cappy.decodings both say how to sample; give one of them",
                param="cappy.decodings",
                code="invalid_value",
            )
    return [decoding for decoding in config.sampler.decodings if decoding.name in names]


def decodings_for(request: SampleRequest, config: Config, scored: bool = True) -> list[DecodingConfig]:
    """Return the decodings whose `n` add up to the request's pool of candidates.

    They are the sampler's own, or those of them the request names: greedy ones first with one candidate each, then the others in turn, one
    candidate a round, so that the pool is as varied as its size allows. With `temperature` or `top_p` the whole pool is drawn as they say.
    Raises `ApiError` (400) for a pool, a token limit or the product of both beyond what the server allows, and for such names.
    """
    named = named_decodings(request, config)
    size = pool_size(request, config, named, scored)
    own = named or config.sampler.decodings
    if request.temperature is not None or request.top_p is not None:
        temperature = 1.0 if request.temperature is None else request.temperature
        plain = DecodingConfig(
            name="request", temperature=temperature, top_p=request.top_p or 1.0, max_tokens=own[0].max_tokens, stop=own[0].stop
        )
        counts = [(plain, size)]
    else:
        greedy = [decoding for decoding in own if decoding.temperature == 0][:size]
        # A sampler with greedy decodings alone has nothing to fill a pool with: its first one is then drawn at temperature 1.
        others = [decoding for decoding in own if decoding.temperature > 0] or [
            own[0].model_copy(update={"name": "sample", "temperature": 1.0, "beams": 1})
        ]
        share, extra = divmod(size - len(greedy), len(others))
        counts = [(decoding, 1) for decoding in greedy]
        counts += [(decoding, share + (position < extra)) for position, decoding in enumerate(others)]
    decodings = [_fit(decoding, count, request, config) for decoding, count in counts if count]
    tokens, limit = sum(decoding.n * decoding.max_tokens for decoding in decodings), config.serving.max_sampled_tokens
    if tokens > limit:
        raise ApiError(
            f"max_tokens: {size} candidates may have {tokens:,} tokens together, above this server's limit of {limit:,} "
            f"(serving.max_sampled_tokens); ask for fewer or shorter ones",
            param=request.length[0],
            code="invalid_value",
        )
    return decodings


def stopping_for(request: SampleRequest, config: Config) -> AdaptiveConfig | None:
    """Return when the request's candidates are enough, None where all are to be drawn."""
    options, settings = request.cappy, config.serving.adaptive
    if options.min_gain is not None or options.target_score is not None:
        settings = settings.model_copy(update={"min_gain": options.min_gain, "target_score": options.target_score})
    return settings if settings.min_gain or settings.target_score is not None else None


def fallback_for(request: SampleRequest, config: Config) -> Fallback:
    """Return what chooses for a request when the scorer cannot."""
    return request.cappy.fallback or config.serving.fallback


def logprobs_wanted(request: SampleRequest, config: Config, scored: bool) -> bool:
    """Return whether anything reads the candidates' log-probabilities, which take the LLM's time.

    They are shown with the candidates, choose in a blend and in a fallback to them, and tell drawing by `min_gain` of repeats.
    """
    options = request.cappy
    if options.return_candidates or options.progress:
        return True
    chooses = config.serving.selection == "blend" or fallback_for(request, config) == "self_score"
    stopping = stopping_for(request, config)
    return scored and (chooses or bool(stopping and stopping.min_gain))


def _fit(decoding: DecodingConfig, count: int, request: SampleRequest, config: Config) -> DecodingConfig:
    """Give a decoding its number of candidates and the request's own length and stop strings."""
    name, asked = request.length
    max_tokens = asked or decoding.max_tokens
    most = config.sampler.engine.most_tokens
    if most is not None and max_tokens > max(most, decoding.max_tokens):
        raise ApiError(f"{name}={max_tokens} is above the {most} tokens the model has room for", param=name, code="invalid_value")
    return decoding.model_copy(
        update={
            "n": count,
            "max_tokens": max_tokens,
            "min_tokens": min(decoding.min_tokens, max_tokens),
            "stop": tuple(dict.fromkeys((*decoding.stop, *(request.stop or ())))),
        }
    )


def prompt_for(request: SampleRequest, system: str | None) -> list[Message] | str:
    """Return what the LLM is asked: the turns of a conversation, or the text it continues as it stands, without any system text."""
    if isinstance(request, TextRequest):
        return request.prompt
    assert isinstance(request, ChatRequest)
    return turns_for(request, system)


def turns_for(request: ChatRequest, system: str | None) -> list[Message]:
    """Return the client's messages as the LLM's turns; `system` goes first where the client gives no system text itself."""
    turns: list[Message] = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content.strip()}
        for message in request.messages
    ]
    if system and all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def distinct(candidates: Sequence[Candidate]) -> list[str]:
    """Return the different responses among the candidates, in order: what the scorer has to read."""
    return list(dict.fromkeys(candidate["response"] for candidate in candidates))


def rank(candidates: Sequence[Candidate], scores: Sequence[float]) -> list[int]:
    """Return the candidates' positions, best first; of equal scores the first drawn, and empty or scoreless ones last."""

    def key(position: int) -> tuple[bool, float]:
        score = scores[position]
        return (not candidates[position]["response"] or math.isnan(score), 0.0 if math.isnan(score) else -score)

    return sorted(range(len(candidates)), key=key)


def select(candidates: Sequence[Candidate], scores: Sequence[float], n: int) -> list[int]:
    """Return the positions of the `n` choices, best first (see `rank`).

    Equal responses stand once; they come again, after all others, only where there are fewer than `n` different ones.
    """
    first_of: dict[str, int] = {}
    ranked = rank(candidates, scores)
    for position in ranked:
        first_of.setdefault(candidates[position]["response"], position)
    firsts = set(first_of.values())
    return [*first_of.values(), *(position for position in ranked if position not in firsts)][:n]


def preferences(candidates: Sequence[Candidate], scores: Sequence[float], weight: float | None) -> list[float]:
    """Return what candidates are ranked by: their scores, or with `weight` the blend with the LLM's mean log-probability.

    The scores alone where one of the candidates has no log-probability: its rank would be chance.
    """
    means = [mean_logprob(each["logprob"], each["tokens"]) for each in candidates]
    known = [mean for mean in means if mean is not None]
    if weight is None or len(known) < len(means):
        return list(scores)
    return [float(value) for value in blend_scores(np.array(scores), np.array(known), weight)]


def fallback_preferences(candidates: Sequence[Candidate], fallback: Fallback) -> list[float]:
    """Return what candidates are ranked by without a scorer: their mean log-probability, or with `first` the order they were drawn in.

    The order drawn also where `self_score` lacks a log-probability.
    """
    means = [mean_logprob(each["logprob"], each["tokens"]) for each in candidates]
    known = [mean for mean in means if mean is not None]
    if fallback == "self_score" and len(known) == len(means):
        return known
    return [-float(position) for position in range(len(candidates))]


def completion(
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
    chosen = select(candidates, preferences, request.n)
    least = request.cappy.min_score
    # Not `<`: a score that is no number is no good either.
    abstained = least is not None and fallback is None and not scores[chosen[0]] >= least
    refusal = None
    if abstained:
        refusal = f"no candidate scored {least:g} (cappy.min_score); the best of {len(candidates)} scored {scores[chosen[0]]:.3f}"
        chosen = []
    completion_tokens = sum(candidates[position]["tokens"] for position in chosen)
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=prompt_tokens + completion_tokens)
    common: dict[str, Any] = {"id": f"{request.identity}-{identity}", "created": created, "model": request.model, "usage": usage}
    winners = [candidates[position] for position in chosen]
    answer: Completion
    if isinstance(request, TextRequest):
        answer = TextCompletion(**common, choices=_text_choices(winners))
    else:
        answer = ChatCompletion(**common, choices=_chat_choices(winners, refusal))
    if request.cappy.model_fields_set or fallback or abstained or stopped or cost is not None:
        shown = rank(candidates, preferences) if request.cappy.return_candidates else []
        answer.cappy = CappyAnswer(
            candidates=[_scored(candidates[position], scores[position], position in chosen) for position in shown],
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


def _scored(candidate: Candidate, score: float, chosen: bool) -> ScoredCandidate:
    return ScoredCandidate(**candidate, score=score if math.isfinite(score) else None, chosen=chosen)


def progress(
    request: SampleRequest, candidates: Sequence[Candidate], scores: Sequence[float], *, identity: str, created: int
) -> dict[str, Any]:
    """Return a chunk without choices that tells of the candidates so far, in the order drawn; none is chosen yet."""
    kind = TextCompletion.chunk if isinstance(request, TextRequest) else ChatCompletion.chunk
    same = {"id": f"{request.identity}-{identity}", "object": kind, "created": created, "model": request.model}
    same |= {"usage": None} if request.wants_usage else {}
    told = [_scored(candidate, score, False).model_dump() for candidate, score in zip(candidates, scores, strict=True)]
    return {**same, "choices": [], "cappy": {"progress": told}}


def chunks(answer: Completion, *, usage: bool) -> list[dict[str, Any]]:
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


def _same(value: Any, harmless: Any) -> bool:
    """Equality that keeps `false` and `0` apart, as JSON does."""
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)


def short(value: Any) -> str:
    """Return a value as JSON, cut to 80 characters for a message."""
    # In pieces, of which each has a character or more: a client's value may be as large as a body.
    text = "".join(itertools.islice(json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value), 81))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _explain(error: ValidationError) -> tuple[str, str]:
    """Turn pydantic's first error into the field's path and one line with path, value and what would be right."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:80]}" if path else part[:80]
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return path, f"{path} is missing{more}"
    if first["type"] == "extra_forbidden":
        return path, f"{path} is not known; `cappy` takes {', '.join(CappyOptions.model_fields)}{more}"
    if not path:  # of a whole request: the message starts with the field it is about
        return message.split()[0], f"{message}{more}"
    return path, f"{path}={short(first['input'])}: {message}{more}"
