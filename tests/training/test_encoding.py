from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.encoding import encode_pairs, pad
from training.scorer import load_tokenizer

INSTRUCTIONS = ["say after me red fox", "please say a dog", "now", "say after me then once again the blue bee", "cow"] * 7
RESPONSES = ["a red fox", "dog", "the owl again please", "blue", ""] * 7


def test_a_pair_within_the_limit_has_the_ids_of_the_tokenizer(encoder: Path):
    tokenizer = load_tokenizer(encoder, "x", "s")
    encoded = encode_pairs(tokenizer, INSTRUCTIONS, RESPONSES, 64)
    plain = tokenizer(INSTRUCTIONS, RESPONSES)
    assert [row.tolist() for row in np.split(encoded.tokens, encoded.starts[1:-1])] == plain["input_ids"]
    assert encoded.types is not None
    assert [row.tolist() for row in np.split(encoded.types, encoded.starts[1:-1])] == plain["token_type_ids"]
    assert (encoded.cut_pairs, encoded.cut_responses) == (0, 0)


@pytest.mark.parametrize(
    ("instruction", "response", "left", "cut", "cut_responses"),
    [
        ("red fox cat", "dog hen", "[CLS] red fox cat [SEP] dog hen [SEP]", 0, 0),
        ("red fox cat owl", "dog hen", "[CLS] red fox owl [SEP] dog hen [SEP]", 1, 0),
        ("red fox cat", "dog hen cow bee ant", "[CLS] [SEP] dog hen cow bee ant [SEP]", 1, 0),
        ("red fox", "dog hen cow bee ant owl cat", "[CLS] [SEP] dog hen cow bee ant [SEP]", 1, 1),
        ("", "dog hen cow bee ant owl cat", "[CLS] [SEP] dog hen cow bee ant [SEP]", 1, 1),
        ("red fox cat owl dog hen cow", "", "[CLS] red fox cat hen cow [SEP] [SEP]", 1, 0),
    ],
)
def test_the_instruction_is_cut_before_the_response(
    encoder: Path, instruction: str, response: str, left: str, cut: int, cut_responses: int
):
    tokenizer = load_tokenizer(encoder, "x", "s")
    encoded = encode_pairs(tokenizer, [instruction], [response], max_length=8)
    assert tokenizer.decode(encoded.tokens.tolist()) == left
    assert (encoded.cut_pairs, encoded.cut_responses) == (cut, cut_responses)
    assert encoded.types is not None
    assert encoded.types.sum() == len(left.split("[SEP]")[1].split()) + 1


def test_padded_inputs_are_those_of_the_tokenizer(encoder: Path):
    tokenizer = load_tokenizer(encoder, "x", "s")
    rows = [3, 0, 2]
    padded = pad(encode_pairs(tokenizer, INSTRUCTIONS, RESPONSES, 64), rows, tokenizer.pad_token_id, torch.device("cpu"))
    plain = tokenizer([INSTRUCTIONS[row] for row in rows], [RESPONSES[row] for row in rows], return_tensors="pt", padding=True)
    assert padded.keys() == plain.keys()
    assert all(torch.equal(padded[name], plain[name]) for name in padded)


def test_lists_of_different_lengths_are_refused(encoder: Path):
    with pytest.raises(ValueError, match="2 instructions and 1 responses; give one response for each instruction"):
        encode_pairs(load_tokenizer(encoder, "x", "s"), ["a", "b"], ["c"], 64)
