"""Tokenise pairs, cut them to the length limit and pad batches of them. numpy and torch only: no files, no Ray.

Shapes: B pairs of a batch, T tokens of the longest pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Pairs per call of the tokenizer. Its result holds Python lists, many times larger than the arrays of `Encoded`.
_TOKENISED_PAIRS = 256


@dataclass(frozen=True)
class Encoded:
    """Tokenised pairs with their special tokens, without padding: the tokens of all pairs end to end."""

    tokens: np.ndarray
    """int32 (tokens of all pairs,)."""
    types: np.ndarray | None
    """int8, same shape as `tokens`: 0 for the instruction, 1 for the response. None for models without token types."""
    starts: np.ndarray
    """int64 (pairs + 1,): pair `row` is `tokens[starts[row] : starts[row + 1]]`."""
    cut_pairs: int
    """Pairs above the length limit."""
    cut_responses: int
    """Pairs whose response alone was above the limit: the instruction is removed and the end of the response is cut."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, int64 (pairs,)."""
        return np.diff(self.starts)


def encode_pairs(tokenizer: Any, instructions: Sequence[str], responses: Sequence[str], max_length: int, *, chat: bool = False) -> Encoded:
    """Tokenise pairs and cut each to `max_length` tokens.

    A longer pair loses the middle of its instruction. Its response is cut at the end, and only when no instruction is left. The
    start and the end of the instruction stay, because they hold the task (such as a question after its context). A pair within
    the limit has the ids of `tokenizer(instruction, response)`.

    With `chat` it has those of the tokenizer's chat template: the instruction is the turn of the user, the response that of the
    assistant. The tokens of the template are not cut.

    Raises `ValueError` when the lists differ in length.
    """
    if len(instructions) != len(responses):
        raise ValueError(f"{len(instructions)} instructions and {len(responses)} responses; give one response for each instruction")
    typed = "token_type_ids" in tokenizer.model_input_names
    pieces = [_concatenate([], [] if typed else None, 0, 0)]
    for start in range(0, len(instructions), _TOKENISED_PAIRS):
        piece = slice(start, start + _TOKENISED_PAIRS)
        tokenise = _tokenise_chats if chat else _tokenise_pairs
        tokenised = tokenise(tokenizer, list(instructions[piece]), list(responses[piece]), typed)
        pieces.append(_cut(tokenizer, tokenised, max_length))
    return Encoded(
        np.concatenate([piece.tokens for piece in pieces]),
        np.concatenate([piece.types for piece in pieces]) if typed else None,
        np.cumsum(np.concatenate([[0], *(piece.lengths for piece in pieces)])),
        sum(piece.cut_pairs for piece in pieces),
        sum(piece.cut_responses for piece in pieces),
    )


