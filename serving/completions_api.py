"""Request models of the chat and text completions, and the parsing of request bodies. Imports neither Ray nor a web framework.

A body is JSON (`json_limits`). It becomes a `ChatRequest` or a `TextRequest`, from which `build_prompt` makes the LLM's prompt. An
invalid body is an `ApiError` with status 400 that names the field, its value and the correction.
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
    """Base of the request and response models; the docstrings of their fields become descriptions in the OpenAPI schema."""

    model_config = ConfigDict(use_attribute_docstrings=True)


# Fields of OpenAI's API and vLLM's server that would change the answer and are not supported, each with the values that change
# nothing. Other values are refused, because an answer that ignores them would appear correct. Fields that are not listed,
# such as `user` and `metadata`, change no answer and are ignored.
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
    """Return OpenAI's text parts joined by line breaks, or a text unchanged. Raises `ValueError` for other content."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"a part of type {json_preview(kind)} is not supported; send parts {{'type': 'text', 'text': ...}}")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError("send a text or a list of text parts")
    return content


def _unwrap_prompt(prompt: Any) -> Any:
    """Return the text in a list of one prompt; other values are returned unchanged, and the field's type checks them."""
    if not isinstance(prompt, list):
        return prompt
    if any(isinstance(each, int | list) for each in prompt):
        raise ValueError("token ids are not supported; send the prompt as a text")
    if len(prompt) != 1:
        raise ValueError(f"{len(prompt)} prompts in one request are not supported; send one request per prompt")
    return prompt[0]


