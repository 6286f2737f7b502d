"""Compute labels of responses against references, and assemble the candidates of instructions.

Pure: imports no Ray and reads no files. A metric takes two Arrow columns (`TEXTS`): the responses and the references of each
instruction. It returns the label of every response, in [0, 1]: its best value over the references of its instruction. A
response without words (or characters) has label 0.

- `rouge_l`: the F-measure of the longest common subsequence of stemmed words. In `paper` mode it equals `rouge_score` bit
  for bit; the tests and `benchmarks/` compare them. `generation.word_tokenizer` defines the words of both modes.
- `token_f1`: the F-measure of the common words in any order, as in SQuAD, but without removing articles; not stemmed.
- `chrf`: chrF2 of sacrebleu, the F-measure of character 1-grams to 6-grams. Recall has twice the weight of precision, and
  case matters.
- `exact_match`: 1 if the response equals a reference, ignoring white space and case.

A name with a colon is the function of a user (`generation.user_metric`). It is called for sampled responses only.
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
from generation import user_metric
from generation.dataset import LABEL_BINS
from generation.word_tokenizer import Mode, compiled, vocabulary

TEXTS = pa.list_(pa.string())
"""Type of the columns of a metric: a list of texts per instruction, without nulls."""

# Bytes of text per call of the compiled code: large enough to amortize a call, small enough for the CPU caches.
_BLOCK = 1 << 18
_CHRF_ORDER = 6
_CHRF_BETA = 2


def rouge_l(response: str, references: Sequence[str], mode: Mode = "paper") -> float:
    """Return the best Rouge-L F-measure of one response over its references, in [0, 1].

    Use `rouge_l_batch` for many responses; it is much faster. In `paper` mode a text without an ASCII letter or digit has no
    words and scores 0, as in `rouge_score`.
    """
    return float(rouge_l_batch(pa.array([[response]], TEXTS), pa.array([references], TEXTS), mode)[0])


def rouge_l_batch(responses: pa.ListArray, references: pa.ListArray, mode: Mode = "paper") -> np.ndarray:
    """Return the Rouge-L F-measure of every response (float64), in order."""
    return _word_f_measures(responses, references, mode, ordered=True)


def token_f1(responses: pa.ListArray, references: pa.ListArray, mode: Mode = "paper") -> np.ndarray:
    """Return the token F1 of every response (float64), in order: the F-measure of the words it shares with a reference."""
    return _word_f_measures(responses, references, mode, ordered=False)


def chrf(responses: pa.ListArray, references: pa.ListArray) -> np.ndarray:
    """Return the chrF2 of every response (float64), in order."""
    values = []
    for texts, correct in zip(responses.to_pylist(), references.to_pylist(), strict=True):
        targets = [_ngrams(text) for text in correct]
        values += [max((_chrf_score(_ngrams(text), target) for target in targets), default=0.0) for text in texts]
    return np.array(values, np.float64)


def exact_match(responses: pa.ListArray, references: pa.ListArray) -> np.ndarray:
    """Return 1.0 for every response that equals a reference, ignoring white space and case, else 0.0, in order."""
    values = []
    for texts, correct in zip(responses.to_pylist(), references.to_pylist(), strict=True):
        accepted = {_normalize(text) for text in correct} - {""}
        values += [_normalize(text) in accepted for text in texts]
    return np.array(values, np.float64)


@dataclass(frozen=True)
class Metric:
    """A label metric."""

    labels: Callable[..., np.ndarray]
    """Takes responses and references (and the mode if `by_words`), returns the labels."""
    version: int
    """Increased by each change that can change a label."""
    by_words: bool
    """Whether the metric compares words; only then it has a mode."""


METRICS = {
    "rouge_l": Metric(rouge_l_batch, version=1, by_words=True),
    "token_f1": Metric(token_f1, version=1, by_words=True),
    "chrf": Metric(chrf, version=1, by_words=False),
    "exact_match": Metric(exact_match, version=1, by_words=False),
}


def describe_metric(config: LabelConfig) -> dict[str, Any]:
    """Return the name, mode and version of the metric of a config, for the manifest; `mode` is None for a metric without one.

    Raises `UsageError` if the metric is a function that cannot be imported.
    """
    if user_metric.is_user_metric(config.metric):
        return {"name": config.metric, "mode": None, "version": user_metric.load_metric(config.metric).version}
    metric = METRICS[config.metric]
    return {"name": config.metric, "mode": config.mode if metric.by_words else None, "version": metric.version}


def compute_labels(responses: pa.ListArray, references: pa.ListArray, config: LabelConfig, instructions: Sequence[str] = ()) -> np.ndarray:
    """Return the label of every response (float64, in [0, 1]), in order, with the metric of a config.

    `instructions` has the instruction of each list; only the function of a user reads it. Raises `CappyError` if that function fails.
    """
    if user_metric.is_user_metric(config.metric):
        pools = responses.to_pylist()
        rows = [row for row, pool in enumerate(pools) for _ in pool]
        correct = references.to_pylist()
        return user_metric.compute_user_labels(
            user_metric.load_metric(config.metric),
            [text for pool in pools for text in pool],
            [correct[row] for row in rows],
            [instructions[row] for row in rows],
        )
    metric = METRICS[config.metric]
    return metric.labels(responses, references, config.mode) if metric.by_words else metric.labels(responses, references)


def are_right(texts: Sequence[str], references: Sequence[Sequence[str]], config: LabelConfig) -> list[bool]:
    """Return whether each text can be a right answer to its references: the metric, or the words of every script, give it 1.

    Words of every script (Rouge-L in `unicode` mode) have no case, punctuation or Unicode form. The function of a user is not called
    here: it may be slow, and the texts are references of other instructions. `exact_match` replaces it.
    """
    if not texts:
        return []
    columns = pa.array([[text] for text in texts], TEXTS), pa.array(references, TEXTS)
    metric = LabelConfig(metric="exact_match") if user_metric.is_user_metric(config.metric) else config
    best = np.maximum(compute_labels(*columns, metric), rouge_l_batch(*columns, mode="unicode"))
    return [value > 1 - 1e-9 for value in best.tolist()]


def has_unseen_words(text: str, config: LabelConfig) -> bool:
    """Return whether the metric cannot see most of a text: in `paper` mode, words of scripts other than Latin, and symbols."""
    if config.mode != "paper" or config.metric not in METRICS or not METRICS[config.metric].by_words:
        return False
    seen = sum(character.isascii() and character.isalnum() for character in text)
    return 2 * seen < sum(map(str.isalnum, text)) or not seen


def warm_up(config: LabelConfig) -> None:
    """Compile the metric of a config, load its compiled code, or import the function, before the first labels are computed."""
    if user_metric.is_user_metric(config.metric):
        user_metric.load_metric(config.metric)
        return
    text = pa.array([["a"]], TEXTS)
    compute_labels(text, text, config)


def assemble_candidates(rows: Sequence[Mapping[str, Any]], config: LabelConfig, model: str) -> list[list[dict[str, Any]]]:
    """Return the labelled candidates of each instruction (paper, section 3.1), in this order:

    - `reference`: each reference, label 1;
    - `choice`: each answer choice of a classification row that is not a reference, label 0;
    - `mismatched`: each text of `row["mismatched"]` (references of other instructions) that is not a reference here, label 0;
    - `sampled`: each candidate of `row["sampled"]` with its fields (`schema.SAMPLED`), labelled by the metric of `config`. A candidate of
      an earlier set can have its `model` and its `label`.

    A row has `instruction`, `references`, `mismatched` and `answer_choices` (lists of strings; `answer_choices` may be None). This
    function strips outer white space, and so does the engine for samples. A scorer then cannot recognize a reference by its white space.
    Raises `CappyError` if the function of a user fails.
    """
    unlabelled = [[each["response"] for each in row["sampled"] if each.get("label") is None] for row in rows]
    sampled = pa.array(unlabelled, TEXTS)
    references = pa.array([row["references"] for row in rows], TEXTS)
    values = iter(compute_labels(sampled, references, config, [row["instruction"] for row in rows]).tolist())
    return [
        [
            *unsampled_candidates(row),
            *(
                {
                    **each,
                    "label": next(values) if each.get("label") is None else each["label"],
                    "source": "sampled",
                    "model": each.get("model") or model,
                }
                for each in row["sampled"]
            ),
        ]
        for row in rows
    ]


def limit_per_bin(candidates: Sequence[dict[str, Any]], limit: int, seed: int, row_id: str) -> list[dict[str, Any]]:
    """Return the candidates of an instruction with at most `limit` distinct samples per label bin, in their order.

    There are `LABEL_BINS` bins. The choice of samples within a bin depends only on the seed and the row id. Of duplicate
    samples, the first is kept. All other candidates are kept. Raises `KeyError` for candidates without a label.
    """
    bins: dict[int, dict[str, int]] = {}
    for index, each in enumerate(candidates):
        if each["source"] == "sampled":
            bins.setdefault(min(int(each["label"] * LABEL_BINS), LABEL_BINS - 1), {}).setdefault(each["response"], index)
    kept = {
        index
        for indexes in bins.values()
        for _, index in sorted(indexes.items(), key=lambda item: fingerprint(seed, row_id, item[0]))[:limit]
    }
    return [each for index, each in enumerate(candidates) if each["source"] != "sampled" or index in kept]


def unsampled_candidates(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the candidates of an instruction that were not sampled; their decoding, tokens and log-probability are None."""
    correct = {_normalize(text) for text in row["references"]}
    texts = {
        "reference": (1.0, row["references"]),
        "choice": (0.0, [text for text in row["answer_choices"] or () if _normalize(text) not in correct]),
        "mismatched": (0.0, [text for text in row["mismatched"] if _normalize(text) not in correct]),
    }
    unknown = dict.fromkeys(("model", "decoding", "tokens", "finish_reason", "logprob"))
    return [
        {"response": text, "label": label, "source": source, **unknown}
        for source, (label, responses) in texts.items()
        for text in dict.fromkeys(text.strip() for text in responses)
    ]


