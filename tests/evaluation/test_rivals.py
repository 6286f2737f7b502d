"""Rivals: their numbers from a given likelihood or embedding, and as methods of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.config import SuiteConfig
from evaluation import rivals
from evaluation.embedding import SentenceEncoder
from evaluation.likelihood import ChoiceLikelihood
from evaluation.rivals import rank_rows
from tests.evaluation.test_likelihood import llm, sampler, separate_sum  # noqa: F401


class Recorded:
    """A likelihood that records its calls, and returns minus the length of a choice and its number of words."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def sums(self, instructions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[np.ndarray]:
        self.calls += zip(instructions, map(list, choices), strict=True)
        return [np.array([[-len(each) for each in texts], [len(each.split()) for each in texts]], float) for texts in choices]


class Axes:
    """Embeddings along one axis for each first letter."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.eye(26)[[ord(each[0]) - ord("a") for each in texts]]


RESPONSES = [["red fox", "a", "red fox", ""], ["blue"]]
INSTRUCTIONS = ["Name an animal", "Name a color"]


def test_gptscore_is_the_mean_log_probability_and_reads_each_distinct_response_once():
    model = Recorded()
    first, second = rank_rows("gptscore", model, INSTRUCTIONS, RESPONSES)
    assert first.tolist() == [-3.5, -1.0, -3.5, -4.5] and second.tolist() == [-4.0]
    assert [texts for _, texts in model.calls] == [["red fox", "a"], ["blue"]]
    assert all(instruction in prompt for (prompt, _), instruction in zip(model.calls, INSTRUCTIONS, strict=True))


def test_flipped_is_the_log_probability_of_the_instruction_after_the_response():
    model = Recorded()
    first, second = rank_rows("flipped", model, INSTRUCTIONS, RESPONSES)
    assert first.tolist() == [-14, -14, -14, -15] and second.tolist() == [-12]
    assert [texts for _, texts in model.calls] == [["Name an animal"], ["Name an animal"], ["Name a color"]]
    assert "red fox" in model.calls[0][0] and "blue" in model.calls[2][0] and "Name" not in model.calls[0][0]


def test_the_judge_compares_yes_and_no_after_instruction_and_response():
    model = Recorded()
    first, _ = rank_rows("judge", model, INSTRUCTIONS, RESPONSES)
    assert first.tolist() == [-1, -1, -1, -2] and [texts for _, texts in model.calls] == [["yes", "no"]] * 3
    assert "Name an animal" in model.calls[0][0] and "red fox" in model.calls[0][0]


def test_embedding_is_the_mean_similarity_to_the_other_draws_and_an_empty_response_is_last():
    found = rank_rows("embedding", Axes(), ["?"] * 3, [["red", "rose", "blue", "red", ""], ["one"], ["", ""]])
    assert found[0] == pytest.approx([2 / 3, 2 / 3, 0, 2 / 3, -1])
    assert found[1].tolist() == [0] and found[2].tolist() == [-1, -1]


def test_the_log_probabilities_of_a_rival_are_those_of_separate_passes(llm: Path):  # noqa: F811
    model = ChoiceLikelihood(sampler(llm), "please")
    (found,) = rank_rows("gptscore", model, ["say after me"], [["red fox", "blue"]])
    prompt = model._encode("Give the right answer to this instruction.\n\nsay after me")
    for answer, value in zip(["red fox", "blue"], found.tolist(), strict=True):
        ids = model._tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert value == pytest.approx(separate_sum(model, prompt, ids) / len(ids), abs=1e-4)
    assert model.tokens > 0


@pytest.mark.slow
def test_sentences_of_one_meaning_are_more_similar_than_others_in_any_batch():
    model = SentenceEncoder(rivals.EMBEDDING_MODEL)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    vectors = model.embed(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1) and model.tokens > 15
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    np.testing.assert_allclose(model.embed(texts[:1])[0], vectors[0], atol=1e-5)


def test_the_setting_has_every_rival():
    (names, _) = get_args(SuiteConfig.model_fields["rivals"].annotation)
    assert get_args(names) == tuple(rivals.RIVALS)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="embedding compares sampled candidates; leave it out"):
        SuiteConfig(kind="choices", rivals=("embedding",))
    with pytest.raises(ValidationError, match="two of them end in scorer, and the report names a scorer by the last part"):
        SuiteConfig(scorers=("a/scorer", "b/scorer/"))
