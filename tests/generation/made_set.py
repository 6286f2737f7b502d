"""Publish a small regression set without an LLM: real files with a complete manifest."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, storage
from cluster.config import Config
from generation import dataset, dataset_card, labels
from generation.schema import DATASET

LABELS = (0.0, 0.05, 0.3, 0.55, 1.0)


def row(number, name="tense"):
    """Return a row with a reference, a mismatched reference, and a sample for each of `LABELS`.

    The sample with label 1.0 repeats the reference.
    """
    sampled = {"model": "m", "decoding": "greedy", "tokens": 3, "finish_reason": "stop", "logprob": -1.5, "source": "sampled"}
    unsampled = dict.fromkeys(sampled)
    texts = [f"sample {label}" for label in LABELS[:-1]] + [f"right {number}"]
    return {
        "id": f"{number:032x}",
        "dataset": name,
        "template": None,
        "instruction": f"say right {number}, please: ñandú",
        "references": [f"right {number}"],
        "answer_choices": None,
        "candidates": [
            {**unsampled, "response": f"right {number}", "label": 1.0, "source": "reference"},
            {**unsampled, "response": f"right {number + 1}", "label": 0.0, "source": "mismatched"},
            *({**sampled, "response": text, "label": label} for text, label in zip(texts, LABELS, strict=True)),
        ],
    }


def damage_page(file):
    """Change the last byte of the first column chunk of a Parquet file, which is in a data page."""
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(file.read_bytes())
    content[start + column.total_compressed_size - 1] ^= 1
    file.write_bytes(content)


def publish(uri, train=(6, 4), validation=(3,), config=None, letters="", first=0, **facts):
    """Publish a set; `train` and `validation` have the numbers of rows of its shards. Return its manifest.

    `first` is the number of the first row, from which all its texts are made.
    """
    config = config or Config()
    files, counts, total, number = {}, {}, {}, first
    for split, shards in (("train", train), ("validation", validation)):
        for part, rows in enumerate(shards):
            table = pa.Table.from_pylist([row(number + each, f"task {each % 2}") for each in range(rows)], DATASET)
            number += rows
            name = f"data/{split}/part-{part:05d}.parquet"
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
            storage.write_bytes(storage.join(uri, name), sink.getvalue().to_pybytes())
            files[name] = {**artifacts.checksums(uri, [name])[name], "rows": rows}
            numbers = dataset.compute_statistics(table)
            counts[split] = dataset.add_statistics(counts.get(split, {}), {key: numbers[key] for key in ("instructions", "pairs")})
            total = dataset.add_statistics(total, numbers)
    storage.write_bytes(storage.join(uri, "config.yaml"), config.to_yaml().encode())
    storage.write_bytes(storage.join(uri, "dead_letters.jsonl"), letters.encode())
    manifest = {
        "kind": "dataset",
        "version": 1,
        "created": "2026-11-21T07:00:00+00:00",
        "code_version": "0.1.0",
        "command": "cappy generate config.yaml",
        "counts": counts,
        "summary": {"uri": uri, **total, "splits": counts, "dead_letters": letters.count("\n"), "seconds": 2.0},
        "schema": {field.name: str(field.type) for field in DATASET},
        "metric": labels.describe_metric(config.generate.label),
        "lineage": {"sampler": config.model_dump(mode="json")["sampler"]},
        "config": config.model_dump(mode="json"),
        "files": files | artifacts.checksums(uri, ["config.yaml", "dead_letters.jsonl"]),
        **facts,
    }
    artifacts.publish(uri, dataset_card.write_card(uri, manifest))
    return storage.read_json(storage.join(uri, artifacts.MANIFEST))
