"""Labels: Rouge-L against the references, and the assembly of an instruction's candidates. Pure: no Ray, no files.

Rouge-L is `rouge_score`'s, stemmed, to the last bit (the tests and `benchmarks/` compare them): its tokens are the runs of
`[a-z0-9]` of the lower-cased text, words longer than three letters Porter-stemmed; its F-measure is over the longest common
subsequence of tokens. Only the way there is faster: each distinct word is stemmed once, and rapidfuzz's bit-parallel LCS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

METRIC = {"name": "rouge_l", "mode": "paper", "version": 1, "stemmed": True}
"""What the labels of a set are, for its manifest."""

_WORD = re.compile(r"[a-z0-9]+")
_STEMMER = PorterStemmer()


@lru_cache(maxsize=200_000)
def _stem(word: str) -> str:
    return str(_STEMMER.stem(word)) if len(word) > 3 else word


@lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[str, ...]:
    """Return the stemmed Rouge tokens of a text."""
    return tuple(stem for word in _WORD.findall(text.lower()) if (stem := _stem(word)))


def rouge_l(response: str, references: Sequence[str]) -> float:
    """Return the best Rouge-L F-measure of `response` over `references`, in [0, 1].

    Texts without a Latin letter or digit have no tokens and score 0, as in `rouge_score`.
    """
    return max((_f_measure(tokens(reference), tokens(response)) for reference in references), default=0.0)


def _f_measure(target: tuple[str, ...], prediction: tuple[str, ...]) -> float:
    if not target or not prediction:
        return 0.0
    common = LCSseq.similarity(target, prediction)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(target)
    return 2 * precision * recall / (precision + recall)


def assemble(row: Mapping[str, Any], sampled: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any]]:
    """Return the labelled candidates of one instruction (paper, section 3.1), ordered: references, wrong ones, samples.

    - references: 1.0;
    - for a classification row, each answer choice that is no reference: 0.0 (`choice`);
    - references of other instructions, `row["mismatched"]`, unless they are also right here: 0.0 (`mismatched`);
    - each sampled response: its Rouge-L.

    `row` has `references`, `mismatched` and `answer_choices` (lists of strings; the last may be None). Outer white space
    is stripped everywhere, so that it cannot tell a reference from a sample.
    """
    references = list(dict.fromkeys(text.strip() for text in row["references"]))
    right = {_plain(text) for text in references}
    wrong_choices = [text.strip() for text in row["answer_choices"] or () if _plain(text) not in right]
    mismatched = [text.strip() for text in row["mismatched"] if _plain(text) not in right]
    return [
        *(_given(text, 1.0, "reference") for text in references),
        *(_given(text, 0.0, "choice") for text in dict.fromkeys(wrong_choices)),
        *(_given(text, 0.0, "mismatched") for text in dict.fromkeys(mismatched)),
        *({**candidate, "label": rouge_l(candidate["response"], references), "source": "sampled", "model": model} for candidate in sampled),
    ]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _given(text: str, label: float, source: str) -> dict[str, Any]:
    """A candidate nobody sampled: it has no decoding, tokens or log-probability."""
    return {
        "response": text,
        "label": label,
        "source": source,
        "model": None,
        "decoding": None,
        "tokens": None,
        "finish_reason": None,
        "logprob": None,
    }
