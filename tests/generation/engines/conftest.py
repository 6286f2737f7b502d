"""Fixtures: folders with a tiny T5 or BART (random weights, word-level tokenizer), and a loopback server with the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tests.generation.engines.openai_server import OpenAIServer, good

WORDS = ["say", "after", "me", "a", "the", "please", "now", "red", "green", "blue", "fox", "cat", "dog", "hen", "owl", "bee"]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
VOCABULARY = len(WORDS) + len(SPECIALS)


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """Save a word-level tokenizer of `words` to a folder."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*SPECIALS, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)


@pytest.fixture(scope="session", params=["t5", "bart"])
def seq2seq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random two-layer encoder-decoder; the BART has the generation config of published checkpoints."""
    folder = tmp_path_factory.mktemp(request.param)
    write_seq2seq(folder, request.param)
    return folder


def write_seq2seq(folder: Path, kind: str) -> None:
    """Save a random model of a kind (`t5` or `bart`) and its tokenizer to a folder."""
    torch.manual_seed(1 if kind == "t5" else 0)  # with other seeds the model repeats one word only
    if kind == "t5":
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "initializer_factor": 2.0}
        tokens = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
        model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **tokens))
        model.lm_head.weight.data.mul_(0.1)
    else:
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128, "init_std": 0.3}
        model = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, forced_eos_token_id=None, **sizes))
        model.generation_config.update(forced_bos_token_id=0, no_repeat_ngram_size=3, num_beams=4)
    model.save_pretrained(folder)
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def running() -> Iterator[OpenAIServer]:
    server = OpenAIServer()
    yield server
    server.close()


@pytest.fixture
def server(running: OpenAIServer) -> OpenAIServer:
    """Return a server that answers every request; a test sets `reply`."""
    running.reset()
    running.reply, running.delay_s = (lambda body, number: good(body)), 0.0
    return running
