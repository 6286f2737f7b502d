"""Top-k and top-p by row: sort the logits of the candidates with top-p only. Imports vLLM; imports no Ray.

If one candidate of a batch has top-p, vLLM sorts the logits of all of them over the whole vocabulary. The candidates of an instruction
have different decodings and are decoded in one batch, so on CPU this took a quarter of the time of the engine (SmolLM2, 49,152 tokens).
The masks are those of vLLM, apart from tokens whose probability is 0 in float32: vLLM masks them in the rows without top-p too, and they
are never drawn.

The engine loads this module as `worker_extension_cls`, vLLM's interface to extend its worker. It is used on CPU only: on GPUs vLLM has
kernels that do not sort. `vllm.TESTED_VERSIONS` lists the vLLM versions it is tested with.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.ops import topk_topp_sampler

_apply_to_all = topk_topp_sampler.apply_top_k_top_p


def apply_top_k_top_p(logits_BV: torch.Tensor, k_B: torch.Tensor | None, p_B: torch.Tensor | None) -> torch.Tensor:
    """Return the logits with those outside top-k or top-p as -inf, as vLLM's function of this name; `logits_BV` may change.

    Args:
        logits_BV: logits of B candidates over a vocabulary of V tokens.
        k_B: number of kept tokens, V for a candidate without top-k; None if no candidate has it.
        p_B: kept probability, 1 for a candidate without top-p; None if no candidate has it.
    """
    if p_B is None:
        return _apply_to_all(logits_BV, k_B, None)
    by_top_p, others = (p_B < 1).nonzero()[:, 0], (p_B >= 1).nonzero()[:, 0]
    for rows, p in ((by_top_p, p_B), (others, None)):
        if len(rows):
            logits_BV[rows] = _apply_to_all(logits_BV[rows], None if k_B is None else k_B[rows], None if p is None else p[rows])
    return logits_BV


class TopPByRow:
    """vLLM adds this class, which is empty, to its worker. The import of its module replaces the function of vLLM's sampler."""


topk_topp_sampler.apply_top_k_top_p = apply_top_k_top_p
