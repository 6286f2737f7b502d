"""Faster forward passes for scorers: compute the first token only in the last layer, and use oneDNN kernels on the CPU. Torch only.

The functions change the modules of a loaded model in place. Weights, their names and saved files stay the same. With
`scorer.cpu_kernels: false` nothing of this module is used.

Shapes: B pairs, T tokens of the longest pair, H hidden size, A heads, D size of a head.
"""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Encoder families whose head reads the first token and whose layers have the same structure.
_FAMILIES = ("bert", "roberta", "xlm-roberta")


def compute_first_token_only(model: Any) -> None:
    """Make the last layer of a BERT or RoBERTa scorer compute its first token only. The head reads no other token.

    Keys and values are still computed for all tokens. This makes the last layer about six times cheaper, in training and scoring.
    Scores and gradients equal those of the plain model up to the order of sums. Other model families, and attention other than
    torch's SDPA, are left unchanged.
    """
    if _has_sdpa_attention(model):
        last = model.base_model.encoder.layer[-1]
        last.forward = MethodType(_forward_first_token, last)


def restore_last_layer(model: Any) -> None:
    """Undo `read_first_token_only`."""
    if computes_first_token_only(model):
        del model.base_model.encoder.layer[-1].forward


def computes_first_token_only(model: Any) -> bool:
    """Return whether the last layer of a model computes the first token only."""
    return model.config.model_type in _FAMILIES and "forward" in vars(model.base_model.encoder.layer[-1])


def _has_sdpa_attention(model: Any) -> bool:
    config = model.config
    return config.model_type in _FAMILIES and config._attn_implementation == "sdpa" and not config.is_decoder


def _project_by_head(attention: Any, projection: nn.Linear, hidden_BTH: Tensor) -> Tensor:
    """Return the queries, keys or values of some tokens, (B, A, T, D)."""
    projected_BTH: Tensor = projection(hidden_BTH)
    return projected_BTH.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)


def _forward_first_token(layer: Any, hidden_BTH: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Return a layer's output for the first token, (B, 1, H). `attention_mask` is (B, 1, T or 1, T) or None."""
    attention = layer.attention.self
    first_B1H = hidden_BTH[:, :1]
    context_BA1D = nn.functional.scaled_dot_product_attention(
        _project_by_head(attention, attention.query, first_B1H),
        _project_by_head(attention, attention.key, hidden_BTH),
        _project_by_head(attention, attention.value, hidden_BTH),
        attn_mask=None if attention_mask is None else attention_mask[:, :, :1],
        dropout_p=attention.dropout.p if layer.training else 0.0,
        scale=attention.scaling,
    )
    attended_B1H = layer.attention.output(context_BA1D.transpose(1, 2).flatten(2), first_B1H)
    output_B1H: Tensor = layer.feed_forward_chunk(attended_B1H)
    return output_B1H


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer for inference on the CPU: oneDNN computes product, bias and a following GELU in one pass."""

    packed: Tensor
    """A copy of the weight in oneDNN's layout."""
    activation = "none"

    def forward(self, input: Tensor) -> Tensor:
        algorithm = "none" if self.activation == "gelu" else ""  # "none" is the exact GELU, "tanh" its approximation
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, self.activation, [], algorithm)
        return output


# Sizes of the caches of oneDNN and of torch's wrapper, in entries, one for each shape of batch. The default of 1024 takes gigabytes,
# and batches of pairs rarely have a shape twice.
_CACHE_SIZES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# Bytes of attention scores per block, so that a block is still in the core's cache when it is read.
_BLOCK_BYTES = 3 << 20
# Exponents up to this keep the sums in bfloat16's range. A sum below the second value may have lost terms to underflow.
_LARGEST_EXPONENT, _SMALLEST_SUM = 60.0, 1e-30


