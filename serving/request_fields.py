"""The fields of OpenAI's, vLLM's, Cohere's and Jina's requests that this server does not have, and which of them it accepts.

A field that would change the answer and is ignored gives an answer that appears correct. So a request with an unknown field is refused,
with two exceptions: fields in `IGNORED`, which change no answer, and fields with a value that changes nothing (`UNSUPPORTED`).
`tests/serving/test_request_fields.py` compares these tables with the request models of the installed vLLM. Pure.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from typing import Any

from serving.backend import ApiError

Harmless = Mapping[str, tuple[Any, ...]]
"""Names of fields, each with the values that change nothing, in addition to null."""

IGNORED = frozenset(
    {
        # The sender of the request, and the data that the provider stores.
        *("user", "metadata", "store", "service_tier", "safety_identifier", "tags", "trace_id"),
        *("request_id", "session_id", "chat_id", "conversation_id"),
        # The provider's caches and scheduling.
        *("prompt_cache_key", "prompt_cache_retention", "keep_alive"),
        # The form of the answer's transport, of tool calls and of reasoning. This server's answers have no tool calls and no reasoning.
        *("stream_interval", "include_reasoning", "parallel_tool_calls", "mm_payload", "return_mm_kwargs", "usage"),
    }
)
"""Fields with no effect on an answer, accepted with any value."""

_SAMPLING: Harmless = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "reasoning_effort": (),
    "thinking_token_budget": (-1,),
    "best_of": (),
    "use_beam_search": (False,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "watermarking": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logprob_token_ids": ([],),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "echo": (False,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
}
CHAT: Harmless = {
    **_SAMPLING,
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "return_prompt_text": (False,),
}
TEXT: Harmless = {**_SAMPLING, "suffix": ("",), "best_of": (1,), "prompt_embeds": (), "add_special_tokens": (True,)}
SCORING: Harmless = {
    "truncate_prompt_tokens": (-1,),
    "truncation_side": (),
    "truncation": (True,),
    "padding": ("do_not_pad",),
    "max_chunks_per_doc": (1,),
    "activation": (False,),
    "use_activation": (False,),
    "rank_fields": (["text"],),
    "instruction": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    # It separates the prefix caches of clients, and a scorer has none.
    "cache_salt": (),
}

MEDIA_KEYS = frozenset(
    {
        *("image", "image_url", "image_data", "images", "video", "video_url", "videos", "audio", "audio_url", "input_audio"),
        *("file", "pdf", "multi_modal", "content", "bytes"),
    }
)
"""Keys beside a `text` whose content a model would have to read."""
_CLIENT_ARGUMENTS = {"extra_body", "extra_headers", "extra_query"}


def check_fields(tree: Mapping[str, Any], known: Collection[str], unsupported: Harmless) -> None:
    """Raise `ApiError` (400) for the first field of a request that would change the answer and is not supported.

    Args:
        tree: The request as parsed JSON.
        known: The fields that the request's model has.
        unsupported: Fields that the model lacks, with the values that change nothing.
    """
    for name, value in tree.items():
        if name in known or value is None or name in IGNORED:
            continue
        if any(_equal_in_json(value, harmless) for harmless in unsupported.get(name, ())):
            continue
        shown = name[:80]
        if name in _CLIENT_ARGUMENTS:
            advice = f"{shown} is an argument of OpenAI's Python client and no field of a request; send its content as fields"
        else:
            advice = f"{shown}={json_preview(value)} is not supported; leave {shown} out"
        raise ApiError(advice, param=shown, code="unsupported_parameter")


def _equal_in_json(value: Any, harmless: Any) -> bool:
    """Return whether two values are equal in JSON, where `false` and `0` differ."""
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)


def json_preview(value: Any) -> str:
    """Return a value as JSON, cut to 80 characters, for an error message."""
    # 81 encoded pieces have at least 81 characters. A client's value may be as large as a whole body.
    text = "".join(itertools.islice(json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value), 81))
    return text if len(text) <= 80 else f"{text[:77]}..."
