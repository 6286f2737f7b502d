"""Open a published regression set: its rows, pairs and statistics; as a Ray, Hugging Face or pandas dataset.

Layout of a set: `data/{split}/part-*.parquet` (one row per instruction, candidates as a list of structs),
`dead_letters.jsonl`, `config.yaml`, the card (`README.md`, `labels.svg`), and `_MANIFEST.json`, which is written last. A
folder without a manifest is not opened. Imports Ray, `datasets` and pandas only in the methods that return their types.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import artifacts, storage
from cluster.errors import CappyError, first_line
from cluster.progress import Bar
from generation.schema import PAIRS

if TYPE_CHECKING:
    import datasets
    import pandas
    import ray.data

_VERIFY_THREADS = 8
LABEL_BINS = 10
"""Number of equal bins of [0, 1] in which labels are counted."""
WORKING_FILES = (
    r"_lease/\d+\.json",
    r"_staging/(run|prepared)\.json",
    r"_staging/prepared/(dead_letters\.jsonl|decontamination\.json)",
    r"_staging/(prepared|units)/(train|validation)-\d+\.parquet",
    r"_staging/letters/(train|validation)-part-[^/]+\.jsonl",
    r"data/(train|validation)/part-\d{5,}-[0-9a-f]{8}\.parquet",
    r"_staging/promises/(train|validation)-\d+-[0-9a-f]{32}\.json",
    r"_staging/attempts/(train|validation)-\d+/((batch|single|row-[^/]+)-[0-9a-f]{32}|answer-[^/]+)\.json",
    r"_staging/attempts/load/[0-9a-f]{32}\.json",
)
"""Patterns of the files of an unfinished set, for `artifacts.OwnedFiles`; the names of its shards contain a run id."""
SAMPLING_FACTS = ("max_tokens", "reused", "extends", "combines", "sampling")
"""Optional keys of a manifest that describe the sampling. A set with other labels keeps them."""
RESULT_FILES = (
    r"data/(train|validation)/part-\d{5,}\.parquet",
    r"config\.yaml|README\.md|labels\.svg|dead_letters\.jsonl|decontamination\.json",
)
"""Patterns of the files of a published set, except its manifest."""


@dataclass(frozen=True)
class Pairs:
    """Columns of (instruction, response) pairs; all have the same length."""

    instructions: list[str]
    responses: list[str]
    labels: np.ndarray
    """float32, in [0, 1]."""
    groups: np.ndarray
    """int64: position of the instruction of the pair in its split."""

    def __len__(self) -> int:
        return len(self.instructions)


class RegressionSet:
    """A published regression set, opened for reading.

    Each shard is compared with its SHA-256 in the manifest before its first read. `verified` leaves this out, for the workers of a run
    whose driver called `verify`. Raises `CappyError` if `uri` has no finished set. `setting` is the name of the setting that errors
    report.
    """

    def __init__(self, uri: str, setting: str = "dataset", *, verified: bool = False) -> None:
        self.uri = storage.check_uri(uri, setting)
        self.manifest: dict[str, Any] = dict(artifacts.read_manifest(self.uri, "dataset", "generate"))
        self._entries = {artifacts.file_uri(self.uri, name, entry): entry for name, entry in self.manifest["files"].items()}
        self._verified = set(self._entries) if verified else set()

    def shards(self, split: str) -> list[str]:
        """Return the URIs of the Parquet files of a split, in order. Those of a combined set are in the folders of other sets."""
        files = self.manifest["files"]
        return [artifacts.file_uri(self.uri, name, files[name]) for name in sorted(files) if name.startswith(f"data/{split}/")]

    def verify(self, *splits: str) -> None:
        """Compare every shard of the splits with its SHA-256 in the manifest, once for this object.

        A Parquet file has no checksum for its footer. Raises `CappyError`, which names the shard.
        """
        pending = [uri for split in splits for uri in self.shards(split) if uri not in self._verified]
        if pending:
            with ThreadPoolExecutor(_VERIFY_THREADS) as pool, Bar("checking", len(pending), "shards") as bar:
                for _ in pool.map(self.verify_shard, pending):
                    bar.advance()

    def verify_shard(self, uri: str) -> None:
        """Compare one shard with its SHA-256 in the manifest, as `verify` does."""
        if uri in self._verified:
            return
        entry = self._entries[uri]
        try:
            reason = None if storage.sha256(uri) == entry["sha256"] else "its SHA-256 differs from the manifest"
        except OSError as error:
            reason = first_line(error)
        if reason and "uri" in entry:
            raise CappyError(f"{uri} was changed or deleted ({reason}), and {self.uri} refers to it; run `cappy combine` again")
        if reason:
            raise _damaged(uri, reason)
        self._verified.add(uri)

    def rows(self, split: str) -> int:
        """Return the number of instructions of a split."""
        return int(self.manifest["counts"].get(split, {}).get("instructions", 0))

    def greedy(self) -> str | None:
        """Return the name of the first decoding with temperature 0; None if the set has none."""
        decodings = self.manifest.get("config", {}).get("sampler", {}).get("decodings", [])
        return next((each["name"] for each in decodings if each["temperature"] == 0), None)

    def batches(self, split: str, rows: int = 1024, columns: Sequence[str] | None = None, only: str | None = None) -> Iterator[pa.Table]:
        """Yield the rows of a split in order, as tables of at most `rows` rows; memory holds one table at a time.

        With `only`, yield only the rows of that dataset; `columns` must then include `dataset`. Row groups whose statistics
        exclude the dataset are not read. Raises `CappyError` if a shard is missing, its SHA-256 or its page checksums do not match,
        or the number of rows differs from the manifest.
        """
        seen = 0
        for uri in self.shards(split):
            self.verify_shard(uri)
            with open_shard(uri) as parquet:
                groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
                selected = [number for number, group in enumerate(groups) if only is None or _may_contain(group, only)]
                seen += sum(group.num_rows for number, group in enumerate(groups) if number not in selected)
                for batch in parquet.iter_batches(batch_size=rows, row_groups=selected, columns=list(columns) if columns else None):
                    seen += batch.num_rows
                    table = pa.Table.from_batches([batch])
                    if only is not None:
                        table = table.filter(pc.equal(table["dataset"], only))
                    if table.num_rows:
                        yield table
        self.check_row_count(split, seen)

    def check_row_count(self, split: str, count: int) -> None:
        """Raise `CappyError` if `count`, the rows read from a split, differs from the manifest."""
        if count != self.rows(split):
            raise CappyError(
                f"{self.uri} has {count} rows in split {split}, its manifest has {self.rows(split)}; copy or generate the set again"
            )

    def pairs(self, split: str, rows: int = 1024) -> Iterator[Pairs]:
        """Yield the pairs of a split in order, one `Pairs` for each `rows` instructions; see `explode`."""
        offset = 0
        for table in self.batches(split, rows, ["instruction", "candidates"]):
            yield explode(table, offset)
            offset += table.num_rows

    def to_pandas(self, split: str = "train") -> pandas.DataFrame:
        """Return a split as one DataFrame with one row per instruction."""
        return pa.concat_tables(self.batches(split)).to_pandas()

    def to_huggingface(self, split: str = "train") -> datasets.Dataset:
        """Return a split as a Hugging Face dataset with one row per instruction."""
        import datasets

        return datasets.Dataset(pa.concat_tables(self.batches(split)))

    def to_ray(self, split: str = "train") -> ray.data.Dataset:
        """Return a split as a Ray dataset that streams the shards; one row per instruction.

        Raises `CappyError` if the set has no such split.
        """
        import ray.data

        self.verify(split)
        shards = self.shards(split)
        if not shards:
            raise CappyError(f"{self.uri} has no split {split!r}; it has {', '.join(self.manifest['counts'])}")
        # The shards of a combined set can be on the disk and in object storage.
        stores = [[storage.filesystem(uri) for uri in part] for _, part in itertools.groupby(shards, storage.is_s3)]
        first, *others = [ray.data.read_parquet([path for _, path in part], filesystem=part[0][0]) for part in stores]
        return first.union(*others) if others else first


@contextmanager
def open_shard(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a shard; reads inside the block verify its page checksums.

    Raises `CappyError` if the file is missing or damaged, also for reads inside the block.
    """
    fs, path = storage.filesystem(uri)
    try:
        with fs.open_input_file(path) as file:
            yield pq.ParquetFile(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException, ValueError, KeyError, OverflowError) as error:
        raise _damaged(uri, first_line(error)) from None


