"""A tiny random encoder and a tiny published set, as real files, small enough to train in seconds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cluster import artifacts, storage
from cluster.config import Config
from generation.schema import DATASET

# These models are too small for two threads, which wait for each other on a busy machine.
torch.set_num_threads(1)

COLORS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]
ANIMALS = ["fox", "cat", "dog", "hen", "cow", "owl", "bee", "ant"]
WORDS = [*COLORS, *ANIMALS, "say", "after", "me", "a", "the", "please", "now", "then", "once", "again"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Give each worker one thread, also in child processes, so that runs are bit equal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def write_tokenizer(folder: Path, pad_id: Literal[0, 1] = 0, typed: bool = True) -> None:
    """Write a word-level tokenizer with BERT's pair template; with `typed` it returns `token_type_ids`."""
    specials = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    specials.insert(pad_id, "[PAD]")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", *["token_type_ids"] * typed, "attention_mask"],
    ).save_pretrained(folder)


SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {"max_position_embeddings": 64},
    "Roberta": {"max_position_embeddings": 66, "pad_token_id": 1},
    "DebertaV2": {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
    "ModernBert": {"max_position_embeddings": 64, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
}


def write_family(kind: str, folder: Path) -> None:
    """Write a tiny random encoder of one of `FAMILIES` and a tokenizer with its padding id."""
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SMALL, **FAMILIES[kind])).save_pretrained(folder)
    write_tokenizer(folder, FAMILIES[kind].get("pad_token_id", 0), typed=kind == "Bert")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random two-layer BERT of hidden size 32 and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(WORDS) + 5,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows with a right (1.0), a half right (0.5) and a wrong (0.0) response each."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        color, animal = draw.choice(COLORS), draw.choice(ANIMALS)
        filler = " ".join(draw.choices(["please", "now", "then", "once", "again"], k=draw.randint(0, 12)))
        answers = {f"a {color} {animal}": 1.0, f"a {color} {draw.choice(ANIMALS)} now": 0.5, f"the {draw.choice(COLORS)} me": 0.0}
        made.append(
            {
                "id": f"{seed:016x}{number:016x}",
                "dataset": "echo",
                "template": None,
                "instruction": f"say after me {filler} {color} {animal}",
                "references": [f"a {color} {animal}"],
                "answer_choices": None,
                "candidates": [
                    {
                        "response": text,
                        "label": label,
                        "source": "sampled",
                        "model": "m",
                        "decoding": "d",
                        "tokens": 3,
                        "finish_reason": "stop",
                        "logprob": -1.0,
                    }
                    for text, label in answers.items()
                ],
            }
        )
    return made


def publish(uri: str, train: int, validation: int, row_group: int = 64) -> str:
    """Publish a set at `uri`, in the layout of `cappy generate`; return `uri`."""
    counts, names = {}, []
    for split, count, seed in (("train", train, 1), ("validation", validation, 2)):
        name = f"data/{split}/part-00000.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows(count, seed), DATASET), sink, row_group_size=row_group, write_page_checksum=True)
        storage.write_bytes(storage.join(uri, name), sink.getvalue().to_pybytes())
        counts[split] = {"instructions": count, "pairs": 3 * count}
        names.append(name)
    artifacts.publish(uri, {"kind": "dataset", "version": 1, "counts": counts, "files": artifacts.checksums(uri, names)})
    return uri


def settings(workspace: str, encoder: Path, **training: Any) -> Config:
    """Return the config of a small run below `workspace`."""
    chosen = {"epochs": 2, "batch_size": 16, "window": 64, "learning_rate": 1e-3, "checkpoint_every": 5, "max_failures": 1} | training
    return Config.model_validate(
        {"workspace": workspace, "scorer": {"encoder": str(encoder), "max_length": 32, "dtype": "float32"}, "training": chosen}
    )