def _stop_strings(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class TextPart(ApiModel):
    """A part of a message; the parts are joined by line breaks."""

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
    """The `cappy` object of a request, an extension of OpenAI's API. OpenAI's client sends it as `extra_body={"cappy": {...}}`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    candidates: int | None = Field(None, ge=1)
    """Number of candidates to sample and score. Null means the server's `serving.candidates`, or `n` if that is larger."""
    decodings: Annotated[list[str], Field(min_length=1, max_length=64, fail_fast=True)] | None = None
    """Names of the server's decodings to sample with; null means all. Cannot be combined with `temperature` or `top_p`."""
    return_candidates: bool = False
    """Whether the answer lists every candidate with its score under `cappy`."""
    min_score: float | None = Field(None, allow_inf_nan=False)
    """Minimum score of the best candidate; below it the answer is a refusal. Has no effect when the fallback selects."""
    fallback: Fallback | None = None
    """How the choices are selected when the scorer fails or times out; null means the server's `serving.fallback`."""
    scorer: str | None = None
    """Name of the scorer that selects the choices; null means the scorer of `model`."""
    min_gain: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Stop sampling when the next candidate is expected to raise the best score by less than this; 0 disables the rule."""
    target_score: float | None = Field(None, allow_inf_nan=False)
    """Stop sampling when the best score, or with `n` choices the n-th best, reaches this. Without `min_gain` and `target_score` the
    server's `serving.adaptive` applies."""
    progress: bool = False
    """Whether a stream reports the candidates while they are sampled and scored."""


class StreamOptions(ApiModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    """Whether a last chunk reports the usage."""


class SampleRequest(ApiModel):
    """Fields that chat and text completions share."""

    id_prefix: ClassVar[str]
    """Prefix of the answer's id."""
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str
    n: int = Field(1, ge=1)
    """Choices returned, best first."""
    max_tokens: int | None = Field(None, ge=1)
    """Limit of a candidate's tokens; null means the limit of each decoding."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[_StopStrings, BeforeValidator(_stop_strings, json_schema_input_type=_StopString | _StopStrings)] | None = None
    """Strings that end a candidate, in addition to those of the server's decodings."""
    seed: int | None = None
    """The same request with the same seed samples the same candidates, except for numerical differences from the engine's batching."""
    stream: bool = False
    """Whether the answer is a stream of server-sent events: keep-alives during sampling, then the choices in chunks."""
    stream_options: StreamOptions | None = None
    cappy: CappyOptions = CappyOptions()

    @field_validator("n", "stream", "cappy", mode="before")
    @classmethod
    def _replace_null_by_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].get_default() if value is None else value

    @model_validator(mode="after")
    def _check_stream_options(self) -> SampleRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream=true; set it or leave stream_options out")
        if self.cappy.progress and not self.stream:
            raise ValueError("cappy.progress requires stream=true; set it or leave cappy.progress out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream reports the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Name and value of the field that limits a candidate's tokens."""
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def instruction(self) -> str:
        """The instruction that the scorer reads."""


class ChatRequest(SampleRequest):
    """The body of POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    messages: list[ChatMessage] = Field(min_length=1, max_length=2048, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    """Same as `max_tokens`, and takes precedence over it."""

    @model_validator(mode="after")
    def _check_last_message(self) -> ChatRequest:
        last = self.messages[-1]
        if last.role != "user":
            raise ValueError(f"messages must end with the instruction, a message of role='user'; the last message has role={last.role!r}")
        if not last.content.strip():
            raise ValueError("messages must end with an instruction; the last message is empty")
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        return ("max_completion_tokens", self.max_completion_tokens) if self.max_completion_tokens else super().token_limit

    @property
    def instruction(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content.strip()


class TextRequest(SampleRequest):
    """The body of POST /v1/completions: a prompt that the LLM continues without a chat template."""

    id_prefix = "cmpl"
    prompt: Annotated[str, BeforeValidator(_unwrap_prompt)]
    """A text, or a list of one text."""

    @model_validator(mode="after")
    def _check_prompt(self) -> TextRequest:
        if not self.prompt.strip():
            raise ValueError("prompt is empty; send the text to continue")
        return self

    @property
    def instruction(self) -> str:
        """The whole prompt."""
        return self.prompt.strip()


def parse_chat_request(body: bytes) -> ChatRequest:
    """Return the chat request in `body`. Raises `ApiError` (400) for an invalid body; see `parse_request`."""
    return parse_request(ChatRequest, body, _UNSUPPORTED)


def parse_text_request(body: bytes) -> TextRequest:
    """Return the request for a text completion in `body`. Raises `ApiError` (400) for an invalid body; see `parse_request`."""
    return parse_request(TextRequest, body, _UNSUPPORTED_TEXT)


def parse_request(kind: type[ModelT], body: bytes, unsupported: Mapping[str, tuple[Any, ...]]) -> ModelT:
    """Return the request of type `kind` in `body`.

    `unsupported` lists fields that would change the answer, each with the values that change nothing. Raises `ApiError` (400) that
    names the field, its value and the correction.
    """
    try:
        tree = json_limits.parse_json(body)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
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
    """Return the LLM's prompt: the messages of a conversation, or the text to continue.

    `system` is the server's system message; it is not added to a text.
    """
    if isinstance(request, TextRequest):
        return request.prompt
    assert isinstance(request, ChatRequest)
    return build_messages(request, system)


def build_messages(request: ChatRequest, system: str | None) -> list[Message]:
    """Return the client's messages for the LLM; `system` is inserted first if the client sent no system message."""
    messages: list[Message] = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content.strip()}
        for message in request.messages
    ]
    if system and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _equal_in_json(value: Any, harmless: Any) -> bool:
    """Return whether two values are equal in JSON, where `false` and `0` differ."""
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)


def json_preview(value: Any) -> str:
    """Return a value as JSON, cut to 80 characters, for an error message."""
    # 81 encoded pieces have at least 81 characters. A client's value may be as large as a whole body.
    text = "".join(itertools.islice(json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value), 81))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _describe_error(error: ValidationError) -> tuple[str, str]:
    """Return the path of the field in pydantic's first error, and a message of one line with path, value and correction."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:80]}" if path else part[:80]
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more errors)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return path, f"{path} is missing{more}"
    if first["type"] == "extra_forbidden":
        return path, f"{path} is not a field of `cappy`; its fields are {', '.join(CappyOptions.model_fields)}{more}"
    if not path:  # an error of the whole request; its message starts with the name of the field
        return message.split()[0], f"{message}{more}"
    return path, f"{path}={json_preview(first['input'])}: {message}{more}"
