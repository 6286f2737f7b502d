"""The same scores for less work: what a forward pass of a scorer computes and nobody reads is left out. Torch alone, no files.

The changes are made to the modules of a loaded model, in place; weights, their names and what is saved stay as they were.
Shapes: B pairs, T tokens of the longest, H hidden size, A heads, D size of a head.
"""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Encoders whose head reads the first token and whose layers are built alike.
_FAMILIES = ("bert", "roberta", "xlm-roberta")


def compute_first_token_only(model: Any) -> None:
    """Have the last layer of a BERT or RoBERTa scorer compute the first token alone, the only one its head reads.

    Keys and values are still of all tokens. A layer costs about a sixth of what it did, so six layers become about five, in
    training as in scoring. Scores and gradients are those of the plain model but for the order of sums. Other families, and
    attention other than torch's, stay as they are.
    """
    if _with_torchs_attention(model):
        last = model.base_model.encoder.layer[-1]
        last.forward = MethodType(_first_token, last)


def restore_last_layer(model: Any) -> None:
    """Undo `read_first_token_only`."""
    if computes_first_token_only(model):
        del model.base_model.encoder.layer[-1].forward


def computes_first_token_only(model: Any) -> bool:
    """Whether the last layer of a model computes the first token alone."""
    return model.config.model_type in _FAMILIES and "forward" in vars(model.base_model.encoder.layer[-1])


def _with_torchs_attention(model: Any) -> bool:
    config = model.config
    return config.model_type in _FAMILIES and config._attn_implementation == "sdpa" and not config.is_decoder


def _by_head(own: Any, project: nn.Linear, hidden_BTH: Tensor) -> Tensor:
    """Return a projection of some tokens, (B, A, T, D)."""
    projected_BTH: Tensor = project(hidden_BTH)
    return projected_BTH.unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2)


def _first_token(layer: Any, hidden_BTH: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Return a layer's output for the first token, (B, 1, H). `attention_mask` is (B, 1, T or 1, T) or absent."""
    attention = layer.attention
    own = attention.self
    first_B1H = hidden_BTH[:, :1]
    read_BA1D = nn.functional.scaled_dot_product_attention(
        _by_head(own, own.query, first_B1H),
        _by_head(own, own.key, hidden_BTH),
        _by_head(own, own.value, hidden_BTH),
        attn_mask=None if attention_mask is None else attention_mask[:, :, :1],
        dropout_p=own.dropout.p if layer.training else 0.0,
        scale=own.scaling,
    )
    attended_B1H = attention.output(read_BA1D.transpose(1, 2).flatten(2), first_B1H)
    output_B1H: Tensor = layer.feed_forward_chunk(attended_B1H)
    return output_B1H


class PackedLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer for inference on CPU: oneDNN's product with the bias, and a GELU where one follows, in the same pass."""

    packed: Tensor
    """The weight once more, in oneDNN's own layout."""
    activation = "none"

    def forward(self, input: Tensor) -> Tensor:
        algorithm = "none" if self.activation == "gelu" else ""  # the exact GELU, not its approximation
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, self.activation, [], algorithm)
        return output


# What oneDNN, and torch's wrapper of it, keep of each shape of batch they have met, 1024 each by default: 2 GB after 600 requests to a
# small scorer. Batches of pairs hardly come twice in the same shape, and with these limits scoring took as long as without.
_CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# Bytes of attention scores computed at once, which then are still in the core's cache when they are read.
_BLOCK = 3 << 20
# Exponents of e below which sums stay in bfloat16's range, and the least sum whose terms cannot have dropped below it.
_LARGEST_EXPONENT, _SMALLEST_SUM = 60.0, 1e-30


def _attend(own: Any, hidden_BTH: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Return what self-attention reads in bfloat16 on CPU, (B, T, H). `attention_mask` is (B, 1, T, T), the same for all queries.

    Torch's attention answers where `_attend_by_blocks` cannot, or where the mask is not of the kind transformers makes today.
    """
    query_BATD, key_BATD, value_BATD = (_by_head(own, project, hidden_BTH) for project in (own.query, own.key, own.value))
    read_BATD = None
    if attention_mask is None or attention_mask.dtype == torch.bool:
        kept_BT1 = None if attention_mask is None else attention_mask[:, 0, 0, :, None]
        read_BATD = _attend_by_blocks(query_BATD, key_BATD, value_BATD, kept_BT1, own.scaling)
    if read_BATD is None:
        read_BATD = nn.functional.scaled_dot_product_attention(
            query_BATD, key_BATD, value_BATD, attn_mask=attention_mask, scale=own.scaling
        )
    return read_BATD.transpose(1, 2).flatten(2), None


def _attend_by_blocks(query_BATD: Tensor, key_BATD: Tensor, value_BATD: Tensor, kept_BT1: Tensor | None, scaling: float) -> Tensor | None:
    """Return softmax(scaling q k^T) v over the tokens that are `kept` (bool), (B, A, T, D); None where its sums leave bfloat16's range.

    v and a column of ones are multiplied by exp(q k^T): the column gives the denominators, and rows of zeros in both leave padding
    out. Keys are taken less their mean, which changes no softmax and keeps exponents small; heads with large ones are shifted.
    """
    B, A, T, D = query_BATD.shape
    values_BATE = torch.cat((value_BATD, value_BATD.new_ones(B, A, T, 1)), dim=-1)
    if kept_BT1 is not None:
        values_BATE *= kept_BT1[:, None]
    # G counts the heads of all pairs, E is D and the column.
    query_GTD, values_GTE = (each.reshape(B * A, T, -1) for each in (query_BATD, values_BATE))
    key_GDT = (key_BATD - key_BATD.mean(dim=2, keepdim=True)).reshape(B * A, T, D).transpose(1, 2)
    block = max(1, _BLOCK // (2 * T * T))
    scores_GTT = query_GTD.new_empty(min(block, B * A), T, T)
    read_GTE = torch.empty_like(values_GTE)
    for start in range(0, B * A, block):
        some = slice(start, start + block)
        into = scores_GTT[: len(query_GTD[some])]
        torch.baddbmm(into, query_GTD[some], key_GDT[some], beta=0, alpha=scaling, out=into)
        excess_G = into.flatten(1).amax(dim=1) - _LARGEST_EXPONENT
        if excess_G.max() > 0:
            into -= excess_G.clamp_(min=0)[:, None, None]
        torch.bmm(into.exp_(), values_GTE[some], out=read_GTE[some])
    if not read_GTE[..., -1].min() > _SMALLEST_SUM:  # NaN included
        return None
    return (read_GTE[..., :-1] / read_GTE[..., -1:]).view(B, A, T, D)


def pack_for_cpu(model: Any) -> None:
    """Make the linear layers of a model that stays on the CPU, in evaluation mode, `PackedLinear`s. Costs its weights a second time.

    In bfloat16 BERT and RoBERTa scorers attend by `_attend`, in about half the time of torch's kernel (docs/guides/train.md). The first
    call in a process keeps oneDNN's caches small, where the environment says nothing else.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for name, capacity in _CACHES.items():
        os.environ.setdefault(name, capacity)
    if _with_torchs_attention(model) and model.dtype == torch.bfloat16:
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
