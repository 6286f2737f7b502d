"""Encode a conversation to token ids, for engines with a tokenizer on this machine. Imports no Ray and no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import CappyError
from generation import prompts


def encode_prompt(
    tokenizer: Any,
    turns: Sequence[prompts.Message],
    form: str,
    limit: int,
    drop_shots: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a prompt, with shots dropped from the front until it has at most `limit` tokens.

    A prompt that is too long without shots is returned longer than `limit`. `drop_shots=False` drops no shots. `template_kwargs`
    are variables of the chat template. Raises `CappyError` for `form: chat` if the model has no chat template.
    """
    rest: Sequence[prompts.Message] = turns
    while True:
        ids = _tokenize(tokenizer, rest, form, template_kwargs or {})
        shorter = prompts.drop_first_shot(rest) if drop_shots and len(ids) > limit else None
        if shorter is None:
            return ids
        rest = shorter


def _tokenize(tokenizer: Any, turns: Sequence[prompts.Message], form: str, template_kwargs: Mapping[str, Any]) -> list[int]:
    """Return the token ids of all turns."""
    continued = prompts.prompt_text(turns, form)
    if continued is not None:
        return list(tokenizer(continued)["input_ids"])
    if tokenizer.chat_template is None:
        raise CappyError("sampler.prompt.form=chat: the model has no chat template; set sampler.prompt.form=raw")
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **template_kwargs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