def _damaged(uri: str, reason: str) -> CappyError:
    return CappyError(f"{uri} is damaged or missing ({reason}); copy or generate the set again")


def concat_tables(tables: Iterable[pa.Table], limit: int, size: Callable[[pa.Table], int] = len) -> Iterator[pa.Table]:
    """Yield the tables in order, concatenated until each result has a size of at least `limit`; the last can be smaller.

    `size` measures a table; the default is its number of rows.
    """
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(map(size, pending)) >= limit:
            yield pa.concat_tables(pending)
            pending = []
    if pending:
        yield pa.concat_tables(pending)


def _may_contain(group: pq.RowGroupMetaData, dataset: str) -> bool:
    """Return whether a row group can have rows of a dataset, by the minimum and maximum name in its statistics."""
    column = next(column for column in map(group.column, range(group.num_columns)) if column.path_in_schema == "dataset")
    names = column.statistics
    return names is None or not names.has_min_max or names.min <= dataset <= names.max


def explode(table: pa.Table, offset: int = 0) -> Pairs:
    """Return the pairs of a table of rows, in order, without duplicate responses of an instruction.

    The label of duplicates is their maximum: a sampled response that equals a reference is correct. Empty responses are
    kept, because they are wrong responses. `offset` is the position of the first row in its split.
    """
    instructions: list[str] = []
    responses: list[str] = []
    labels: list[float] = []
    groups: list[int] = []
    for index, row in enumerate(table.select(["instruction", "candidates"]).to_pylist()):
        best: dict[str, float] = {}
        for candidate in row["candidates"]:
            best[candidate["response"]] = max(candidate["label"], best.get(candidate["response"], 0.0))
        instructions += [row["instruction"]] * len(best)
        responses += best.keys()
        labels += best.values()
        groups += [offset + index] * len(best)
    return Pairs(instructions, responses, np.asarray(labels, np.float32), np.asarray(groups, np.int64))


