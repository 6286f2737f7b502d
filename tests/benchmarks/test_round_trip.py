"""The round trip: rows without overlap, the loss on the completion, the control, and LoRA on the real model."""

from __future__ import annotations

import json

import pytest

from benchmarks import round_trip
from cluster.config import load
from cluster.errors import UsageError
from generation.sources.row import Instruction


def instruction(task, split, text):
    return Instruction(task, None, split, text, (f"answer {text}",))


def test_the_decoded_rows_are_validation_rows_whose_instruction_is_not_trained_on():
    rows = [instruction(task, split, f"{task} {split} {n}") for task in "ab" for split in ("train", "validation") for n in range(9)]
    lines, decoded = round_trip.split_rows(rows, 4, 2)
    assert [row.instruction for row in decoded] == ["a validation 0", "a validation 1", "b validation 0", "b validation 1"]
    assert len(lines) == 2 * (3 + 4) and all("train" in line["instruction"] for line in lines)
    assert sum("references" in line for line in lines) == 6
    with pytest.raises(UsageError, match=r"1 train and validation rows have the same instruction, e\.g\. 'a train 1'"):
        round_trip.split_rows([*rows, instruction("c", "validation", "a train 1")], 4, 2)


def test_the_control_has_the_same_prompts_and_a_random_candidate_that_is_not_empty():
    pool = [{"response": text} for text in ("best", "", "other", "third")]
    answers = [{"instruction": f"p{number}", "candidates": pool} for number in range(40)]
    pairs = [(f"p{number}", "best") for number in range(30)]
    drawn = round_trip.random_pairs(pairs, answers, 1)
    assert [prompt for prompt, _ in drawn] == [prompt for prompt, _ in pairs]
    assert {text for _, text in drawn} == {"best", "other", "third"}
    assert drawn == round_trip.random_pairs(pairs, answers, 1) != round_trip.random_pairs(pairs, answers, 2)
    assert drawn[3:5] == round_trip.random_pairs(pairs[3:5], answers, 1)


def test_each_epoch_has_every_example_once_and_the_order_depends_on_the_seed():
    batches = round_trip.draw_batches(6, 4, 3, 1)
    assert [len(batch) for batch in batches] == [3] * 4
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(6))
    assert batches == round_trip.draw_batches(6, 4, 3, 1) != round_trip.draw_batches(6, 4, 3, 2)
    assert round_trip.draw_batches(2, 2, 3, 1) and {len(batch) for batch in round_trip.draw_batches(2, 2, 3, 1)} == {3}


class WordTokenizer:
    """A tokenizer with one token for each character, and a chat template of one letter before and after a prompt."""

    eos_token = "$"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return f"<{turns[0]['content']}>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def test_the_loss_is_on_the_completion_and_the_end_of_the_turn():
    ids, labels = round_trip.encode_pair(WordTokenizer(), ("say", "hi"))
    assert "".join(map(chr, ids)) == "<say>hi$"
    assert labels == [-100] * 5 + [ord(letter) for letter in "hi$"]


def test_a_long_prompt_loses_its_start_and_the_completion_is_complete():
    ids, labels = round_trip.encode_pair(WordTokenizer(), ("x" * 600 + "end", "hi"))
    assert len(ids) == len(labels) == 512
    assert "".join(map(chr, ids[-7:])) == "end>hi$" and labels.count(-100) == 509


def test_only_the_first_line_counts():
    assert round_trip.first_line("\n  a fox \nand more") == "a fox" and round_trip.first_line(" \n") == ""


def test_the_arms_are_compared_with_the_references_row_by_row():
    rows = [instruction("a", "validation", "red fox"), instruction("b", "validation", "old dog")]
    decoded = {"before": ["nothing", "nothing"], "selected": ["answer red fox", "answer old dog"], "random": ["nothing", "answer old dog"]}
    found = round_trip.compare(decoded, rows, load(None))
    assert found["points"] == {"before": 0.0, "selected": 100.0, "random": 50.0}
    assert found["gains"]["selected"]["before"] == {"mean": 100.0, "low": 100.0, "high": 100.0}
    assert found["gains"]["selected"]["random"]["mean"] == found["gains"]["random"]["before"]["mean"] == 50.0


@pytest.mark.slow
def test_lora_learns_its_completions_and_the_saved_adapter_decodes_the_same(tmp_path):
    import peft

    model, tokenizer = round_trip.load_model("smollm2-135m-instruct")
    pairs = [("Say the word of the day.", "zebra lamp"), ("Say the number of the day.", "forty green")]
    prompts = [prompt for prompt, _ in pairs]
    losses = round_trip.fine_tune(model, tokenizer, pairs, tmp_path, steps=8, batch_size=2, learning_rate=3e-3, rank=4, seed=1)
    after = round_trip.decode_greedily(model, tokenizer, prompts, 6, batch_size=1)
    assert losses[-1] < losses[0] / 2 and after == ["zebra lamp", "forty green"]
    assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    plain, _ = round_trip.load_model("smollm2-135m-instruct")
    assert round_trip.decode_greedily(peft.PeftModel.from_pretrained(plain, tmp_path), tokenizer, prompts, 6) == after
