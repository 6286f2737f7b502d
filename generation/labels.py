"""Labels of responses against references, and the assembly of an instruction's candidates. Pure: no Ray, no files.

A metric takes two Arrow columns (`TEXTS`), the responses and the references of each instruction, and returns for every
response its best value over the references of its instruction, in [0, 1]; without words or characters to compare, 0.

- `rouge_l` is `rouge_score`'s, stemmed, to the last bit in `paper` mode (the tests and `benchmarks/` compare them): the
  F-measure over the longest common subsequence of words. `generation.word_tokenizer` says what a word is, in both modes.
- `token_f1` is SQuAD's: the F-measure over the words in common in any order; not stemmed, articles count.
- `chrf` is sacrebleu's chrF2: the F-measure over character 1- to 6-grams, recall weighing twice as much; case counts.
- `exact_match` is 1 where the texts are equal but for white space and case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.config import LabelConfig, fingerprint
from generation.dataset import LABEL_BINS
from generation.word_tokenizer import Mode, compiled, vocabulary

TEXTS = pa.list_(pa.string())
"""Type of the columns a metric takes: the texts of each instruction, nowhere null."""

# Bytes of text labelled at once: enough that calls into compiled code cost little, few enough for the caches.
_BLOCK = 1 << 18
_CHRF_ORDER = 6
_CHRF_BETA = 2


def rouge_l(response: str, references: Sequence[str], mode: Mode = "paper") -> float:
    """Return the best Rouge-L F-measure of one response over its references; for many, `rouge_l_batch` is far faster.

    In `paper` mode texts without a Latin letter or digit have no words and score 0, as in `rouge_score`.
    """
    return float(rouge_l_batch(pa.array([[response]], TEXTS), pa.array([references], TEXTS), mode)[0])


def rouge_l_batch(responses: pa.ListArray, references: pa.ListArray, mode: Mode = "paper") -> np.ndarray:
    """Return the Rouge-L F-measure of every response (float64), in order."""
    return _word_f_measures(responses, references, mode, ordered=True)


def token_f1(responses: pa.ListArray, references: pa.ListArray, mode: Mode = "paper") -> np.ndarray:
    """Return the F-measure of every response over the words it shares with a reference (float64), in order."""
    return _word_f_measures(responses, references, mode, ordered=False)


def chrf(responses: pa.ListArray, references: pa.ListArray) -> np.ndarray:
    """Return the chrF2 of every response (float64), in order."""
    values = []
    for said, right in zip(responses.to_pylist(), references.to_pylist(), strict=True):
        targets = [_ngrams(text) for text in right]
        values += [max((_chrf_score(_ngrams(text), target) for target in targets), default=0.0) for text in said]
    return np.array(values, np.float64)


def exact_match(responses: pa.ListArray, references: pa.ListArray) -> np.ndarray:
    """Return 1.0 for every response that equals a reference but for white space and case, else 0.0, in order."""
    values = []
    for said, right in zip(responses.to_pylist(), references.to_pylist(), strict=True):
        known = {_normalize(text) for text in right} - {""}
        values += [_normalize(text) in known for text in said]
    return np.array(values, np.float64)


@dataclass(frozen=True)
class Metric:
    """A way to label. `version` is raised whenever a label may come out different."""

    labels: Callable[..., np.ndarray]
    version: int
    by_words: bool
    """Whether it compares words, so that it has modes."""


METRICS = {
    "rouge_l": Metric(rouge_l_batch, version=1, by_words=True),
    "token_f1": Metric(token_f1, version=1, by_words=True),
    "chrf": Metric(chrf, version=1, by_words=False),
    "exact_match": Metric(exact_match, version=1, by_words=False),
}


def describe_metric(config: LabelConfig) -> dict[str, Any]:
    """What the labels of a set are, for its manifest; `mode` is null where the metric has none."""
    metric = METRICS[config.metric]
    return {"name": config.metric, "mode": config.mode if metric.by_words else None, "version": metric.version}


def compute_labels(responses: pa.ListArray, references: pa.ListArray, config: LabelConfig) -> np.ndarray:
    """Return the label of every response (float64, in [0, 1]), in order, by the metric a config names."""
    metric = METRICS[config.metric]
    return metric.labels(responses, references, config.mode) if metric.by_words else metric.labels(responses, references)


def warm_up(config: LabelConfig) -> None:
    """Load the code a metric is compiled to, which takes a second, before its first labels are wanted."""
    text = pa.array([["a"]], TEXTS)
    compute_labels(text, text, config)


def assemble_candidates(rows: Sequence[Mapping[str, Any]], config: LabelConfig, model: str) -> list[list[dict[str, Any]]]:
    """Return the labelled candidates of each instruction (paper, section 3.1), ordered: references, wrong ones, samples.

    - references: 1.0;
    - for a classification row, each answer choice that is no reference: 0.0 (`choice`);
    - references of other instructions, `row["mismatched"]`, unless they are also right here: 0.0 (`mismatched`);
    - each response of `row["sampled"]`, whose fields (`sampler.SAMPLED`) it keeps: its label by `config`.

    `row` has `references`, `mismatched` and `answer_choices` (lists of strings; the last may be None). Outer white space
    is stripped, here and from samples by the engine, so that it cannot tell a reference from a sample.
    """
    sampled = pa.array([[candidate["response"] for candidate in row["sampled"]] for row in rows], TEXTS)
    values = iter(compute_labels(sampled, pa.array([row["references"] for row in rows], TEXTS), config).tolist())
    return [
        [
            *_unsampled_candidates(row),
            *({**candidate, "label": next(values), "source": "sampled", "model": model} for candidate in row["sampled"]),
        ]
        for row in rows
    ]


def limit_per_bin(candidates: Sequence[dict[str, Any]], most: int, seed: int, row_id: str) -> list[dict[str, Any]]:
    """Return an instruction's candidates, in order, with at most `most` different samples in each of `LABEL_BINS` bins of the label.

    Which of a bin's samples stay is a function of (seed, row id); of samples alike the first stays. References, choices and
    mismatched ones all do. Raises `KeyError` for candidates without a label.
    """
    bins: dict[int, dict[str, int]] = {}
    for place, each in enumerate(candidates):
        if each["source"] == "sampled":
            bins.setdefault(min(int(each["label"] * LABEL_BINS), LABEL_BINS - 1), {}).setdefault(each["response"], place)
    kept = {
        place
        for places in bins.values()
        for _, place in sorted(places.items(), key=lambda found: fingerprint(seed, row_id, found[0]))[:most]
    }
    return [each for place, each in enumerate(candidates) if each["source"] != "sampled" or place in kept]


def _unsampled_candidates(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The candidates of an instruction that nobody sampled: they have no decoding, tokens or log-probability."""
    right = {_normalize(text) for text in row["references"]}
    texts = {
        "reference": (1.0, row["references"]),
        "choice": (0.0, [text for text in row["answer_choices"] or () if _normalize(text) not in right]),
        "mismatched": (0.0, [text for text in row["mismatched"] if _normalize(text) not in right]),
    }
    unknown = dict.fromkeys(("model", "decoding", "tokens", "finish_reason", "logprob"))
    return [
        {"response": text, "label": label, "source": source, **unknown}
        for source, (label, given) in texts.items()
        for text in dict.fromkeys(text.strip() for text in given)
    ]


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold()