def _normalize(text: str) -> str:
    """Collapse white space and fold case."""
    return " ".join(text.split()).casefold()


def _ngrams(text: str) -> list[Counter[str]]:
    """Return the counts of the character n-grams of a text without its white space, for n from 1 to `_CHRF_ORDER`."""
    characters = "".join(text.split())
    return [Counter(characters[start : start + n] for start in range(len(characters) - n + 1)) for n in range(1, _CHRF_ORDER + 1)]


def _chrf_score(response: Sequence[Counter[str]], reference: Sequence[Counter[str]]) -> float:
    """Return the F-measure of precision and recall, each averaged over the orders for which both texts have n-grams."""
    both = [(one, other) for one, other in zip(response, reference, strict=True) if one and other]
    common = [(one & other).total() for one, other in both]
    if not any(common):
        return 0.0
    precision = sum(count / one.total() for count, (one, _) in zip(common, both, strict=True)) / len(both)
    recall = sum(count / other.total() for count, (_, other) in zip(common, both, strict=True)) / len(both)
    weight = _CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall)


def _word_f_measures(responses: pa.ListArray, references: pa.ListArray, mode: Mode, *, ordered: bool) -> np.ndarray:
    """Return the word F-measure of every response with its best reference.

    With `ordered`, it counts the longest common subsequence of stemmed words, else the common words in any order.
    """
    words = vocabulary(mode, stemmed=ordered)
    response_texts, response_offsets = _flatten(responses)
    reference_texts, reference_offsets = _flatten(references)
    # A cut is after the instruction that completes the next `_BLOCK` bytes of text.
    blocks = (_bytes_before(response_texts)[response_offsets] + _bytes_before(reference_texts)[reference_offsets]) // _BLOCK
    cuts = [0, *np.flatnonzero(np.diff(blocks[1:])) + 1, len(responses)]
    values = [np.empty(0)]
    for begin, end in pairwise(cuts):
        block_responses = response_offsets[begin : end + 1] - response_offsets[begin]
        block_references = reference_offsets[begin : end + 1] - reference_offsets[begin] + block_responses[-1]
        texts = pa.concat_arrays(
            [
                response_texts[response_offsets[begin] : response_offsets[end]],
                reference_texts[reference_offsets[begin] : reference_offsets[end]],
            ]
        )
        values.append(_f_measures(*words.split(texts), block_responses, block_references, ordered))
    return np.concatenate(values)


