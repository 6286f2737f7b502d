"""What is left out of a forward pass changes no score, no gradient, no name of a weight and nothing that is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, DebertaV2Config, ModernBertConfig, RobertaConfig, XLMRobertaConfig

from training import lean

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
def test_a_last_layer_of_one_token_gives_the_plain_scores_and_gradients(kind: Any, padded: bool):
    plain = model_of(kind)
    short = copy.deepcopy(plain)
    lean.read_first_token_only(short)
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
def test_dropout_is_drawn_in_training_alone(kind: Any):
    model = AutoModelForSequenceClassification.from_config(kind(**SMALL, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0))
    lean.read_first_token_only(model)
    for module in model.modules():  # heads of some families have their own
        if isinstance(module, torch.nn.Dropout) and module.p != 0.5:
            module.p = 0.0
    model.train()
    assert not torch.equal(model(**inputs(True)).logits, model(**inputs(True)).logits)
    model.eval()
    assert torch.equal(model(**inputs(True)).logits, model(**inputs(True)).logits)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_stay_as_they_are(kind: Any):
    model = model_of(kind).eval()
    before = model(**inputs(True)).logits
    lean.read_first_token_only(model)
    assert torch.equal(model(**inputs(True)).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_packed_layers_give_the_plain_scores(kind: Any, dtype: torch.dtype):
    plain = model_of(kind).eval().to(dtype)
    packed = copy.deepcopy(plain)
    lean.pack_for_cpu(packed)
    assert any(isinstance(module, lean.PackedLinear) for module in packed.modules())
    with torch.inference_mode():
        scores = [model(**inputs(True)).logits.float() for model in (plain, packed)]
    assert torch.allclose(*scores, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_what_is_saved_is_what_was_loaded(tmp_path: Path):
    plain = model_of(RobertaConfig).eval()
    lean_one = copy.deepcopy(plain)
    lean.read_first_token_only(lean_one)
    lean.pack_for_cpu(lean_one)
    lean_one.save_pretrained(tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(saved.state_dict()[name], weight) for name, weight in plain.state_dict().items())
