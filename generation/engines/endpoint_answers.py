"""Read the choices of an endpoint's answer: texts, finish reasons, log-probabilities and token counts. Pure: no requests, no Ray.

Servers differ: content as a list of parts, finish reasons with other names, log-probabilities that are null or not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from generation.engines.endpoint_errors import load_json
from generation.engines.finish_reasons import End, read_end
from generation.logprobs import sum_logprobs
from generation.sources.row import is_encodable

# Types of the parts of a content that belong to the answer.
_TEXT_PARTS = (None, "", "text", "output_text")
_REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_TOOLS = ("tool_calls", "function_call")


class Choice(NamedTuple):
    """One choice of an answer."""

    text: str
    end: End
    logprob: float | None
    tokens: int
    without_text: str = ""
    """The fields that the choice has instead of a text (reasoning, tool calls), or empty."""


class Usage(NamedTuple):
    """The tokens of an answer, as counted by the server."""

    prompt: int
    sampled: int


def read_choices(response: httpx.Response) -> list[Choice]:
    """Return the choices of an answer in their order.

    Raises `ValueError` if the answer does not follow the OpenAI API or has no choices.
    """
    try:
        raw = load_json(response)["choices"]
        choices = [_read_choice(choice) for choice in _in_order(raw)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its answer does not follow the OpenAI API: {type(error).__name__} {error}") from None
    if not choices:
        raise ValueError("its answer has no choices")
    usage = read_usage(response)
    if usage is not None and (len(choices) == 1 or not all(choice.tokens for choice in choices)):
        counts = _split_tokens(usage.sampled, [choice.text for choice in choices])
    else:
        counts = [choice.tokens or len(choice.text.split()) for choice in choices]
    return [choice._replace(tokens=tokens) for choice, tokens in zip(choices, counts, strict=True)]


def read_usage(response: httpx.Response) -> Usage | None:
    """Return the token counts of an answer, or None if it does not report them or is truncated."""
    try:
        usage = load_json(response)["usage"]
        found = Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return found if min(found) >= 0 else None


def cut_at_stop(choice: Choice, stop: Sequence[str]) -> Choice:
    """Return a choice cut at the first stop string, for a server that does not accept `stop`. The log-probability is then unknown."""
    found = [at for each in stop if (at := choice.text.find(each)) >= 0]
    return choice._replace(text=choice.text[: min(found)], end="stop", logprob=None) if found else choice


def _in_order(choices: Any) -> list[dict[str, Any]]:
    """Return the choices by `index`. A choice without a number as index keeps its position."""
    indexes = [choice.get("index") for choice in choices]
    if not all(isinstance(index, int) for index in indexes):
        return list(choices)
    return [choice for _, choice in sorted(zip(indexes, choices, strict=True), key=lambda pair: pair[0])]


def _read_choice(choice: dict[str, Any]) -> Choice:
    message = choice.get("message") or choice.get("delta")
    text = choice["text"] if message is None else message.get("content")
    text, end = _text(text), read_end(choice.get("finish_reason"))
    message = message or {}
    if choice.get("error"):
        end = "failed"
    if message.get("refusal") or _has_refusal(message.get("content")) or not is_encodable(text):
        end = "filtered"
    values = _logprobs(choice)
    instead = [name for name in (*_REASONING, *_TOOLS) if message.get(name)] if not text.strip() else []
    return Choice(text, end, None if values is None else sum_logprobs(values), len(values or ()), ", ".join(instead))


def _text(content: Any) -> str:
    """Return the text of a content: a string, null, a part, or a list of parts. Parts with reasoning, tool calls or images are skipped.

    Raises `TypeError` for another content.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(_text, content))
    if isinstance(content, dict):
        kind = content.get("type")
        if kind not in _TEXT_PARTS or content.get("thought"):
            return ""
        # {"text": ...}; {"text": {"value": ...}}; Gemini: {"parts": [...]}.
        for name in ("text", "value", "parts", "content"):
            if name in content:
                return _text(content[name])
    raise TypeError(f"content of type {type(content).__name__}")


def _has_refusal(content: Any) -> bool:
    """Return whether a part of a content is a refusal of the model."""
    return isinstance(content, list) and any(isinstance(part, dict) and part.get("type") == "refusal" for part in content)


def _logprobs(choice: dict[str, Any]) -> list[Any] | None:
    """Return the log-probability of each sampled token as the server sent it, or None if it does not return them."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("content"), list) and found["content"]:
        return [token.get("logprob") if isinstance(token, dict) else None for token in found["content"]]
    if isinstance(found.get("token_logprobs"), list) and found["token_logprobs"]:
        return list(found["token_logprobs"])
    return None


def _split_tokens(total: int, texts: Sequence[str]) -> list[int]:
    """Split a total number of tokens over texts, in proportion to their lengths in bytes. The parts sum to `total`."""
    lengths = [len(text.encode("utf-8", "replace")) + 1 for text in texts]
    ends = [round(total * sum(lengths[: index + 1]) / sum(lengths)) for index in range(len(lengths))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
