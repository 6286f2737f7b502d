from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from cluster import artifacts, storage
from cluster.config import Config, ScorerConfig, TrainingConfig
from cluster.errors import CappyError, UsageError
from evaluation.evaluate import load_scorer
from serving.scorer_cache import load_if_changed
from tests.training.conftest import FAMILIES, SMALL, WORDS, write_family
from training import encoder_kernels, train
from training.scorer import Dtype, Scorer, load_tokenizer, longest_input, new_model

INSTRUCTIONS = ["say after me red fox", "please say a dog", "now", "say after me then once again the blue bee", "cow"] * 7
RESPONSES = ["a red fox", "dog", "the owl again please", "blue", ""] * 7


@pytest.fixture
def scorer(encoder: Path) -> Scorer:
    model = new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(), seed=3)
    return Scorer(model, load_tokenizer(encoder, "x", "s"), 64)


def plain_scores(folder: Path, instructions: list[str], responses: list[str]) -> np.ndarray:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        # As lists: transformers drops an empty second string that is not in a list.
        pairs = [tokenizer([one], [two], return_tensors="pt") for one, two in zip(instructions, responses, strict=True)]
        return np.array([model(**pair).logits.item() for pair in pairs])


def test_a_saved_scorer_gives_the_scores_of_plain_transformers_in_input_order(scorer: Scorer, tmp_path: Path):
    scorer.save(tmp_path)
    scores = Scorer.load(str(tmp_path)).score(INSTRUCTIONS, RESPONSES)
    assert scores.dtype == np.float32
    assert scores.std() > 0
    assert np.abs(scores - plain_scores(tmp_path, INSTRUCTIONS, RESPONSES)).max() < 1e-5


@pytest.mark.slow
def test_the_embedded_encoder_gives_the_scores_of_plain_transformers(tmp_path: Path):
    from cluster import models

    folder = models.resolve("minilm-l6", "scorer.encoder")
    model = new_model(folder, ScorerConfig(), TrainingConfig(), seed=3)
    Scorer(model, load_tokenizer(folder, "x", "s"), 512).save(tmp_path)
    assert np.abs(Scorer.load(str(tmp_path)).score(INSTRUCTIONS, RESPONSES) - plain_scores(tmp_path, INSTRUCTIONS, RESPONSES)).max() < 1e-5


def test_a_score_does_not_depend_on_the_other_pairs_of_a_batch(scorer: Scorer):
    together = scorer.score(INSTRUCTIONS, RESPONSES)
    alone = [scorer.score([instruction], [response])[0] for instruction, response in zip(INSTRUCTIONS, RESPONSES, strict=True)]
    assert np.abs(together - alone).max() < 1e-5


def test_best_is_the_highest_score_and_the_first_of_equals(scorer: Scorer):
    candidates = ["a red fox", "dog", "the owl", "a red fox"]
    choice = scorer.best("say after me red fox", candidates)
    assert np.allclose(choice.scores, scorer.score(["say after me red fox"] * 4, candidates))
    assert choice.score == choice.scores.max()
    assert choice.response == candidates[choice.index]
    assert scorer.best("now", ["dog", "dog"]).index == 0


def test_best_of_takes_the_outputs_of_vllm(scorer: Scorer):
    completions = [SimpleNamespace(text=text, token_ids=[1], cumulative_logprob=None) for text in ("Paris", "Rome", "a fox")]
    (choice,) = scorer.best_of([SimpleNamespace(prompt="The capital of France?", outputs=completions)])
    best = scorer.best("The capital of France?", ["Paris", "Rome", "a fox"])
    assert (choice.index, choice.response, choice.score) == (best.index, best.response, best.score)


def test_invalid_arguments_raise_value_errors(scorer: Scorer):
    with pytest.raises(ValueError, match="no candidates"):
        scorer.best("now", [])
    with pytest.raises(ValueError, match="2 instructions and 1 responses"):
        scorer.score(["a", "b"], ["c"])
    assert scorer.score([], []).shape == (0,)


def test_the_same_seed_draws_the_same_head(encoder: Path):
    heads = [new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(), seed).classifier.weight for seed in (3, 3, 4)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("kind", FAMILIES)
