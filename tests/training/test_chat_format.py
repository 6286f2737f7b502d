"""Scorers that read a pair as a chat: tiny random decoders in the layout of public reward models, compared with plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import ScorerConfig, TrainingConfig
from cluster.errors import CappyError, UsageError
from tests.training.conftest import publish, settings
from training import adapt, train
from training.encoding import encode_pairs
from training.scorer import Scorer, load_tokenizer, new_model

INSTRUCTIONS = ["Say after me: red fox", "  Which animal barks?\n", "", "now " * 9, "Say <|im_end|> or {{ x }} after me"] * 3
RESPONSES = ["a red fox", "dog", "the owl again, please", "", " <b>ä</b> 狐 "] * 3

CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3's: a start token, and texts without the white space around them.
TRIMMED = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}<|im_sep|>\n\n{{ message['content'] | trim }}"
    "<|im_end|>{% endfor %}"
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "Llama": {"num_key_value_heads": 2},
}


def write_tokenizer(folder: Path, template: str | None, pad: str | None = "<|endoftext|>", end: str = "<|im_end|>", **names: str) -> None:
    """Write a byte-level tokenizer without a token at the start or the end of a text; `pad` and `end` are its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|begin|>", "<|unused|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["say after me red fox", "the owl again please"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, pad_token=pad, eos_token=end, bos_token="<|begin|>", **names
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def write_reward_model(kind: str, folder: Path, template: str | None = CHAT_ML, head: bool = True, **tokens: Any) -> Path:
    """Write a tiny random decoder with one label, or without a head, and its tokenizer."""
    write_tokenizer(folder, template, **tokens)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128,
        num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=None, **LAYOUTS[kind],
    )  # fmt: skip
    suffix = "ForSequenceClassification" if head else "ForCausalLM"
    model = getattr(transformers, kind + suffix)(config)
    model.save_pretrained(folder)
    return folder


