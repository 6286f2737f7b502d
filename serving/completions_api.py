"""Request models of the chat and text completions, and the parsing of request bodies.

Imports neither Ray nor a web framework. A body is JSON (`json_limits`). It becomes a `ChatRequest` or a `TextRequest`, and
`build_prompt` makes the LLM's prompt of it. An invalid body is an `ApiError` with status 400.
"""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.config import Fallback
from generation.prompts import Message
from serving import json_limits
from serving.backend import ApiError

ModelT = TypeVar("ModelT", bound=BaseModel)


class ApiModel(BaseModel):
    """Something sent or got; the docstrings of its fields are the schema's descriptions."""

    model_config = ConfigDict(use_attribute_docstrings=True)


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


def _join_text_parts(content: Any) -> Any:
    """Join OpenAI's text parts to one text; a text stays as it is."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"a part of type {json_preview(kind)} is not supported; only parts {{'type': 'text', 'text': ...}} are")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError("give a text or a list of text parts")
    return content


def _unwrap_prompt(prompt: Any) -> Any:
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


class TextPart(ApiModel):
    """A part of a message; parts are joined by line breaks."""

    type: Literal["text"]
    text: str


class ChatMessage(ApiModel):
    """One turn of the conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_text_parts, json_schema_input_type=str | list[TextPart])]


_StopString = Annotated[str, Field(min_length=1, max_length=1024)]
_StopStrings = Annotated[list[_StopString], Field(max_length=16, fail_fast=True)]


class CappyOptions(ApiModel):
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


class StreamOptions(ApiModel):
    """What a stream tells beside the choices."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    """Whether a last chunk has the usage."""


class SampleRequest(ApiModel):
    """What chat and text completions have in common."""

    id_prefix: ClassVar[str]
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
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits a candidate's tokens, and the limit."""
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def instruction(self) -> str:
        """The bare instruction the scorer reads."""


class ChatRequest(SampleRequest):
    """The body of POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
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
    def token_limit(self) -> tuple[str, int | None]:
        return ("max_completion_tokens", self.max_completion_tokens) if self.max_completion_tokens else super().token_limit

    @property
    def instruction(self) -> str:
        """The last message alone."""
        return self.messages[-1].content.strip()


class TextRequest(SampleRequest):
    """The body of POST /v1/completions: a prompt the LLM continues as it stands, without a chat template."""

    id_prefix = "cmpl"
    prompt: Annotated[str, BeforeValidator(_unwrap_prompt)]
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


def parse_chat_request(body: bytes) -> ChatRequest:
    """Return the chat request in `body`. Raises `ApiError` (400) naming the field, its value and what would be right."""
    return parse_request(ChatRequest, body, _UNSUPPORTED)


def parse_text_request(body: bytes) -> TextRequest:
    """Return the request for a text completion in `body`. Raises `ApiError` (400) as `parse` does."""
    return parse_request(TextRequest, body, _UNSUPPORTED_TEXT)


def parse_request(kind: type[ModelT], body: bytes, unsupported: Mapping[str, tuple[Any, ...]]) -> ModelT:
    """Return the request of a kind in `body`; `unsupported` has the fields that would change the answer, each with its harmless values.

    Raises `ApiError` (400) naming the field, its value and what would be right.
    """
    try:
        tree = json_limits.parse_json(body)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        wanted = " and ".join(f"`{name}`" for name, field in kind.model_fields.items() if field.is_required())
        raise ApiError(f"the body is a JSON {type(tree).__name__}; send an object with {wanted}", code="invalid_json")
    for name, harmless in unsupported.items():
        if name in tree and not any(_equal_in_json(tree[name], value) for value in harmless):
            raise ApiError(
                f"{name}={json_preview(tree[name])} is not supported yet; leave {name} out", param=name, code="unsupported_parameter"
            )
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        path, message = _describe_error(error)
        raise ApiError(message, param=path or None, code="invalid_value") from None


def build_prompt(request: SampleRequest, system: str | None) -> list[Message] | str:
    """Return what the LLM is asked: the turns of a conversation, or the text it continues as it stands, without any system text."""
    if isinstance(request, TextRequest):
        return request.prompt
    assert isinstance(request, ChatRequest)
    return build_messages(request, system)


def build_messages(request: ChatRequest, system: str | None) -> list[Message]:
    """Return the client's messages as the LLM's turns; `system` goes first where the client gives no system text itself."""
    turns: list[Message] = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content.strip()}
        for message in request.messages
    ]
    if system and all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _equal_in_json(value: Any, harmless: Any) -> bool:
    """Equality that keeps `false` and `0` apart, as JSON does."""
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)


def json_preview(value: Any) -> str:
    """Return a value as JSON, cut to 80 characters for a message."""
    # In pieces, of which each has a character or more: a client's value may be as large as a body.
    text = "".join(itertools.islice(json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value), 81))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _describe_error(error: ValidationError) -> tuple[str, str]:
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
    return path, f"{path}={json_preview(first['input'])}: {message}{more}"