def test_frozen_layers_and_embeddings_get_no_gradient(kind: str, tmp_path: Path):
    write_family(kind, tmp_path)
    scorer = ScorerConfig(encoder=str(tmp_path), max_length=16)
    model = new_model(tmp_path, scorer, TrainingConfig(frozen_layers=1, dropout=0.0), seed=3).train()
    model(input_ids=torch.tensor([[5, 6, 7], [5, 7, 6]])).logits.sum().backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert any("embeddings" in name for name in frozen) and any(".0." in name for name in frozen)
    assert not any("embeddings" in name.split(".") or "layer.0." in name or "layers.0." in name for name in trained)
    assert any(".1." in name for name in trained)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}
    with pytest.raises(UsageError, match=r"training.frozen_layers=9 is above the 2 layers"):
        new_model(tmp_path, scorer, TrainingConfig(frozen_layers=9), seed=3)


@pytest.mark.parametrize(("kind", "longest"), list(zip(FAMILIES, (64, 64, 1 << 30, 64), strict=True)))
def test_each_encoder_family_becomes_a_one_logit_regression_model(kind: str, longest: int, tmp_path: Path):
    write_family(kind, tmp_path)
    model = new_model(tmp_path, ScorerConfig(encoder=str(tmp_path), max_length=16), TrainingConfig(attention_dropout=0.25), seed=3)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert 0.25 in (getattr(model.config, "attention_probs_dropout_prob", None), getattr(model.config, "attention_dropout", None))
    assert longest_input(model) == longest
    whole = Scorer(model, load_tokenizer(tmp_path, "x", "s"), 16)
    whole.save(tmp_path / "scorer")
    half = Scorer.load(str(tmp_path / "scorer"), "bfloat16")
    assert half.model.dtype == torch.bfloat16 and whole.model.dtype == torch.float32
    # Enough pairs for several batches, sorted by length and padded.
    scores = whole.score(INSTRUCTIONS * 15, RESPONSES * 15).reshape(15, -1)
    assert np.abs(scores - plain_scores(tmp_path / "scorer", INSTRUCTIONS, RESPONSES)).max() < 1e-5
    assert scores.std() > 0 and np.abs(half.score(INSTRUCTIONS, RESPONSES) - scores[0]).max() < 0.02


def test_a_length_above_the_limit_of_the_encoder_is_refused(encoder: Path):
    with pytest.raises(UsageError, match=r"scorer\.max_length=512 is above the 64 tokens"):
        new_model(encoder, ScorerConfig(max_length=512), TrainingConfig(), seed=3)


def test_only_a_finished_one_label_model_loads_as_scorer(scorer: Scorer, encoder: Path, tmp_path: Path):
    with pytest.raises(CappyError, match="has 2 labels"):
        Scorer.load(str(encoder))
    scorer.save(tmp_path / "scorer")
    storage.write_bytes(str(tmp_path / "scorer/_checkpoints/x"), b"")
    with pytest.raises(CappyError, match="the run writing it did not finish"):
        Scorer.load(str(tmp_path / "scorer"))
    artifacts.publish(str(tmp_path / "scorer"), {"kind": "dataset"})
    with pytest.raises(CappyError, match="holds a dataset, not a scorer"):
        Scorer.load(str(tmp_path / "scorer"))


def test_the_saved_config_disables_the_sigmoid_of_other_libraries(scorer: Scorer, tmp_path: Path):
    scorer.save(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.problem_type == "regression"
    assert config.sentence_transformers == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64


def kernels(model: torch.nn.Module) -> tuple[bool, bool]:
    """Return whether a model uses the kernel of the last layer, and whether it has packed layers."""
    packed = any(isinstance(module, encoder_kernels.PackedLinear) for module in model.modules())
    return encoder_kernels.computes_first_token_only(model), packed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_cpu_kernels_a_scorer_has_the_plain_modules_of_transformers_and_the_same_scores(
    dtype: Dtype, scorer: Scorer, encoder: Path, tmp_path: Path
):
    scorer.save(tmp_path)
    fast, plain = Scorer.load(str(tmp_path), dtype), Scorer.load(str(tmp_path), dtype, cpu_kernels=False)
    assert kernels(fast.model) == (True, True)
    assert {type(module) for module in plain.model.modules()} == {
        type(module) for module in AutoModelForSequenceClassification.from_pretrained(tmp_path).modules()
    }
    assert not any("forward" in vars(module) for module in plain.model.modules())
    scores = [each.score(INSTRUCTIONS, RESPONSES) for each in (fast, plain)]
    assert np.abs(scores[0] - scores[1]).max() < (1e-5 if dtype == "float32" else 0.02)


def test_without_cpu_kernels_a_new_model_has_the_plain_modules_of_transformers(encoder: Path):
    assert kernels(new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(), seed=3)) == (True, False)
    plain = new_model(encoder, ScorerConfig(max_length=64, cpu_kernels=False), TrainingConfig(), seed=3)
    assert not any("forward" in vars(module) for module in plain.modules())


