"""Provide an LLM without weights, a tiny encoder and a synthetic set, for benchmarks of this project's code alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, models, storage
from cluster.config import DecodingConfig
from generation.engines.contract import Candidate
from generation.schema import DATASET

WORDS = (
    *("the", "a", "red", "blue", "small", "old", "fox", "dog", "house", "river"),
    *("runs", "sleeps", "sees", "under", "over", "near", "quickly", "never", "often", "today"),
)

_SHARD_ROWS = 1 << 14


def text(seed: int) -> str:
    """Return eight words; seeds whose difference is below the size of the vocabulary give different words."""
    return " ".join(WORDS[(seed // (place + 1) + place * place) % len(WORDS)] for place in range(8))


class SyntheticLLM:
    """An LLM (`generation.engines.contract.LLM`) that computes its answers from the seed, without delay."""

    dead = False

    def __init__(self, _: Any) -> None:
        pass

    def encode(self, turns: Any, form: str, room: int) -> list[int]:
        return [len(turn["content"]) for turn in turns]

    def max_cost(self, prompt: Any, decoding: DecodingConfig) -> float:
        return 0.0

    def pop_cost(self, request_id: str) -> float:
        return 0.0

    async def sample(self, prompt: Any, decoding: DecodingConfig, seed: int | None, request_id: str) -> list[Candidate]:
        await asyncio.sleep(0)
        return [
            Candidate(response=text((seed or 0) + draw), decoding=decoding.name, tokens=9, finish_reason="stop", logprob=-1.0)
            for draw in range(decoding.n)
        ]


def write_encoder(folder: Path) -> None:
    """Write a random two-layer BERT with 32 hidden units, and MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("minilm-l6", "scorer.encoder"))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish_set(uri: str, instructions: int) -> None:
    """Publish a set of made-up rows, each with a right, a half-right and a wrong response."""
    draw = random.Random(1)
    counts, names = {}, []
    for split, count in (("train", instructions), ("validation", 8)):
        for part, start in enumerate(range(0, count, _SHARD_ROWS)):
            rows = [_row(f"{split}{number}", draw) for number in range(start, min(start + _SHARD_ROWS, count))]
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows, DATASET), sink, write_page_checksum=True, row_group_size=_SHARD_ROWS // 8)
            names.append(f"data/{split}/part-{part:05d}.parquet")
            storage.write_bytes(storage.join(uri, names[-1]), sink.getvalue().to_pybytes())
        counts[split] = {"instructions": count, "pairs": 3 * count}
    artifacts.publish(uri, {"kind": "dataset", "version": 1, "counts": counts, "files": artifacts.checksums(uri, names)})


def _row(name: str, draw: random.Random) -> dict[str, Any]:
    words = draw.choices(WORDS, k=draw.randint(2, 20))
    texts = {" ".join(words): 1.0, " ".join([*words[: len(words) // 2], "wrong"]): 0.5, "something else": 0.0}
    blank = {"source": "reference", "model": None, "decoding": None, "tokens": None, "finish_reason": None, "logprob": None}
    candidates = [{"response": text, "label": label, **blank} for text, label in texts.items()]
    row = {"id": name, "dataset": "echo", "template": None, "instruction": f"say {' '.join(words)}"}
    return row | {"references": [" ".join(words)], "answer_choices": None, "candidates": candidates}