def pair_table(table: pa.Table) -> pa.Table:
    """Return a table of pairs (columns of `schema.PAIRS`): one row per candidate, in order, duplicates included."""
    candidates = table["candidates"].combine_chunks()
    flat = candidates.flatten()
    repeated = table.select(["instruction", "dataset", "template", "id"]).take(pc.list_parent_indices(candidates))
    columns = [repeated[name] if name in repeated.column_names else flat.field(name) for name in PAIRS.names]
    return pa.table(columns, schema=PAIRS)


def compute_statistics(table: pa.Table) -> dict[str, Any]:
    """Count the rows and candidates of a table; `add_statistics` adds the results of several tables.

    Returns:
        `instructions`, `pairs` and `tokens` are totals. `sources` and `decodings` count candidates by name, `datasets`
        counts instructions by name. `labels` counts candidates in `LABEL_BINS` equal bins of [0, 1], of which the last
        includes 1; `source_labels` has the same counts for each source.
    """
    candidates = pa.concat_arrays(table["candidates"].chunks) if table.num_rows else pa.array([], table.schema.field("candidates").type)
    flat = candidates.flatten()
    label = flat.field("label").to_numpy(zero_copy_only=False)
    bins = np.minimum((label * LABEL_BINS).astype(int), LABEL_BINS - 1)
    source = flat.field("source").dictionary_encode()
    names = source.dictionary.to_pylist()
    cells = source.indices.to_numpy(zero_copy_only=False) * LABEL_BINS + bins
    by_source = np.bincount(cells, minlength=len(names) * LABEL_BINS).reshape(len(names), LABEL_BINS).tolist()
    return {
        "instructions": table.num_rows,
        "pairs": len(flat),
        "tokens": int(np.nansum(flat.field("tokens").to_numpy(zero_copy_only=False).astype(float))) if len(flat) else 0,
        "sources": _count_values(flat.field("source")),
        "decodings": _count_values(flat.field("decoding").drop_null()),
        "datasets": _count_values(table["dataset"]),
        "labels": np.bincount(bins, minlength=LABEL_BINS).tolist(),
        "source_labels": dict(sorted(zip(names, by_source, strict=True))),
    }


def add_statistics(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Return the sum of two results of `compute_statistics`, with sorted keys."""
    return {key: _add(left.get(key), right.get(key)) for key in sorted(left.keys() | right.keys())}


def _add(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return add_statistics(a, b)
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    return a + b


def _count_values(values: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in sorted(values.value_counts().to_pylist(), key=lambda item: item["values"])}
