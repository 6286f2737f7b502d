"""How a candidate ended, by the finish reason of a server or an engine. Pure: no requests, no Ray."""

from __future__ import annotations

from typing import Any, Literal

End = Literal["stop", "length", "filtered", "failed"]
"""How a choice ended. `filtered`: a content filter stopped it. `failed`: the server did, and a retry may succeed."""

_ENDS: dict[End, tuple[str, ...]] = {
    "stop": (
        *("stop", "eos", "eos_token", "end", "end_turn", "stop_sequence", "stop_token", "stop_word", "complete", "completed", "finished"),
        *("tool_calls", "tool_call", "tool_use", "function_call", "finish_reason_unspecified", "unspecified"),
    ),
    "length": (
        *("length", "max_tokens", "max_token", "max_output_tokens", "max_completion_tokens", "max_length", "model_length"),
        *("model_context_window_exceeded", "context_length_exceeded", "context_length", "token_limit", "repetition_truncation"),
    ),
    "filtered": (
        *("content_filter", "content_filtered", "safety", "image_safety", "recitation", "blocklist", "prohibited_content", "spii"),
        *("refusal", "sensitive", "guardrail_intervened", "model_armor", "language", "error_toxic", "moderation", "flagged"),
    ),
    "failed": (
        *("error", "abort", "aborted", "cancel", "cancelled", "canceled", "insufficient_system_resource", "network_error", "timeout"),
        *("other", "internal_error", "server_error", "load_shed", "overloaded", "malformed_function_call", "unexpected_tool_call"),
    ),
}
_END_OF = {name: end for end, names in _ENDS.items() for name in names}
# For a reason in none of the lists: a part of its name decides.
_PARTS: tuple[tuple[End, tuple[str, ...]], ...] = (
    ("filtered", ("filter", "safety", "refus", "block", "prohibit", "policy", "sensitive", "moderat", "guardrail", "harm")),
    ("failed", ("error", "abort", "cancel", "fail", "timeout", "timed_out", "resource", "overload", "unavailable", "interrupt")),
    ("length", ("length", "max", "limit", "truncat", "token", "budget")),
)


def read_end(reason: Any) -> End:
    """Return how a choice ended. An unknown reason is `stop`, unless a part of its name is known."""
    if isinstance(reason, dict):
        reason = reason.get("type")  # SGLang
    if not isinstance(reason, str):
        return "stop"
    name = reason.strip().lower().replace("-", "_").replace(" ", "_").removeprefix("finish_reason_")
    if name in _END_OF:
        return _END_OF[name]
    return next((end for end, parts in _PARTS if any(part in name for part in parts)), "stop")
