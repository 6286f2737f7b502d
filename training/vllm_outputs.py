"""Select the best output of each prompt from the result of `vllm.LLM.generate` or `vllm.LLM.chat`. Imports neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from training.selection import Pool, Selection, lower_empty


class Completion(Protocol):
    """The attributes of `vllm.CompletionOutput` that are read."""

    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None


class Request(Protocol):
    """The attributes of `vllm.RequestOutput` that are read."""

    prompt: str | None
    outputs: Sequence[Any]
    """Each a `Completion`."""


def rank_outputs(
    requests: Sequence[Request],
    instructions: Sequence[str] | None,
    score: Callable[[Sequence[str], Sequence[str]], np.ndarray],
    selection: Selection | None,
) -> list[tuple[list[str], np.ndarray, np.ndarray]]:
    """Return for each request its texts without outer white space, their raw logits, and their values for the ranking.

    Args:
        requests: a list of `vllm.RequestOutput`.
        instructions: the instruction of each request; None takes the prompts.
        score: returns the raw logits of pairs, given the instructions and the responses.
        selection: ranks the texts; None ranks by the logits. Empty texts have the lowest value.

    Raises `ValueError` if a request has no output or no prompt text, or if `instructions` has another length.
    """
    texts = [each.prompt for each in requests] if instructions is None else list(instructions)
    if len(texts) != len(requests):
        raise ValueError(f"{len(texts)} instructions for {len(requests)} vLLM outputs; give one instruction for each")
    pools = [[completion.text.strip() for completion in request.outputs] for request in requests]
    for number, (text, pool) in enumerate(zip(texts, pools, strict=True)):
        if text is None:
            raise ValueError(f"output {number} has no prompt text, because it was generated from token ids; give instructions=[...]")
        if not pool:
            raise ValueError(f"output {number} has no completion; sample with n >= 1")
    # Each different pair once: in a batch, equal rows may differ by roundings.
    pairs = list(dict.fromkeys((str(text), response) for text, pool in zip(texts, pools, strict=True) for response in pool))
    score_of = dict(zip(pairs, score([text for text, _ in pairs], [response for _, response in pairs]), strict=True))
    ranked = []
    for request, text, pool in zip(requests, texts, pools, strict=True):
        scores = np.array([score_of[str(text), response] for response in pool], np.float64)
        values = lower_empty(scores, pool)
        if selection is not None:
            logprobs = [completion.cumulative_logprob for completion in request.outputs]
            values = selection.rank(Pool(pool, scores, logprobs, [len(each.token_ids) for each in request.outputs], str(text)))
        ranked.append((pool, scores.astype(np.float32), values))
    return ranked
