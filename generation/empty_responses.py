"""Sampled responses without text: their limit, and the lines that report them. Pure: no Ray, no files.

A model gives an empty response if it ends immediately, if its tokens are used up by reasoning, or if it calls a tool instead.
"""

from __future__ import annotations

from cluster.config import SamplerConfig
from cluster.errors import CappyError

_REMEDY = (
    "a reasoning model may need a larger max_tokens of its decodings, or no reasoning (sampler.prompt.chat_template_kwargs, "
    "e.g. {enable_thinking: false})"
)


def check_empty_share(empty: int, sampled: int, config: SamplerConfig) -> None:
    """Raise `CappyError` if the share of empty responses among the sampled ones exceeds `sampler.max_empty_share`."""
    if sampled and empty / sampled > config.max_empty_share:
        raise CappyError(
            f"{empty:,} of {sampled:,} sampled responses are empty, above sampler.max_empty_share={config.max_empty_share:g}; {_REMEDY}; "
            f"start again with --overwrite, or raise the share"
        )


def empty_warning(empty: int, sampled: int) -> str:
    """Return the log line about empty responses, or an empty text if there are none."""
    return f"{empty:,} of {sampled:,} sampled responses are empty and have a low label; {_REMEDY}" if empty else ""