def plain_scores(folder: Path, instructions: list[str], responses: list[str]) -> np.ndarray:
    """Return the scores as the card of a public reward model computes them: one chat at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for instruction, response in zip(instructions, responses, strict=True):
        chat = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
        with torch.no_grad():
            scores.append(model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits.item())
    return np.array(scores)


@pytest.mark.parametrize("template", [CHAT_ML, TRIMMED])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_public_reward_model_has_the_scores_of_plain_transformers(kind: str, template: str, tmp_path: Path):
    scorer = Scorer.load(str(write_reward_model(kind, tmp_path, template)))
    scores = scorer.score(INSTRUCTIONS, RESPONSES)
    assert scorer.format == "chat" and scores.std() > 0
    assert np.abs(scores - plain_scores(tmp_path, INSTRUCTIONS, RESPONSES)).max() < 1e-5
    alone = [scorer.score([one], [two])[0] for one, two in zip(INSTRUCTIONS[:5], RESPONSES[:5], strict=True)]
    np.testing.assert_allclose(scores[:5], alone, atol=1e-5)


def test_the_format_of_a_setting_replaces_the_automatic_one(tmp_path: Path):
    write_reward_model("Qwen3", tmp_path)
    chat, pair = Scorer.load(str(tmp_path)), Scorer.load(str(tmp_path), format="pair")
    assert (chat.format, pair.format) == ("chat", "pair")
    ids = AutoTokenizer.from_pretrained(tmp_path)(["say"], ["fox"])["input_ids"][0]
    assert pair.encode(["say"], ["fox"]).tokens.tolist() == ids
    assert abs(chat.score(["say"], ["fox"])[0] - pair.score(["say"], ["fox"])[0]) > 1e-6


def test_a_decoder_without_chat_template_reads_pairs_and_refuses_chats(tmp_path: Path):
    write_reward_model("Llama", tmp_path, template=None)
    assert Scorer.load(str(tmp_path)).format == "pair"
    with pytest.raises(UsageError, match=r"scorer\.format=chat: the tokenizer has no chat template; use pair"):
        Scorer.load(str(tmp_path), format="chat")


def test_an_encoder_with_a_chat_template_reads_pairs(encoder: Path, tmp_path: Path):
    tokenizer = load_tokenizer(encoder, "x", "s")
    tokenizer.chat_template = CHAT_ML
    Scorer(new_model(encoder, ScorerConfig(max_length=64), TrainingConfig(), seed=3), tokenizer, 64).save(tmp_path)
    assert Scorer.load(str(tmp_path)).format == "pair"


@pytest.mark.parametrize("template", [CHAT_ML, TRIMMED])
@pytest.mark.parametrize(("instruction", "response"), [("x" * 500 + "END", "y" * 20), ("START" + "x" * 60, "y" * 600), ("", "y" * 600)])
def test_a_long_chat_keeps_its_template_and_loses_first_the_middle_of_its_instruction(
    template: str, instruction: str, response: str, tmp_path: Path
):
    write_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path, "x", "s")
    encoded = encode_pairs(tokenizer, [instruction], [response], 64, chat=True)
    text = tokenizer.decode(encoded.tokens)
    empty = encode_pairs(tokenizer, [""], [""], 64, chat=True).tokens.tolist()
    assert len(encoded.tokens) == 64 and [token for token in encoded.tokens.tolist() if token in empty] == empty
    if "END" in instruction:
        assert (encoded.cut_pairs, encoded.cut_responses) == (1, 0)
        assert "xEND<|im_end|>" in text and f"{response}<|im_end|>" in text
    else:
        assert (encoded.cut_pairs, encoded.cut_responses) == (1, 1)
        assert "START" not in text and "yyy<|im_end|>" in text


def test_a_short_text_is_not_found_in_the_words_of_the_template(tmp_path: Path):
    """Otherwise words of the template would be cut instead of the text."""
    template = "Rate the answer to a question of a user. " + CHAT_ML + " The rating of the answer is y"
    write_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path, "x", "s")
    for instruction, response in (("a", "z" * 600), ("x" * 600, "y")):
        text = tokenizer.decode(encode_pairs(tokenizer, [instruction], [response], 120, chat=True).tokens)
        assert text.startswith("Rate the answer to a question of a user. <|im_start|>user")
        assert text.endswith("The rating of the answer is y")


def test_a_template_that_changes_the_texts_is_cut_to_the_limit(tmp_path: Path):
    write_tokenizer(tmp_path, CHAT_ML.replace("message['content']", "message['content'] | upper"))
    encoded = encode_pairs(load_tokenizer(tmp_path, "x", "s"), ["abc" * 100, "a"], ["def" * 50, "b"], 64, chat=True)
    assert encoded.lengths.tolist()[0] == 64 and encoded.lengths.tolist()[1] < 64


def test_a_template_that_refuses_a_pair_is_an_error_at_load(tmp_path: Path):
    write_reward_model("Qwen3", tmp_path, "{{ raise_exception('a system turn is needed') }}")
    with pytest.raises(CappyError, match=r"the model cannot score a pair \(a system turn is needed\)"):
        Scorer.load(str(tmp_path))


def test_a_token_of_the_template_is_never_the_pad_token(tmp_path: Path):
    """The end token ends each turn, so the score would be read before it."""
    write_reward_model("Qwen3", tmp_path, pad=None, unk_token="<|unused|>")
    scorer = Scorer.load(str(tmp_path))
    assert scorer.tokenizer.pad_token == "<|unused|>"
    assert np.abs(scorer.score(INSTRUCTIONS, RESPONSES) - plain_scores(tmp_path, INSTRUCTIONS, RESPONSES)).max() < 1e-5
    write_tokenizer(tmp_path, CHAT_ML, pad=None)
    with pytest.raises(CappyError, match="has no pad token"):
        Scorer.load(str(tmp_path))


def test_a_saved_scorer_keeps_its_format_and_one_of_an_earlier_version_reads_pairs(tmp_path: Path):
    base = write_reward_model("Qwen3", tmp_path / "base", head=False)
    for name, wanted in (("chat", "auto"), ("pair", "pair")):
        scorer = Scorer(
            new_model(base, ScorerConfig(max_length=64), TrainingConfig(), seed=3), load_tokenizer(base, "x", "s"), 64, format=wanted
        )
        scorer.save(tmp_path / name)
        assert (Scorer.load(str(tmp_path / name)).format, Scorer.load(str(tmp_path / name), format="chat").format) == (name, name)
    again = new_model(tmp_path / "pair", ScorerConfig(max_length=64), TrainingConfig(), seed=3)
    assert Scorer(again, load_tokenizer(base, "x", "s"), 64).format == "pair"
    earlier = transformers.AutoConfig.from_pretrained(tmp_path / "chat")
    earlier.cappy = {"blend": None}
    earlier.save_pretrained(tmp_path / "chat")
    assert Scorer.load(str(tmp_path / "chat")).format == "pair"


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_decoder_is_trained_and_adapted_as_a_chat_scorer(kind: str, tmp_path: Path, ray_here: None):
    base = write_reward_model(kind, tmp_path / "base", head=False)
    publish(str(tmp_path / "run" / "dataset"), 40, 12)
    config = settings(str(tmp_path / "run"), base, epochs=2, learning_rate=1e-3, batch_size=8)
    config = config.model_copy(update={"scorer": config.scorer.model_copy(update={"max_length": 96})})
    summary = train.run_train(config)
    scorer = Scorer.load(summary["uri"])
    assert scorer.format == "chat" and scorer.max_length == 96 and np.isfinite(summary["validation"]["mse"])
    scores = scorer.score(["say after me red fox"], ["a red fox"])
    assert scores == pytest.approx(plain_scores(Path(summary["uri"]), ["say after me red fox"], ["a red fox"]), abs=1e-5)
    adapted = config.model_copy(update={"adapt": config.adapt.model_copy(update={"base": summary["uri"], "pairs": 32, "gate": False})})
    (task,) = adapt.run_adapt(adapted)["tasks"]
    assert Scorer.load(task["uri"]).format == "chat"
