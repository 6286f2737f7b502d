from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cluster import artifacts, models, storage
from cluster.config import LoraConfig, ScorerConfig, TrainingConfig
from cluster.errors import CappyError, UsageError
from training import lora
from training.scorer import Scorer, load_tokenizer, new_model

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "Bert": {"max_position_embeddings": 64},
    "Roberta": {"max_position_embeddings": 66, "pad_token_id": 1},
    "DebertaV2": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
    "ModernBert": {"max_position_embeddings": 64, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
}
INSTRUCTIONS = ["say after me red fox", "say green cat please", "now then once", "a blue owl"]
RESPONSES = ["a red fox", "the hen", "once again", ""]


def published_base(kind: str, encoder: Path, folder: Path) -> str:
    """Publish a scorer of a family with random weights and return its folder."""
    config = getattr(transformers, f"{kind}Config")(**SMALL, **FAMILIES[kind])
    torch.manual_seed(1)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder / "encoder")
    load_tokenizer(encoder, "x", "s").save_pretrained(folder / "encoder")
    tokenizer = load_tokenizer(folder / "encoder", "x", "s")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = new_model(folder / "encoder", ScorerConfig(max_length=48), TrainingConfig(), seed=3)
    Scorer(model, tokenizer, 48).save(folder / "base")
    artifacts.publish(str(folder / "base"), {"kind": "scorer", "files": {}})
    return str(folder / "base")


def adapted(base: str, folder: Path) -> np.ndarray:
    """Save adapters with weights far from zero. Return the scores of the model before the adapters are merged."""
    model = new_model(Path(base), ScorerConfig(encoder=base, max_length=48), TrainingConfig(), seed=3)
    wrapped = lora.add_adapters(model, LoraConfig(rank=4), seed=5)
    torch.manual_seed(6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    scores = Scorer(model, load_tokenizer(Path(base), "x", "s"), 48).score(INSTRUCTIONS, RESPONSES)
    lora.save_adapters(wrapped, {"uri": base, "sha256": lora.weights_sha256(Path(base)), "writer": "w"}, folder)
    return scores


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_of_adapters_loads_as_the_adapted_scorer(kind: str, encoder: Path, tmp_path: Path):
    base = published_base(kind, encoder, tmp_path)
    scores = adapted(base, tmp_path / "adapter")
    before = Scorer.load(base)
    loaded = Scorer.load(str(tmp_path / "adapter"))
    assert np.abs(scores - before.score(INSTRUCTIONS, RESPONSES)).max() > 0.1
    assert np.abs(loaded.score(INSTRUCTIONS, RESPONSES) - scores).max() < 1e-5
    half = Scorer.load(str(tmp_path / "adapter"), "bfloat16")
    assert half.model.dtype == torch.bfloat16 and np.abs(half.score(INSTRUCTIONS, RESPONSES) - scores).max() < 0.05
    assert loaded.max_length == before.max_length == 48
    assert type(loaded.model) is type(before.model) and not any("lora" in name for name, _ in loaded.model.named_parameters())
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 0.5 * (Path(base) / "model.safetensors").stat().st_size


def test_only_adapters_and_head_are_trainable_and_their_weights_depend_on_the_seed_only(encoder: Path):
    model = new_model(encoder, ScorerConfig(max_length=48), TrainingConfig(), seed=3)
    lora.add_adapters(model, LoraConfig(), seed=5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "classifier" in name for name in trained)
    assert any("attention.self.query" in name for name in trained) and any("intermediate.dense" in name for name in trained)
    again = new_model(encoder, ScorerConfig(max_length=48), TrainingConfig(), seed=3)
    lora.add_adapters(again, LoraConfig(), seed=5)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_adapters_are_added_to_the_target_layers_and_an_unknown_target_is_refused(encoder: Path):
    model = new_model(encoder, ScorerConfig(max_length=48), TrainingConfig(), seed=3)
    lora.add_adapters(model, LoraConfig(targets=("query", "value")), seed=5)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_" in name} == {"query", "value"}
    plain = new_model(encoder, ScorerConfig(max_length=48), TrainingConfig(), seed=3)
    with pytest.raises(UsageError, match=r"adapt\.lora\.targets=\['Wqkv'\]: the base has no such layers; choose among dense, key"):
        lora.add_adapters(plain, LoraConfig(targets=("Wqkv",)), seed=5)


def test_adapters_are_refused_with_another_base(encoder: Path, tmp_path: Path):
    base = published_base("Bert", encoder, tmp_path)
    adapted(base, tmp_path / "adapter")
    with pytest.raises(CappyError, match=r"adapt\.base=.* holds adapters to a model, not a model"):
        models.resolve(str(tmp_path / "adapter"), "adapt.base")
    (tmp_path / "pickled").mkdir()
    for name, content in (("adapter_config.json", None), ("base.json", None), ("adapter_model.bin", b"a pickle"), ("x.safetensors", b"")):
        (tmp_path / "pickled" / name).write_bytes((tmp_path / "adapter" / name).read_bytes() if content is None else content)
    with pytest.raises(CappyError, match=r"has no adapter_model\.safetensors"):
        Scorer.load(str(tmp_path / "pickled"))
    weights = Path(base, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\1\1\1")
    with pytest.raises(CappyError, match=r"the weights of its base .*/base have changed since; run `cappy adapt` again"):
        Scorer.load(str(tmp_path / "adapter"))
    storage.delete(base)
    with pytest.raises(UsageError, match=r"base of scorer_path=.*/adapter=.*/base: no such folder"):
        Scorer.load(str(tmp_path / "adapter"))