def test_the_setting_reaches_evaluation_and_serving(scorer: Scorer, tmp_path: Path):
    scorer.save(tmp_path)
    config = Config.model_validate({"scorer_path": str(tmp_path), "scorer": {"cpu_kernels": False}})
    assert kernels(load_scorer(config).model) == (False, False)
    assert kernels(load_if_changed(str(tmp_path), "scorer_path", None, "float32", config.scorer).model.model) == (False, False)
    assert kernels(load_if_changed(str(tmp_path), "scorer_path", None, "float32").model.model) == (True, True)


def test_cpu_kernels_may_change_when_a_run_resumes_and_leaves_older_fingerprints_unchanged():
    config, manifest = Config(), {"writer": "w", "files": {}}
    off = Config.model_validate({"scorer": {"cpu_kernels": False}})
    assert train.identity(off, manifest) == train.identity(config, manifest)
    assert train.identity(config, manifest)["scorer"].keys() == {"encoder", "max_length", "dtype"}
    assert config.scorer.model_dump().keys() == {"encoder", "max_length", "dtype"}
    assert off.scorer.model_dump()["cpu_kernels"] is False
    assert Config.model_validate(off.model_dump(mode="json")) == off


DECODERS = {"Llama": {"num_key_value_heads": 2}, "GPT2": {}}


def write_decoder(kind: str, folder: Path, *, pad: str | None, specials: tuple[str, ...] = ("<eos>", "<unk>"), **tokens: str) -> None:
    """Write a tiny random decoder with one label, and a tokenizer that adds no special tokens; `pad` is its pad token."""
    names = [*specials, *(["<pad>"] if pad else []), *WORDS]
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: index for index, word in enumerate(names)}, unk_token=specials[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, pad_token=pad, **tokens)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SMALL, **DECODERS[kind], num_labels=1, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)


@pytest.mark.parametrize("pad", [None, "<pad>"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_scores_a_pair_the_same_alone_and_in_any_batch(kind: str, pad: str | None, tmp_path: Path):
    """Neither config has a pad token; the tokenizer has one or none."""
    write_decoder(kind, tmp_path, pad=pad, eos_token="<eos>", unk_token="<unk>")
    scorer = Scorer.load(str(tmp_path))
    together = scorer.score([*INSTRUCTIONS, ""], [*RESPONSES, ""])
    alone = [scorer.score([one], [two])[0] for one, two in zip([*INSTRUCTIONS, ""], [*RESPONSES, ""], strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.isfinite(together).all() and len(set(together.round(4).tolist())) > 3
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path)(["say a red fox"], ["a red fox"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert scorer.score(["say a red fox"], ["a red fox"])[0] == pytest.approx(plain(input_ids=ids).logits.item(), abs=1e-5)


def test_a_decoder_without_any_special_token_is_refused_at_load(tmp_path: Path):
    write_decoder("Llama", tmp_path, pad=None)
    with pytest.raises(CappyError, match=r"has no pad token; set `pad_token` in its tokenizer_config\.json"):
        Scorer.load(str(tmp_path))


def test_an_empty_pair_has_one_score_in_any_batch(scorer: Scorer):
    together = scorer.score(["", "say after me red fox", ""], ["", "a red fox", "a"])
    assert together[0] == pytest.approx(scorer.score([""], [""])[0], abs=1e-5) and np.isfinite(together).all()


def test_weights_that_give_no_number_are_refused_at_load(scorer: Scorer, tmp_path: Path):
    with torch.no_grad():
        scorer.model.classifier.bias.fill_(float("nan"))
    scorer.save(tmp_path)
    with pytest.raises(CappyError, match="the score of a test pair is not a finite number; the weights are damaged"):
        Scorer.load(str(tmp_path))
