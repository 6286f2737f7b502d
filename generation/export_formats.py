"""The formats of `cappy export`: the candidates of one prompt become rows for a trainer. Pure: no files, no Ray.

The columns are those of TRL 1.16 (https://huggingface.co/docs/trl/dataset_formats), of OpenAI's chat fine-tuning, and of
sentence-transformers 6.2.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

FORMATS = ("sft", "dpo", "reward", "kto", "chat", "pairs", "ranking")
KTO_THRESHOLD = 0.5
"""Smallest value of a desirable response of kto, unless `threshold` is set."""

# Differences of floats: 0.3 - 0.2 reaches a margin of 0.1.
_EPSILON = 1e-9
_TEXT = pa.string()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))


class Candidate(NamedTuple):
    """A response of a prompt with its value: its label or its score."""

    response: str
    value: float


@dataclass(frozen=True)
class Selection:
    """The options that select the rows of a prompt."""

    per_instruction: int | None = None
    """Largest number of rows (sft, chat, dpo, reward, pairs), of responses of each label (kto) or of documents (ranking)."""
    margin: float = 0.0
    """Smallest difference of two values that are compared."""
    threshold: float | None = None
    """Smallest value of a response that is right or desirable."""


@dataclass(frozen=True)
class Format:
    """One format: its columns and its rows."""

    columns: dict[str, str]
    """Description of each column."""
    types: dict[str, pa.DataType]
    rows: Callable[[str, Sequence[Candidate], Selection], list[dict[str, Any]]]
    """Return the rows of a prompt. The candidates are sorted by value, the best first, and their texts differ."""
    texts: dict[str, str]
    """The role of each column with a text; with `messages` these columns are lists of messages."""
    takes: tuple[str, ...]
    """Fields of `Selection` that the format uses."""
    compares: bool
    """Whether the format needs values."""
    one: bool = False
    """Whether `per_instruction` is 1 unless it is set."""
    sampled: bool = True
    """Whether only sampled responses of a regression set are used unless other sources are named."""


def sft_rows(prompt: str, candidates: Sequence[Candidate], selection: Selection) -> list[dict[str, Any]]:
    """Return the best responses as `prompt` and `completion`."""
    return [{"prompt": prompt, "completion": each.response} for each in _best(candidates, selection)]


def chat_rows(prompt: str, candidates: Sequence[Candidate], selection: Selection) -> list[dict[str, Any]]:
    """Return the best responses as chats of two messages."""
    return [{"messages": [_message("user", prompt), _message("assistant", each.response)]} for each in _best(candidates, selection)]


def preference_rows(prompt: str, candidates: Sequence[Candidate], selection: Selection) -> list[dict[str, Any]]:
    """Return pairs of a better and a worse response, the largest margin first; a response is never both chosen and rejected."""
    rows: list[dict[str, Any]] = []
    chosen: set[int] = set()
    rejected: set[int] = set()
    for margin, better, worse in pairs_by_margin([each.value for each in candidates]):
        if margin <= 0 or margin < selection.margin - _EPSILON or len(rows) == selection.per_instruction:
            break
        if better in rejected or worse in chosen:
            continue
        chosen.add(better)
        rejected.add(worse)
        rows.append({"prompt": prompt, "chosen": candidates[better].response, "rejected": candidates[worse].response, "margin": margin})
    return rows


def kto_rows(prompt: str, candidates: Sequence[Candidate], selection: Selection) -> list[dict[str, Any]]:
    """Return responses with `label` true at or above the threshold, and false at least a margin below it."""
    threshold = KTO_THRESHOLD if selection.threshold is None else selection.threshold
    good = [each for each in candidates if each.value >= threshold][: selection.per_instruction]
    bad = [each for each in reversed(candidates) if each.value < threshold and threshold - each.value >= selection.margin - _EPSILON]
    labelled = [(each, True) for each in good] + [(each, False) for each in bad[: selection.per_instruction]]
    return [{"prompt": prompt, "completion": each.response, "label": label} for each, label in labelled]


def pair_rows(prompt: str, candidates: Sequence[Candidate], selection: Selection) -> list[dict[str, Any]]:
    """Return the responses with their values."""
    kept = candidates[: selection.per_instruction]
    return [{"instruction": prompt, "response": each.response, "label": each.value} for each in kept]


def ranking_rows(prompt: str, candidates: Sequence[Candidate], selection: Selection) -> list[dict[str, Any]]:
    """Return one list of responses with their values; none if all values are equal, or closer than the margin.

    Of a longer list than `per_instruction`, the best half and the worst half stay.
    """
    kept = list(candidates)
    if selection.per_instruction is not None and len(kept) > selection.per_instruction:
        worst = selection.per_instruction // 2
        kept = kept[: selection.per_instruction - worst] + kept[len(kept) - worst :]
    spread = kept[0].value - kept[-1].value if kept else 0.0
    if spread <= 0 or spread < selection.margin - _EPSILON:
        return []
    return [{"query": prompt, "documents": [each.response for each in kept], "scores": [each.value for each in kept]}]


def pairs_by_margin(values: Sequence[float]) -> Iterator[tuple[float, int, int]]:
    """Yield `(values[i] - values[j], i, j)` for all i < j, the largest difference first; `values` do not increase.

    Equal differences have a fixed order. Only a frontier of pairs is in memory.
    """
    if len(values) < 2:
        return
    last = len(values) - 1
    heap, seen = [(values[last] - values[0], 0, last)], {(0, last)}
    while heap:
        negative, better, worse = heapq.heappop(heap)
        yield -negative, better, worse
        for i, j in ((better + 1, worse), (better, worse - 1)):
            if i < j and (i, j) not in seen:
                seen.add((i, j))
                heapq.heappush(heap, (values[j] - values[i], i, j))


def as_messages(row: dict[str, Any], texts: dict[str, str], system: str | None) -> dict[str, Any]:
    """Return a row with its texts as lists of messages; `texts` has the role of each."""
    converted = {name: [_message(role, row[name])] for name, role in texts.items()}
    if system is not None:
        converted["prompt"] = [_message("system", system), *converted["prompt"]]
    return row | converted


def add_system(row: dict[str, Any], system: str | None) -> dict[str, Any]:
    """Return a row of `chat` with a system message in front."""
    return row if system is None else {"messages": [_message("system", system), *row["messages"]]}


def schema(form: str, *, messages: bool = False) -> pa.Schema:
    """Return the columns of a format."""
    made = TABLE[form]
    types = {name: _MESSAGES if messages and name in made.texts else kind for name, kind in made.types.items()}
    return pa.schema(list(types.items()))


def _best(candidates: Sequence[Candidate], selection: Selection) -> Sequence[Candidate]:
    right = [each for each in candidates if selection.threshold is None or each.value >= selection.threshold]
    return right[: selection.per_instruction]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_PREFERENCE = Format(
    columns={
        "prompt": "the instruction",
        "chosen": "the better response",
        "rejected": "the worse response",
        "margin": "the value of the chosen response minus the value of the rejected one, above 0",
    },
    types={"prompt": _TEXT, "chosen": _TEXT, "rejected": _TEXT, "margin": pa.float64()},
    rows=preference_rows,
    texts={"prompt": "user", "chosen": "assistant", "rejected": "assistant"},
    takes=("per_instruction", "margin"),
    compares=True,
    one=True,
)
TABLE: dict[str, Format] = {
    "sft": Format(
        columns={"prompt": "the instruction", "completion": "one of its best responses"},
        types={"prompt": _TEXT, "completion": _TEXT},
        rows=sft_rows,
        texts={"prompt": "user", "completion": "assistant"},
        takes=("per_instruction", "threshold"),
        compares=False,
        one=True,
    ),
    "dpo": _PREFERENCE,
    "reward": _PREFERENCE,
    "kto": Format(
        columns={
            "prompt": "the instruction",
            "completion": "one of its responses",
            "label": "true for a desirable response, false for an undesirable one",
        },
        types={"prompt": _TEXT, "completion": _TEXT, "label": pa.bool_()},
        rows=kto_rows,
        texts={"prompt": "user", "completion": "assistant"},
        takes=("per_instruction", "margin", "threshold"),
        compares=True,
    ),
    "chat": Format(
        columns={"messages": "a chat: the instruction of `user`, and the response of `assistant`"},
        types={"messages": _MESSAGES},
        rows=chat_rows,
        texts={},
        takes=("per_instruction", "threshold"),
        compares=False,
        one=True,
    ),
    "pairs": Format(
        columns={"instruction": "the instruction", "response": "one of its responses", "label": "the value of the response"},
        types={"instruction": _TEXT, "response": _TEXT, "label": pa.float64()},
        rows=pair_rows,
        texts={},
        takes=("per_instruction",),
        compares=True,
        sampled=False,
    ),
    "ranking": Format(
        columns={
            "query": "the instruction",
            "documents": "its responses, the best first",
            "scores": "the value of each response",
        },
        types={"query": _TEXT, "documents": pa.list_(_TEXT), "scores": pa.list_(pa.float64())},
        rows=ranking_rows,
        texts={},
        takes=("per_instruction", "margin"),
        compares=True,
        sampled=False,
    ),
}
"""Each format by its name."""
