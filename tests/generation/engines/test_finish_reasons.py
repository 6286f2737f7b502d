import pytest

from generation.engines.finish_reasons import read_end


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        *((name, "stop") for name in ("stop", "STOP", "eos_token", "end_turn", "stop_sequence", "tool_calls", "COMPLETE", "", None)),
        *((name, "length") for name in ("length", "MAX_TOKENS", "model_length", "max_output_tokens", "model_context_window_exceeded")),
        *((name, "filtered") for name in ("content_filter", "SAFETY", "RECITATION", "PROHIBITED_CONTENT", "refusal", "ERROR_TOXIC")),
        *((name, "failed") for name in ("error", "abort", "insufficient_system_resource", "cancelled", "network_error", "ERROR")),
        # Names that no list has.
        ("max_new_tokens_reached", "length"),
        ("output-limit", "length"),
        ("blocked_by_safety_policy", "filtered"),
        ("upstream_error", "failed"),
        ("worker timed out", "failed"),
        ("FINISH_REASON_MAX_TOKENS", "length"),
        ("satisfied", "stop"),
        ({"type": "length", "length": 8}, "length"),
        (7, "stop"),
    ],
)
def test_a_finish_reason_of_any_server_has_a_meaning(reason, end):
    assert read_end(reason) == end