def _ngrams(text: str) -> list[Counter[str]]:
    """The counts of a text's character n-grams without white space, from 1 to `_CHRF_ORDER`."""
    letters = "".join(text.split())
    return [Counter(letters[at : at + n] for at in range(len(letters) - n + 1)) for n in range(1, _CHRF_ORDER + 1)]


def _chrf_score(said: Sequence[Counter[str]], right: Sequence[Counter[str]]) -> float:
    """The F-measure of precision and recall averaged over the orders both texts have n-grams of."""
    both = [(one, other) for one, other in zip(said, right, strict=True) if one and other]
    common = [(one & other).total() for one, other in both]
    if not any(common):
        return 0.0
    precision = sum(count / one.total() for count, (one, _) in zip(common, both, strict=True)) / len(both)
    recall = sum(count / other.total() for count, (_, other) in zip(common, both, strict=True)) / len(both)
    weight = _CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall)


def _word_f_measures(responses: pa.ListArray, references: pa.ListArray, mode: Mode, *, ordered: bool) -> np.ndarray:
    """The F-measure of every response with its best reference over the words in common, in the same order or in any."""
    words = vocabulary(mode, stemmed=ordered)
    said, said_at = _flatten(responses)
    right, right_at = _flatten(references)
    # Cut after the instruction with which each further `_BLOCK` bytes of text are full.
    blocks = (_bytes_before(said)[said_at] + _bytes_before(right)[right_at]) // _BLOCK
    cuts = [0, *np.flatnonzero(np.diff(blocks[1:])) + 1, len(responses)]
    values = [np.empty(0)]
    for begin, end in pairwise(cuts):
        responses_at = said_at[begin : end + 1] - said_at[begin]
        references_at = right_at[begin : end + 1] - right_at[begin] + responses_at[-1]
        texts = pa.concat_arrays([said[said_at[begin] : said_at[end]], right[right_at[begin] : right_at[end]]])
        values.append(_f_measures(*words.split(texts), responses_at, references_at, ordered))
    return np.concatenate(values)


