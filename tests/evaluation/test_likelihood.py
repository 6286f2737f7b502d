"""The likelihood of choices: equal to that of separate forward passes, in any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.config import SamplerConfig
from cluster.errors import UsageError
from evaluation.likelihood import ChoiceLikelihood
from tests.training.conftest import WORDS, write_tokenizer


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random two-layer Llama and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 5, initializer_range=0.5, **size)).save_pretrained(folder)
    write_tokenizer(folder, typed=False)
    return folder


def sampler(llm: Path, **engine: object) -> SamplerConfig:
    return SamplerConfig.model_validate({"model": str(llm), "prompt": {"form": "raw"}, "engine": {"dtype": "float32", **engine}})


def separate_sum(likelihood: ChoiceLikelihood, prompt: list[int], answer: list[int]) -> float:
    """Return the log-probability of one answer from a plain forward pass."""
    with torch.inference_mode():
        logprobs = likelihood._model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + index, token].item() for index, token in enumerate(answer))


def test_choices_in_one_pass_have_the_log_probabilities_of_separate_passes(llm: Path):
    likelihood = ChoiceLikelihood(sampler(llm), "please")
    assert likelihood._packed
    instructions = ["say after me red fox", "say blue", "a green cat and then a black dog please"]
    choices = [["red fox", "blue"], ["blue", "green cat now", "me"], ["dog", "cat"]]
    found = likelihood.score(instructions, choices)
    for instruction, answers, numbers in zip(instructions, choices, found, strict=True):
        assert numbers.shape == (3, len(answers))
        for column, answer in enumerate(answers):
            ids = likelihood._tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert numbers[0, column] == pytest.approx(separate_sum(likelihood, likelihood._encode(instruction), ids), abs=1e-4)
            assert numbers[1, column] == len(ids)
            neutral = list(likelihood._tokenizer("please\n")["input_ids"])
            assert numbers[2, column] == pytest.approx(separate_sum(likelihood, neutral, ids), abs=1e-4)
    # A model without shared prompts gives the same numbers.
    likelihood._packed = False
    for one, other in zip(found, likelihood.score(instructions, choices), strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-4)


def test_a_prompt_that_is_too_long_loses_its_start(llm: Path):
    likelihood = ChoiceLikelihood(sampler(llm, max_model_len=100), "please")
    long = "say after me " * 40 + "red fox"
    cut = likelihood._encode(long)[-(100 - 1) :]
    (found,) = likelihood.score([long], [["fox"]])
    ids = likelihood._tokenizer("fox", add_special_tokens=False)["input_ids"]
    assert found[0, 0] == pytest.approx(separate_sum(likelihood, cut, ids), abs=1e-4)


def test_an_endpoint_is_refused_with_the_fix(llm: Path):
    config = SamplerConfig.model_validate({"model": "x", "engine": {"kind": "endpoint", "base_url": "http://127.0.0.1:1/v1"}})
    with pytest.raises(UsageError, match=r"suite\.likelihood=false"):
        ChoiceLikelihood(config, "Answer:")
