"""Methods of other papers that rank responses with a frozen model: the LLM itself, or an encoder of sentences. No Ray, no files.

`suite.rivals` names them. A rival takes the instructions of some rows and the responses of each, and returns a number for each response;
the highest is the best. To add one, write such a function, and add it to `RIVALS` and to the names of `suite.rivals`.

Shapes: C responses of a row, H size of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Responses = Sequence[Sequence[str]]
"""The responses of each row."""
EMBEDDING_MODEL = "minilm-l6"
"""The sentence encoder of `embedding`: all-MiniLM-L6-v2."""


class Likelihood(Protocol):
    """A causal LLM: `evaluation.likelihood.ChoiceLikelihood` or another."""

    def sums(self, instructions: Sequence[str], choices: Responses) -> list[Floats]:
        """Return two numbers for each choice of each instruction, (2, C): the sum of its log-probabilities in nats, and its tokens."""
        ...


class Embedder(Protocol):
    """An encoder of sentences: `evaluation.embedding.SentenceEncoder` or another."""

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return the embeddings of texts, (texts, H), each of length 1."""
        ...


@dataclass(frozen=True)
class Rival:
    """A method of another paper."""

    title: str
    """Name for reports."""
    model: Literal["llm", "embedder"]
    """The kind of its first argument."""
    rank: Callable[[Any, Sequence[str], Responses], list[Floats]]


def gptscore(llm: Likelihood, instructions: Sequence[str], responses: Responses) -> list[Floats]:
    """Return the mean log-probability of a response after a request for a right answer (GPTScore, Fu et al. 2023, arXiv 2302.04166)."""
    prompts = [f"Give the right answer to this instruction.\n\n{instruction}" for instruction in instructions]
    return [sums_C / np.maximum(tokens_C, 1) for sums_C, tokens_C in llm.sums(prompts, responses)]


def flipped(llm: Likelihood, instructions: Sequence[str], responses: Responses) -> list[Floats]:
    """Return the log-probability of the instruction after a response, in nats (Flipped, Ye et al. 2022, arXiv 2210.02969)."""
    prompts = [f"Answer: {response}\n\nWrite the question or the instruction of this answer." for response in chain(*responses)]
    texts = [[instruction] for instruction, each in zip(instructions, responses, strict=True) for _ in each]
    return _split((float(found[0, 0]) for found in llm.sums(prompts, texts)), responses)


def judge(llm: Likelihood, instructions: Sequence[str], responses: Responses) -> list[Floats]:
    """Return log p(yes) - log p(no) for the question whether a response is right: the LLM judges its own responses.

    Kadavath et al. 2022, arXiv 2207.05221, call p(yes) "P(True)".
    """
    pairs = [(instruction, each) for instruction, texts in zip(instructions, responses, strict=True) for each in texts]
    prompts = [f"{instruction}\n\nProposed answer: {each}\n\nIs the proposed answer right, yes or no?" for instruction, each in pairs]
    found = llm.sums(prompts, [["yes", "no"]] * len(prompts))
    return _split((float(sums_C[0] - sums_C[1]) for sums_C, _ in found), responses)


def embedding(embedder: Embedder, instructions: Sequence[str], responses: Responses) -> list[Floats]:
    """Return the mean cosine similarity of a response to the other responses of its row, in [-1, 1]; 0 for a single response.

    Minimum Bayes risk decoding (Eikema and Aziz 2020, arXiv 2005.10283) with the similarity of embeddings as its utility. Give repeats of a
    response as often as they were drawn.
    """
    known = list(dict.fromkeys(chain(*responses)))
    vectors = dict(zip(known, embedder.embed(known), strict=True))
    found = []
    for texts in responses:
        vectors_CH = np.stack([vectors[text] for text in texts]) if texts else np.zeros((0, 1))
        similarity_CC = vectors_CH @ vectors_CH.T
        others_C = similarity_CC.sum(axis=1) - np.diag(similarity_CC)
        found.append(others_C / max(len(texts) - 1, 1))
    return found


RIVALS: dict[str, Rival] = {
    "gptscore": Rival("GPTScore", "llm", gptscore),
    "flipped": Rival("Flipped", "llm", flipped),
    "judge": Rival("LLM as judge", "llm", judge),
    "embedding": Rival("MBR, embeddings", "embedder", embedding),
}
"""The rivals by name. Those of an LLM do not depend on the other responses, and are computed once for each distinct response."""


def rank_rows(name: str, model: Any, instructions: Sequence[str], responses: Responses) -> list[Floats]:
    """Return the numbers of the responses of each row by a rival, (C,), repeats included.

    The model does not read empty responses. Their number is the lowest one of the row, less 1, so that they are never the best.
    """
    rival = RIVALS[name]
    if rival.model == "embedder":
        given: Responses = [[text for text in texts if text] for texts in responses]
    else:
        given = [list(dict.fromkeys(text for text in texts if text)) for texts in responses]
    found = rival.rank(model, instructions, given)
    known = [dict(zip(texts, numbers.tolist(), strict=True)) for texts, numbers in zip(given, found, strict=True)]
    return [_expand(texts, numbers) for texts, numbers in zip(responses, known, strict=True)]


def _expand(texts: Sequence[str], numbers: dict[str, float]) -> Floats:
    lowest = min(numbers.values(), default=0.0) - 1.0
    return np.array([numbers.get(text, lowest) for text in texts], np.float64)


def _split(values: Iterator[float], responses: Responses) -> list[Floats]:
    """Return the values of all responses by row."""
    return [np.array([next(values) for _ in texts], np.float64) for texts in responses]
