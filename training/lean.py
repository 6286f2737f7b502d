"""The same scores for less work: what a forward pass of a scorer computes and nobody reads is left out. Torch alone, no files.

Both changes are made to the modules of a loaded model, in place; weights, their names and what is saved stay as they were.
Shapes: B pairs, T tokens of the longest, H hidden size, A heads, D size of a head.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Encoders whose head reads the first token and whose layers are built alike.
_FAMILIES = ("bert", "roberta", "xlm-roberta")


def read_first_token_only(model: Any) -> None:
    """Have the last layer of a BERT or RoBERTa scorer compute the first token alone, the only one its head reads.

    Keys and values are still of all tokens. A layer costs about a sixth of what it did, so six layers become about five, in
    training as in scoring. Scores and gradients are those of the plain model but for the order of sums. Other families, and
    attention other than torch's, stay as they are.
    """
    if model.config.model_type in _FAMILIES and model.config._attn_implementation == "sdpa" and not model.config.is_decoder:
        last = model.base_model.encoder.layer[-1]
        last.forward = MethodType(_first_token, last)


def read_all_tokens(model: Any) -> None:
    """Undo `read_first_token_only`."""
    if reads_first_token_only(model):
        del model.base_model.encoder.layer[-1].forward


def reads_first_token_only(model: Any) -> bool:
    """Whether the last layer of a model computes the first token alone."""
    return model.config.model_type in _FAMILIES and "forward" in vars(model.base_model.encoder.layer[-1])


def _first_token(layer: Any, hidden_BTH: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Return a layer's output for the first token, (B, 1, H). `attention_mask` is (B, 1, T or 1, T) or absent."""
    attention = layer.attention
    own = attention.self
    first_B1H = hidden_BTH[:, :1]
    query_BA1D, key_BATD, value_BATD = (
        project(hidden).unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2)
        for project, hidden in ((own.query, first_B1H), (own.key, hidden_BTH), (own.value, hidden_BTH))
    )
    read_BA1D = nn.functional.scaled_dot_product_attention(
        query_BA1D,
        key_BATD,
        value_BATD,
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


# Bytes of attention scores computed at once, which then are still in the core's cache when they are read.
_BLOCK = 3 << 20
# Exponents of e below which sums stay in bfloat16's range, and the least sum whose terms cannot have dropped below it.
_LARGEST_EXPONENT, _SMALLEST_SUM = 60.0, 1e-30


def _attend(own: Any, hidden_BTH: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Return what self-attention reads, (B, T, H), in bfloat16 on CPU: half the time of torch's own. `attention_mask` is bool (B, 1, T, T).

    softmax(q k^T) v with v and a column of ones multiplied by exp(q k^T): the column gives the denominators, and rows of zeros in
    both leave padding out. Keys are taken less their mean, which changes no softmax and keeps the exponents small; where they are
    not, torch's attention is asked.
    """
    query_BATD, key_BATD, value_BATD = (
        project(hidden_BTH).unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2) for project in (own.query, own.key, own.value)
    )
    B, A, T, D = query_BATD.shape
    ones_BAT1 = value_BATD.new_ones(1, 1, 1, 1).expand(B, A, T, 1)
    values_BATE = torch.cat((value_BATD, ones_BAT1), dim=-1)
    if attention_mask is not None:
        values_BATE *= attention_mask[:, :, 0, :, None]
    query_GTD, values_GTE = (each.reshape(B * A, T, -1) for each in (query_BATD, values_BATE))
    key_GDT = (key_BATD - key_BATD.mean(dim=2, keepdim=True)).reshape(B * A, T, D).transpose(1, 2)
    block = max(1, _BLOCK // (2 * T * T))
    scores_GTT = query_GTD.new_empty(min(block, B * A), T, T)
    read_GTE = torch.empty_like(values_GTE)
    for start in range(0, B * A, block):
        some = slice(start, start + block)
        into = scores_GTT[: len(query_GTD[some])]
        torch.baddbmm(into, query_GTD[some], key_GDT[some], beta=0, alpha=own.scaling, out=into)
        excess_G = into.flatten(1).amax(dim=1) - _LARGEST_EXPONENT
        if excess_G.max() > 0:
            into -= excess_G.clamp_(min=0)[:, None, None]
        torch.bmm(into.exp_(), values_GTE[some], out=read_GTE[some])
    if read_GTE[..., -1].min() > _SMALLEST_SUM:
        read_BATD = (read_GTE[..., :-1] / read_GTE[..., -1:]).view(B, A, T, D)
    else:
        read_BATD = nn.functional.scaled_dot_product_attention(
            query_BATD, key_BATD, value_BATD, attn_mask=attention_mask, scale=own.scaling
        )
    return read_BATD.transpose(1, 2).flatten(2), None


def pack_for_cpu(model: Any) -> None:
    """Make the linear layers of a model that stays on the CPU, in evaluation mode, `PackedLinear`s. Costs its weights a second time.

    In bfloat16 the attention of BERT and RoBERTa scorers is `_attend`.
    """
    if not torch.backends.mkldnn.is_available():
        return
    if model.config.model_type in _FAMILIES and model.config._attn_implementation == "sdpa" and not model.config.is_decoder:
        for layer in model.base_model.encoder.layer if model.dtype == torch.bfloat16 else ():
            layer.attention.self.forward = MethodType(_attend, layer.attention.self)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
            module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
    if model.config.model_type in _FAMILIES and model.config.hidden_act == "gelu":
        for layer in model.base_model.encoder.layer:
            layer.intermediate.dense.activation = "gelu"
            layer.intermediate.intermediate_act_fn = nn.Identity()
