"""The kernels change no score beyond rounding, no gradient, no weight and no saved file."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DebertaV2Config, ModernBertConfig, RobertaConfig, XLMRobertaConfig

from training import encoder_kernels

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "num_labels": 1,
    "problem_type": "regression",
}
FAMILIES = [BertConfig, RobertaConfig, XLMRobertaConfig]
OTHERS = [DebertaV2Config, ModernBertConfig]
LENGTHS = [9, 3, 12, 12]


def model_of(kind: Any) -> Any:
    torch.manual_seed(0)
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind is not ModernBertConfig else {}
    return AutoModelForSequenceClassification.from_config(kind(**SMALL, **plain))


def inputs(padded: bool) -> dict[str, torch.Tensor]:
    lengths = LENGTHS if padded else [12] * 4
    ids = torch.randint(4, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_last_layer_of_one_token_gives_the_scores_and_gradients_of_the_plain_model(kind: Any, padded: bool):
    plain = model_of(kind)
    short = copy.deepcopy(plain)
    encoder_kernels.compute_first_token_only(short)
    seen: list[int] = []
    short.base_model.encoder.layer[-1].register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))
    logits = [model.train()(**inputs(padded)).logits for model in (plain, short)]
    for each in logits:
        each.square().sum().backward()
    assert seen == [1]
    assert torch.allclose(*logits, atol=1e-6)
    for (name, one), two in zip(plain.named_parameters(), short.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-6), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropout_is_active_in_training_only(kind: Any):
    model = AutoModelForSequenceClassification.from_config(kind(**SMALL, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0))
    encoder_kernels.compute_first_token_only(model)
    for module in model.modules():  # the heads of some families have more dropout
        if isinstance(module, torch.nn.Dropout) and module.p != 0.5:
            module.p = 0.0
    model.train()
    assert not torch.equal(model(**inputs(True)).logits, model(**inputs(True)).logits)
    model.eval()
    assert torch.equal(model(**inputs(True)).logits, model(**inputs(True)).logits)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_are_left_unchanged(kind: Any):
    model = model_of(kind).eval()
    before = model(**inputs(True)).logits
    encoder_kernels.compute_first_token_only(model)
    assert torch.equal(model(**inputs(True)).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_packed_layers_give_the_scores_of_the_plain_model(kind: Any, dtype: torch.dtype):
    plain = model_of(kind).eval().to(dtype)
    packed = copy.deepcopy(plain)
    encoder_kernels.pack_for_cpu(packed)
    assert any(isinstance(module, encoder_kernels.PackedLinear) for module in packed.modules())
    with torch.inference_mode():
        scores = [model(**inputs(True)).logits.float() for model in (plain, packed)]
    assert torch.allclose(*scores, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_saved_weights_equal_the_loaded_weights(tmp_path: Path):
    plain = model_of(RobertaConfig).eval()
    fast = copy.deepcopy(plain)
    encoder_kernels.compute_first_token_only(fast)
    encoder_kernels.pack_for_cpu(fast)
    fast.save_pretrained(tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(saved.state_dict()[name], weight) for name, weight in plain.state_dict().items())


def attention_of(kind: Any, scale: float, tokens: int = 12) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the first self-attention of a packed bfloat16 model with queries times `scale`, its inputs, and a padding mask."""
    model = model_of(kind).eval()
    own = model.base_model.encoder.layer[0].attention.self
    with torch.no_grad():
        own.query.weight *= scale
    encoder_kernels.pack_for_cpu(model.bfloat16())
    hidden = torch.randn(4, tokens, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    kept = torch.arange(tokens) < torch.tensor([tokens, 3, tokens - 1, tokens])[:, None]
    return own, hidden, kept[:, None, None].expand(4, 1, tokens, tokens)


def exact(own: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return softmax attention in float64 with the weights of `own`."""
    query, key, value = (
        (hidden.double() @ layer.weight.double().T + layer.bias.double()).unflatten(-1, (4, 8)).transpose(1, 2)
        for layer in (own.query, own.key, own.value)
    )
    scores = (query @ key.transpose(2, 3) * own.scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("kind", FAMILIES)
def test_attention_on_cpu_is_exact_for_exponents_of_any_size(kind: Any, scale: float):
    own, hidden, mask = attention_of(kind, scale)
    with torch.inference_mode():
        read, _ = own(hidden, mask)
        torch_s = torch.nn.functional.scaled_dot_product_attention(
            *(layer(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (own.query, own.key, own.value)), attn_mask=mask
        )
        truth = exact(own, hidden, mask)
    theirs = (torch_s.transpose(1, 2).flatten(2) - truth).abs().mean()
    assert own.forward.__func__ is encoder_kernels._attend
    assert not torch.isnan(read).any()
    assert (read - truth).abs().mean() < 2 * theirs + 1e-3


def test_attention_on_cpu_accepts_additive_masks():
    own, hidden, mask = attention_of(BertConfig, 1.0)
    added = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    with torch.inference_mode():
        assert torch.allclose(own(hidden, added)[0], own(hidden, mask)[0], atol=1e-2)


def test_attention_in_blocks_equals_attention_in_one_block(monkeypatch: pytest.MonkeyPatch):
    own, hidden, mask = attention_of(BertConfig, 1.0)
    with torch.inference_mode():
        whole, _ = own(hidden, mask)
        monkeypatch.setattr(encoder_kernels, "_BLOCK_BYTES", 2 * 12 * 12 * 3)
        blocks, _ = own(hidden, mask)
    assert torch.equal(whole, blocks)


def test_attention_on_cpu_falls_back_to_torch_when_sums_underflow():
    own, hidden, mask = attention_of(BertConfig, 1.0)
    with torch.no_grad():
        own.query.bias.zero_()
        own.key.bias.zero_()
    hidden = hidden.clone()
    hidden[0, 0] *= 300  # the exponents of this token are in the thousands, those of the head's other tokens are small
    with torch.inference_mode():
        read, _ = own(hidden, mask)
        truth = exact(own, hidden, mask)
    assert not torch.isnan(read).any()
    assert (read[0, 1:] - truth[0, 1:]).abs().max() < 0.05 * truth[0, 1:].abs().max()


_MANY_SHAPES = """
import psutil, torch
from transformers import AutoModelForSequenceClassification, BertConfig
from training import encoder_kernels
torch.set_num_threads(1)
config = BertConfig(vocab_size=50, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, num_labels=1)
model = AutoModelForSequenceClassification.from_config(config).eval()
encoder_kernels.pack_for_cpu(model)
for tokens in range(2, 402):
    with torch.inference_mode():
        model(input_ids=torch.ones((1, tokens), dtype=torch.long))
    if tokens in (101, 401):
        print(psutil.Process().memory_info().rss >> 20)
"""


@pytest.mark.slow
def test_batches_of_many_shapes_do_not_fill_the_memory():
    unset = {name: value for name, value in os.environ.items() if name not in encoder_kernels._CACHE_SIZES}
    shown = subprocess.run([sys.executable, "-c", _MANY_SHAPES], env=unset, capture_output=True, text=True, check=True)
    early, late = map(int, shown.stdout.split())
    # With the default limits of oneDNN the growth is about 400 MiB.
    assert late - early < 100