def _flatten(lists: pa.ListArray) -> tuple[pa.StringArray, np.ndarray]:
    """Return the texts of all instructions, concatenated, and the offsets of each instruction's texts, [rows + 1]."""
    offsets = lists.offsets.to_numpy()
    return lists.flatten(), offsets - offsets[0]


def _bytes_before(texts: pa.StringArray) -> np.ndarray:
    """Return the number of bytes before each text, and of all texts, [texts + 1]."""
    return np.concatenate([np.zeros(1, np.int64), pc.binary_length(texts).to_numpy().cumsum(dtype=np.int64)])


@compiled
def _f_measures(
    words: np.ndarray, begins: np.ndarray, ends: np.ndarray, response_offsets: np.ndarray, reference_offsets: np.ndarray, ordered: bool
) -> np.ndarray:
    """Return the best F-measure of each response.

    Text i is `words[begins[i] : ends[i]]`. The responses of instruction i are the texts from `response_offsets[i]` to
    `response_offsets[i + 1]`; its references are the texts from `reference_offsets[i]` to `reference_offsets[i + 1]`.
    """
    values = np.zeros(response_offsets[-1])
    seen = np.full(words.max() + 1 if len(words) else 0, -1, np.int64)
    carries = np.zeros((ends - begins).max() if len(ends) else 0, np.uint8)
    for row in range(len(response_offsets) - 1):
        for response in range(response_offsets[row], response_offsets[row + 1]):
            response_words = words[begins[response] : ends[response]]
            for reference in range(reference_offsets[row], reference_offsets[row + 1]):
                reference_words = words[begins[reference] : ends[reference]]
                common = (
                    longest_common_subsequence(response_words, reference_words, seen, carries)
                    if ordered
                    else shared_words(response_words, reference_words, seen)
                )
                values[response] = max(values[response], f_measure(common, len(response_words), len(reference_words)))
    return values


@compiled
def f_measure(common: int, response_words: int, reference_words: int) -> float:
    """Return the F-measure of a response that has `common` words in common with its reference, as `rouge_score` computes it."""
    if not common:
        return 0.0
    precision, recall = common / response_words, common / reference_words
    return 2 * precision * recall / (precision + recall)


@compiled
def longest_common_subsequence(left: np.ndarray, right: np.ndarray, seen: np.ndarray, carries: np.ndarray) -> int:
    """Return the length of the longest common subsequence of two texts.

    Bit-parallel (Hyyrö 2004): each pass handles 64 words of the shorter text. `seen` has an entry for each word number; all
    are -1 before and after the call. `carries` has an entry for each word of the longer text.
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
        # Bit i of `open_` is 0 if the subsequence grows at word i of the part; the carry of a sum is added in the next pass.
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
def shared_words(left: np.ndarray, right: np.ndarray, seen: np.ndarray) -> int:
    """Return the number of words that two texts share, as multisets. All entries of `seen` are -1 before and after the call."""
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