def pad(encoded: Encoded, rows: Sequence[int] | np.ndarray, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return the model's inputs for some pairs: `input_ids`, `attention_mask` and, with types, `token_type_ids`, each int64 (B, T)."""
    chosen = np.asarray(rows, np.int64)
    starts_B1 = encoded.starts[chosen, None]
    lengths_B1 = encoded.starts[chosen + 1, None] - starts_B1
    columns_T = np.arange(lengths_B1.max())
    mask_BT = columns_T < lengths_B1
    positions = (starts_B1 + columns_T)[mask_BT]
    inputs = {"input_ids": np.full(mask_BT.shape, pad_id, np.int64), "attention_mask": mask_BT.astype(np.int64)}
    inputs["input_ids"][mask_BT] = encoded.tokens[positions]
    if encoded.types is not None:
        inputs["token_type_ids"] = np.zeros(mask_BT.shape, np.int64)
        inputs["token_type_ids"][mask_BT] = encoded.types[positions]
    return {name: torch.from_numpy(value).to(device, non_blocking=True) for name, value in inputs.items()}


class _Tokenised(NamedTuple):
    """The tokens of some pairs, before cutting."""

    ids: list[list[int]]
    types: list[list[int]] | None
    sides: Callable[[int], np.ndarray]
    """Returns for each token of a pair 0 (instruction), 1 (response) or -1 (special tokens and the chat template), (tokens,)."""


def _tokenise_pairs(tokenizer: Any, instructions: list[str], responses: list[str], typed: bool) -> _Tokenised:
    batch = tokenizer(instructions, responses, return_token_type_ids=typed, return_attention_mask=False, truncation=False, verbose=False)
    return _Tokenised(
        batch["input_ids"],
        batch["token_type_ids"] if typed else None,
        lambda row: np.array([-1 if side is None else side for side in batch.sequence_ids(row)]),
    )


def _tokenise_chats(tokenizer: Any, instructions: list[str], responses: list[str], typed: bool) -> _Tokenised:
    turns = [
        [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
        for instruction, response in zip(instructions, responses, strict=True)
    ]
    texts: list[str] = tokenizer.apply_chat_template(turns, tokenize=False)
    batch = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, truncation=False, verbose=False
    )
    ids: list[list[int]] = batch["input_ids"]
    before, after = _chat_frame(tokenizer)

    def sides(row: int) -> np.ndarray:
        """Find both texts in the rendered chat, without the white space around them: many templates remove it."""
        instruction, response = instructions[row].strip(), responses[row].strip()
        starts = np.array([start for start, _ in batch["offset_mapping"][row]])
        found = np.full(len(starts), -1)
        first, last = texts[row].find(instruction, before), texts[row].rfind(response, 0, len(texts[row]) - after)
        if first >= 0:
            found[(first <= starts) & (starts < first + len(instruction))] = 0
        if last >= first + len(instruction):
            found[(last <= starts) & (starts < last + len(response))] = 1
        return found

    return _Tokenised(ids, [[0] * len(each) for each in ids] if typed else None, sides)


def _chat_frame(tokenizer: Any) -> tuple[int, int]:
    """Return the characters of a rendered chat before its instruction and those after its response; 0 if the template changes texts."""
    marks = ("<instruction>", "<response>")
    turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant"), marks, strict=True)]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    first, last = (text.find(mark) for mark in marks)
    return max(first, 0), len(text) - last - len(marks[1]) if last >= 0 else 0


def _cut(tokenizer: Any, tokenised: _Tokenised, max_length: int) -> Encoded:
    """Cut pairs to `max_length` tokens, as `encode_pairs` describes."""
    ids, types = tokenised.ids, tokenised.types
    for row, tokens in enumerate(ids):
        if not tokens:  # two empty texts, and a tokenizer that adds no special tokens: a model needs at least one token
            ids[row] = [_filler_id(tokenizer)]
            if types:
                types[row] = [0]
    cut_pairs = cut_responses = 0
    for row, tokens in enumerate(ids):
        excess = len(tokens) - max_length
        if excess <= 0:
            continue
        sides = tokenised.sides(row)
        instruction, response = np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)
        cut_pairs += 1
        cut_responses += excess > len(instruction)
        removed = min(excess, len(instruction))
        start = (len(instruction) - removed + 1) // 2
        response_end = max(len(response) - max(excess - len(instruction), 0), 0)
        dropped = np.concatenate([instruction[start : start + removed], response[response_end:]])
        kept = np.delete(np.arange(len(tokens)), dropped)
        if len(kept) > max_length:  # a chat template that changes the texts, so that they are not found in it
            kept = np.concatenate([kept[: max_length // 2], kept[len(kept) - (max_length + 1) // 2 :]])
        ids[row] = [tokens[position] for position in kept]
        if types:
            types[row] = [types[row][position] for position in kept]
    return _concatenate(ids, types, cut_pairs, cut_responses)


def _filler_id(tokenizer: Any) -> int:
    """Return the token that replaces an empty pair."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return next((token for token in known if token is not None), 0)


def _concatenate(ids: list[list[int]], types: list[list[int]] | None, cut_pairs: int, cut_responses: int) -> Encoded:
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)), out=starts[1:])
    tokens = np.fromiter(chain.from_iterable(ids), np.int32, starts[-1])
    sides = None if types is None else np.fromiter(chain.from_iterable(types), np.int8, starts[-1])
    return Encoded(tokens, sides, starts, cut_pairs, cut_responses)
