"""Scores of candidates, kept in files of a few rows each, so that an interrupted suite resumes. No Ray."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, folder_writer, models, storage
from cluster.lease import Lease
from cluster.progress import log
from evaluation.evaluate import PairScorer, score_rows
from evaluation.statistics import Floats
from training.adapt import folder_name
from training.lora import weights_sha256

_KEY = b"cappy"
_UNIT_ROWS = 128
Row = dict[str, Any]
Compute = Callable[[str, Sequence[Row]], list[Floats]]
"""Takes a task and rows of it, returns the numbers of each row."""


class ScoreStore:
    """The numbers of rows below one folder, in units of `_UNIT_ROWS` rows."""

    def __init__(self, uri: str, dataset: str, held: Lease) -> None:
        """Keep numbers at `uri`; `dataset` identifies the set with the candidates."""
        self.uri, self._dataset = uri, dataset
        self._folder = folder_writer.FolderWriter(uri, held.check)
        self.pairs = 0
        """Distinct pairs that this run scored."""
        self.seconds = 0.0
        """Time of this run for them."""

    def read_or_compute(self, name: str, rows: Sequence[Row], keys: Mapping[str, Any], compute: Compute) -> list[Floats]:
        """Return the numbers of each row, in order. Only missing units are computed, and then written.

        Args:
            name: folder below `uri`.
            rows: rows with `id`, `dataset` and `candidates`.
            keys: a JSON value for each task that identifies the model. A unit with another one is computed again.
            compute: computes the numbers of rows.
        """
        by_task: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            by_task.setdefault(row["dataset"], []).append(index)
        found: list[Floats] = [np.empty(0)] * len(rows)
        for task, of_task in by_task.items():
            key = json.dumps([self._dataset, keys[task]])
            for number, first in enumerate(range(0, len(of_task), _UNIT_ROWS)):
                indices = of_task[first : first + _UNIT_ROWS]
                unit = [rows[index] for index in indices]
                file = f"{name}/{folder_name(task)}-{number:04d}.parquet"
                values = self._read(file, key, unit)
                if values is None:
                    log(f"{name}: {task}, rows {first:,} to {first + len(unit):,} of {len(of_task):,}")
                    start = time.monotonic()
                    values = compute(task, unit)
                    self.seconds += time.monotonic() - start
                    self.pairs += sum(len({each["response"] for each in row["candidates"]}) for row in unit)
                    self._write(file, key, unit, values)
                for index, numbers in zip(indices, values, strict=True):
                    found[index] = numbers
        return found

    def _read(self, file: str, key: str, rows: Sequence[Row]) -> list[Floats] | None:
        """Return the numbers in a file; None if it does not exist, is damaged, or has another key or other rows."""
        try:
            table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(self.uri, file))), page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            return None
        if (table.schema.metadata or {}).get(_KEY) != key.encode() or table["id"].to_pylist() != [row["id"] for row in rows]:
            return None
        return [np.asarray(values, np.float64) for values in table["numbers"].to_pylist()]

    def _write(self, file: str, key: str, rows: Sequence[Row], values: Sequence[Floats]) -> None:
        columns = {"id": [row["id"] for row in rows], "numbers": pa.array([each.tolist() for each in values], pa.list_(pa.float64()))}
        sink = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata({_KEY: key}), sink, compression="zstd", write_page_checksum=True)
        self._folder.write_bytes(file, sink.getvalue())


def add_field(rows: Sequence[Row], field: str, numbers: Sequence[Floats]) -> None:
    """Add a field to the candidates of each row; `numbers` has the values of each row, (C,)."""
    for row, values_C in zip(rows, numbers, strict=True):
        for each, value in zip(row["candidates"], values_C.tolist(), strict=True):
            each[field] = value


def score_candidates(
    store: ScoreStore, name: str, rows: Sequence[Row], scorers: Mapping[str, str], load: Callable[[str], PairScorer]
) -> list[Floats]:
    """Return the scores of the candidates of each row, (C,). `scorers` has the URI of the scorer of each task; `load` loads a scorer."""
    loaded: dict[str, PairScorer] = {}

    def compute(task: str, unit: Sequence[Row]) -> list[Floats]:
        uri = scorers[task]
        if uri not in loaded:
            loaded.clear()  # one scorer in memory at a time
            loaded[uri] = load(uri)
        scored = score_rows(loaded[uri], unit)
        return [np.asarray([each["score"] for each in row["candidates"]], np.float64) for row in scored]

    return store.read_or_compute(name, rows, {task: scorer_key(uri) for task, uri in scorers.items()}, compute)


def scorer_key(uri: str) -> list[str]:
    """Return an id of the weights of a scorer: its name, and the id of its publication, or the SHA-256 of a model without a manifest."""
    manifest = storage.join(uri, artifacts.MANIFEST)
    written = storage.read_json(manifest).get("writer") if storage.exists(manifest) else None
    return [uri.rstrip("/").rsplit("/", 1)[-1], written or weights_sha256(Path(scorer_folder(uri)))]


def scorer_folder(name: str) -> str:
    """Return the folder of a scorer, which is its URI if it is published there, and else the local folder of a model."""
    return name if storage.exists(storage.join(name, artifacts.MANIFEST)) else str(models.resolve(name, "scorer_path", adapters=True))