def _flatten(lists: pa.ListArray) -> tuple[pa.StringArray, np.ndarray]:
    """Return the texts of all instructions, end to end, and where each instruction's begin (and the last end)."""
    at = lists.offsets.to_numpy()
    return lists.flatten(), at - at[0]


def _bytes_before(texts: pa.StringArray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), pc.binary_length(texts).to_numpy().cumsum(dtype=np.int64)])


@compiled
def _f_measures(
    words: np.ndarray, begins: np.ndarray, ends: np.ndarray, said_at: np.ndarray, right_at: np.ndarray, ordered: bool
) -> np.ndarray:
    """Return each response's best F-measure. Text i is `words[begins[i] : ends[i]]`; the responses of instruction i are the texts
    from `said_at[i]` to `said_at[i + 1]`, its references those from `right_at[i]`."""
    values = np.zeros(said_at[-1])
    seen = np.full(words.max() + 1 if len(words) else 0, -1, np.int64)
    carries = np.zeros((ends - begins).max() if len(ends) else 0, np.uint8)
    for row in range(len(said_at) - 1):
        for response in range(said_at[row], said_at[row + 1]):
            said = words[begins[response] : ends[response]]
            for reference in range(right_at[row], right_at[row + 1]):
                right = words[begins[reference] : ends[reference]]
                common = _longest_common_subsequence(said, right, seen, carries) if ordered else _shared_words(said, right, seen)
                if common:
                    precision, recall = common / len(said), common / len(right)
                    values[response] = max(values[response], 2 * precision * recall / (precision + recall))
    return values


@compiled
def _longest_common_subsequence(left: np.ndarray, right: np.ndarray, seen: np.ndarray, carries: np.ndarray) -> int:
    """Return the length of the longest common subsequence; bit-parallel (Hyyrö 2004), 64 words of the shorter text a pass.

    `seen` (a place for each number) is all -1, before and after; `carries` has a place for each word of the longer text.
    """
    if len(left) > len(right):
        left, right = right, left
    length = 0
    masks = np.empty(64, np.uint64)
    carries[: len(right)] = 0
    for begin in range(0, len(left), 64):
        part = left[begin : begin + 64]
        for bit in range(len(part)):
            if seen[part[bit]] < 0:
                seen[part[bit]] = bit
                masks[bit] = 0
            masks[seen[part[bit]]] |= np.uint64(1) << np.uint64(bit)
        # Bit i of `open_` is 0 where the subsequence grows at word i of the part; a sum's overflow goes on into the next part.
        open_ = np.uint64(0xFFFFFFFFFFFFFFFF)
        for position in range(len(right)):
            known = seen[right[position]]
            carry = np.uint64(carries[position])
            if known < 0 and not carry:
                continue
            match = open_ & masks[known] if known >= 0 else np.uint64(0)
            total = open_ + match
            carries[position] = total < open_
            total += carry
            carries[position] |= total < carry
            open_ = total | (open_ - match)
        for bit in range(len(part)):
            seen[part[bit]] = -1
            length += not (open_ >> np.uint64(bit)) & np.uint64(1)
    return length


@compiled
def _shared_words(left: np.ndarray, right: np.ndarray, seen: np.ndarray) -> int:
    """Return how many words two texts share, each as often as both have it. `seen` is all -1, before and after."""
    common = 0
    for word in left:
        seen[word] += 1
    for word in right:
        if seen[word] >= 0:
            seen[word] -= 1
            common += 1
    for word in left:
        seen[word] = -1
    return common
