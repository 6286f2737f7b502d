"""Request models of the chat and text completions, and the parsing of request bodies. Imports neither Ray nor a web framework.

A body is JSON (`json_limits`) with supported fields (`request_fields`). It becomes a `ChatRequest` or a `TextRequest`, from which
`build_prompt` makes the LLM's prompt. An invalid body is an `ApiError` with status 400 that names the field, its value and the
correction.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.config import Fallback, SelectionMode
from generation.prompts import Message
from serving import json_limits, messages, request_fields
from serving.api_model import ApiModel, make_model_optional
from serving.backend import ApiError
from serving.messages import Messages
from serving.request_fields import json_preview
from serving.structured_outputs import StructuredOutputs

ModelT = TypeVar("ModelT", bound=BaseModel)


def _list_prompts(prompt: Any) -> Any:
    """Return the prompts of a request as a list. Raises `ValueError` for token ids; the field's type checks all other values."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, list) and any(isinstance(each, int | list) for each in prompts):
        raise ValueError("token ids are not supported; send the prompt as a text")
    return prompts


def _stop_strings(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


_StopString = Annotated[str, Field(min_length=1, max_length=1024)]
_StopStrings = Annotated[list[_StopString], Field(max_length=16, fail_fast=True)]
_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
_Prompts = Annotated[list[str], Field(min_length=1, max_length=256, fail_fast=True)]


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
    selection: SelectionMode | None = None
    """How the choices are selected; null means the server's `serving.selection`. `consensus` needs no scorer, so it also applies to the LLM
    alone."""
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

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    """Whether a last chunk reports the usage."""
    continuous_usage_stats: Literal[False] | None = None
    """Not supported: a chunk before the last has no usage."""
    include_obfuscation: bool | None = None
    """Without effect: this server adds no random fields to its chunks."""


class SampleRequest(ApiModel):
    """Fields that chat and text completions share."""

    id_prefix: ClassVar[str]
    """Prefix of the answer's id."""
    unsupported: ClassVar[request_fields.Harmless]
    """Fields of other servers that this model lacks; see `request_fields`."""
    model_config = ConfigDict(strict=True, allow_inf_nan=False, json_schema_extra=make_model_optional)
    model: str
    """Name of a model of the server; absent or null means `serving.model_name`."""
    n: int = Field(1, ge=1)
    """Choices returned, best first."""
    max_tokens: int | None = Field(None, ge=1)
    """Limit of a candidate's tokens; null means the limit of each decoding."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Same as `max_tokens`, and takes precedence over it."""
    min_tokens: int | None = Field(None, ge=0)
    """Smallest length of a candidate in tokens; null means that of each decoding. vLLM and transformers support it."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[_StopStrings, BeforeValidator(_stop_strings, json_schema_input_type=_StopString | _StopStrings)] | None = None
    """Strings that end a candidate, in addition to those of the server's decodings."""
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=64, fail_fast=True)] | None = None
    """Ids of tokens that end a candidate. Only an LLM on vLLM supports it."""
    structured_outputs: StructuredOutputs | None = None
    """A form that every candidate must have, as in vLLM's server. Only an LLM on vLLM supports it."""
    seed: int | None = None
    """The same request with the same seed samples the same candidates, except for numerical differences from the engine's batching."""
    stream: bool = False
    """Whether the answer is a stream of server-sent events: keep-alives during sampling, then the choices in chunks."""
    stream_options: StreamOptions | None = None
    store: bool | None = None
    """false leaves the request out of the log of candidates (`serving.log_candidates`)."""
    cappy: CappyOptions = CappyOptions()

    @field_validator("n", "stream", "cappy", mode="before")
    @classmethod
    def _replace_null_by_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].get_default() if value is None else value

    @model_validator(mode="after")
    def _check_combinations(self) -> SampleRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream=true; set it or leave stream_options out")
        if self.cappy.progress and not self.stream:
            raise ValueError("cappy.progress requires stream=true; set it or leave cappy.progress out")
        name, limit = self.token_limit
        if self.min_tokens is not None and limit is not None and self.min_tokens > limit:
            raise ValueError(f"min_tokens={self.min_tokens} is above {name}={limit}; lower it")
        if self.min_tokens and self.structured_outputs is not None:
            raise ValueError("min_tokens and structured_outputs exclude each other; leave one of them out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream reports the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Name and value of the field that limits a candidate's tokens."""
        if self.max_completion_tokens:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    @abstractmethod
    def instruction(self) -> str:
        """The instruction that the scorer reads with `serving.scorer_context=last`."""

    @property
    @abstractmethod
    def conversation(self) -> str:
        """The text that the scorer reads with `serving.scorer_context=conversation`."""


class ChatRequest(SampleRequest):
    """The body of POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    unsupported = request_fields.CHAT
    messages: Messages
    """The conversation. Its last message may have any role."""

    @model_validator(mode="after")
    def _check_text(self) -> ChatRequest:
        if not any(message.content.strip() for message in self.messages):
            raise ValueError("messages are all empty; send an instruction")
        return self

    @property
    def instruction(self) -> str:
        """The text of the last user message, or of the last message if no user message has text."""
        return messages.last_instruction(self.messages)

    @property
    def conversation(self) -> str:
        """All messages as one text."""
        return messages.conversation_text(self.messages)


class TextRequest(SampleRequest):
    """The body of POST /v1/completions: prompts that the LLM continues without a chat template."""

    id_prefix = "cmpl"
    unsupported = request_fields.TEXT
    prompts: Annotated[_Prompts, BeforeValidator(_list_prompts, json_schema_input_type=str | _Prompts)] = Field(validation_alias="prompt")
    """A text or a list of texts. The choices of all prompts are one list, in the order of the prompts."""

    @model_validator(mode="after")
    def _check_prompts(self) -> TextRequest:
        for index, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {f'{index} ' if len(self.prompts) > 1 else ''}is empty; send the text to continue")
        if len(self.prompts) > 1 and self.cappy.progress:
            raise ValueError("cappy.progress reports the candidates of one prompt; send one prompt or leave cappy.progress out")
        return self

    def split(self) -> list[TextRequest]:
        """Return one request for each prompt."""
        return [self.model_copy(update={"prompts": [prompt]}) for prompt in self.prompts]

    @property
    def instruction(self) -> str:
        """The whole prompt. A request of several prompts has none; see `split`."""
        (prompt,) = self.prompts
        return prompt.strip()

    @property
    def conversation(self) -> str:
        """The whole prompt."""
        return self.instruction


def parse_chat_request(body: bytes, default_model: str | None = None) -> ChatRequest:
    """Return the chat request in `body`. Raises `ApiError` (400) for an invalid body; see `parse_request`."""
    return parse_request(ChatRequest, body, ChatRequest.unsupported, default_model)


def parse_text_request(body: bytes, default_model: str | None = None) -> TextRequest:
    """Return the request for a text completion in `body`. Raises `ApiError` (400) for an invalid body; see `parse_request`."""
    return parse_request(TextRequest, body, TextRequest.unsupported, default_model)


def parse_request(kind: type[ModelT], body: bytes, unsupported: request_fields.Harmless, default_model: str | None = None) -> ModelT:
    """Return the request of type `kind` in `body`.

    Args:
        kind: The model of the request.
        body: JSON.
        unsupported: Fields that `kind` lacks, each with the values that change nothing; see `request_fields.check_fields`.
        default_model: The value of `model` if the request has none; None requires the field.

    Raises `ApiError` (400) that names the field, its value and the correction.
    """
    try:
        tree = json_limits.parse_json(body)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        wanted = " and ".join(f"`{_field_names(kind, name)[0]}`" for name, field in kind.model_fields.items() if field.is_required())
        raise ApiError(f"the body is a JSON {type(tree).__name__}; send an object with {wanted}", code="invalid_json")
    request_fields.check_fields(tree, {each for name in kind.model_fields for each in _field_names(kind, name)}, unsupported)
    if default_model is not None and tree.get("model") is None:
        tree["model"] = default_model
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        path, message = _describe_error(error)
        raise ApiError(message, param=path or None, code="invalid_value") from None


def _field_names(kind: type[BaseModel], name: str) -> list[str]:
    """Return the names that a request may use for a field."""
    alias = kind.model_fields[name].validation_alias
    return [str(each) for each in alias.choices] if isinstance(alias, AliasChoices) else [str(alias or name)]


def build_prompt(request: SampleRequest, system: str | None) -> list[Message] | str:
    """Return the LLM's prompt: the messages of a conversation, or the text to continue.

    `system` is the server's system message; it is not added to a text.
    """
    if isinstance(request, TextRequest):
        (prompt,) = request.prompts
        return prompt
    assert isinstance(request, ChatRequest)
    return messages.build_messages(request.messages, system)


_CLOSED_OBJECTS: dict[str, type[BaseModel]] = {
    "cappy": CappyOptions,
    "stream_options": StreamOptions,
    "structured_outputs": StructuredOutputs,
}


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
        parent = str(first["loc"][0])
        fields = ", ".join(field.alias or name for name, field in _CLOSED_OBJECTS[parent].model_fields.items())
        return path, f"{path} is not a field of `{parent}`; its fields are {fields}{more}"
    if not path:  # an error of the whole request; its message starts with the name of the field
        return message.split()[0].partition("=")[0], f"{message}{more}"
    return path, f"{path}={json_preview(first['input'])}: {message}{more}"
