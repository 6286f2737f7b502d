"""The messages of a chat request: their content, the conversation for the LLM, and the text that the scorer reads.

Imports neither Ray nor a web framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from generation import prompts
from generation.prompts import Message
from serving.api_model import ApiModel
from serving.request_fields import MEDIA_KEYS, json_preview

# Fields of messages that no chat template reads. Clients send back messages as they received them.
_IGNORED = frozenset({"id", "refusal", "annotations", "citations", "cache_control", "provider_specific_fields", "metadata", "status"})


def join_text_parts(content: Any) -> Any:
    """Return OpenAI's text parts joined by line breaks, or a text unchanged. Raises `ValueError` for other content."""
    if isinstance(content, list):
        content = "\n".join(map(_part_text, content))
    if not isinstance(content, str):
        raise ValueError("send a text or a list of text parts")
    return content


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ValueError(f"a part of type {json_preview(kind)} is not supported; send parts {{'type': 'text', 'text': ...}}")
    if media := sorted(MEDIA_KEYS & part.keys()):
        raise ValueError(f"a part with {media[0]} is not supported; send parts {{'type': 'text', 'text': ...}}")
    return str(part["text"])


class TextPart(ApiModel):
    """A part of a message; the parts are joined by line breaks."""

    type: Literal["text"]
    text: str


class ChatMessage(ApiModel):
    """One turn of the conversation. Its text reaches the chat template unchanged, with leading and trailing white space."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(join_text_parts, json_schema_input_type=str | list[TextPart])]
    """The text. Null or absent is an empty text, in a message of the assistant only."""
    name: str | None = None
    """Name of the participant, for chat templates that read it."""
    reasoning_content: str | None = None
    """The reasoning of an earlier answer, for chat templates that read it. `reasoning` is the same."""

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        message = dict(message)
        if message.get("role") == "assistant" and message.get("content") is None:
            message["content"] = ""
        reasoning = message.pop("reasoning", None)
        if message.get("reasoning_content") is None:
            message["reasoning_content"] = reasoning
        return message

    @model_validator(mode="after")
    def _refuse_unread_fields(self) -> ChatMessage:
        """Raise `ValueError` for a field that a chat template could read and this server drops, such as `tool_calls`."""
        for name, value in (self.model_extra or {}).items():
            if name not in _IGNORED and value not in (None, [], {}, False):
                raise ValueError(f"{name[:80]} of a message is not supported; leave it out")
        return self

    def to_message(self) -> Message:
        """Return the message for the LLM."""
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=2048, fail_fast=True)]


def build_messages(messages: Sequence[ChatMessage], system: str | None) -> list[Message]:
    """Return the client's messages for the LLM; `system` is inserted first if the client sent no system message."""
    built = [message.to_message() for message in messages]
    if system and all(message["role"] != "system" for message in built):
        built.insert(0, {"role": "system", "content": system})
    return built


def last_instruction(messages: Sequence[ChatMessage]) -> str:
    """Return the text of the last user message that is not empty, or else of the last message that is not empty."""
    filled = [message for message in messages if message.content.strip()]
    users = [message for message in filled if message.role == "user"]
    return (users or filled)[-1].content.strip()


def conversation_text(messages: Sequence[ChatMessage]) -> str:
    """Return the whole conversation as one text, in the form `raw` of prompts."""
    return prompts.raw_text([message.to_message() for message in messages])