def _attend(attention: Any, hidden_BTH: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Return the output of self-attention in bfloat16 on the CPU, (B, T, H).

    `attention_mask` is bool (B, 1, T, T), the same for all queries, or None. With any other mask, or where `_attend_by_blocks`
    returns None, torch's attention is used.
    """
    query_BATD, key_BATD, value_BATD = (
        _project_by_head(attention, projection, hidden_BTH) for projection in (attention.query, attention.key, attention.value)
    )
    context_BATD = None
    if attention_mask is None or attention_mask.dtype == torch.bool:
        kept_BT1 = None if attention_mask is None else attention_mask[:, 0, 0, :, None]
        context_BATD = _attend_by_blocks(query_BATD, key_BATD, value_BATD, kept_BT1, attention.scaling)
    if context_BATD is None:
        context_BATD = nn.functional.scaled_dot_product_attention(
            query_BATD, key_BATD, value_BATD, attn_mask=attention_mask, scale=attention.scaling
        )
    return context_BATD.transpose(1, 2).flatten(2), None


def _attend_by_blocks(query_BATD: Tensor, key_BATD: Tensor, value_BATD: Tensor, kept_BT1: Tensor | None, scaling: float) -> Tensor | None:
    """Return softmax(scaling q k^T) v over the tokens that are `kept` (bool), (B, A, T, D). None when a sum leaves bfloat16's range.

    exp(q k^T) is multiplied by v and by a column of ones, which gives the denominators. Rows of zeros in both exclude padding. The
    mean of the keys is subtracted: no softmax changes, and the exponents become small. Heads with large exponents are shifted.
    """
    B, A, T, D = query_BATD.shape
    values_BATE = torch.cat((value_BATD, value_BATD.new_ones(B, A, T, 1)), dim=-1)
    if kept_BT1 is not None:
        values_BATE *= kept_BT1[:, None]
    # G is B * A, the heads of all pairs. E is D + 1, with the column of ones.
    query_GTD, values_GTE = (each.reshape(B * A, T, -1) for each in (query_BATD, values_BATE))
    key_GDT = (key_BATD - key_BATD.mean(dim=2, keepdim=True)).reshape(B * A, T, D).transpose(1, 2)
    heads = max(1, _BLOCK_BYTES // (2 * T * T))
    scores_GTT = query_GTD.new_empty(min(heads, B * A), T, T)
    context_GTE = torch.empty_like(values_GTE)
    for start in range(0, B * A, heads):
        block = slice(start, start + heads)
        into = scores_GTT[: len(query_GTD[block])]
        torch.baddbmm(into, query_GTD[block], key_GDT[block], beta=0, alpha=scaling, out=into)
        excess_G = into.flatten(1).amax(dim=1) - _LARGEST_EXPONENT
        if excess_G.max() > 0:
            into -= excess_G.clamp_(min=0)[:, None, None]
        torch.bmm(into.exp_(), values_GTE[block], out=context_GTE[block])
    if not context_GTE[..., -1].min() > _SMALLEST_SUM:  # also True for NaN
        return None
    return (context_GTE[..., :-1] / context_GTE[..., -1:]).view(B, A, T, D)


def pack_for_cpu(model: Any) -> None:
    """Replace the linear layers of a model by `PackedLinear`. For a model that stays on the CPU and in evaluation mode.

    The weights then take twice the memory. BERT and RoBERTa scorers in bfloat16 also use `_attend`, which takes about half the time
    of torch's kernel (docs/guides/train.md). Unless the environment sets them, the first call in a process sets the sizes of
    oneDNN's caches. Does nothing where torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for name, capacity in _CACHE_SIZES.items():
        os.environ.setdefault(name, capacity)
    if _has_sdpa_attention(model) and model.dtype == torch.bfloat16:
        for layer in model.base_model.encoder.layer:
            layer.attention.self.forward = MethodType(_attend, layer.attention.self)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
    if model.config.model_type in _FAMILIES and model.config.hidden_act == "gelu":
        for layer in model.base_model.encoder.layer:
            layer.intermediate.dense.activation = "gelu"
            layer.intermediate.intermediate_act_fn = nn.Identity()
