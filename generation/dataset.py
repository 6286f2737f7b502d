"""A published regression set, opened: rows, pairs, statistics; as a Ray, Hugging Face or pandas dataset.

Layout: `data/{split}/part-*.parquet` (one row an instruction, candidates as a list of structs), `dead_letters.jsonl`,
`config.yaml`, the card (`README.md`, `labels.svg`), and `_MANIFEST.json` written last. Only a set with a manifest opens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import CappyError
from generation.schema import PAIRS

if TYPE_CHECKING:
    import datasets
    import pandas
    import ray.data

LABEL_BINS = 10
WORKING_FILES = (
    r"_lease/\d+\.json",
    r"_staging/(run|prepared)\.json",
    r"_staging/prepared/(dead_letters\.jsonl|decontamination\.json)",
    r"_staging/(prepared|units)/(train|validation)-\d+\.parquet",
    r"_staging/letters/(train|validation)-part-[^/]+\.jsonl",
    r"data/(train|validation)/part-\d{5,}-[0-9a-f]{8}\.parquet",
    r"_staging/promises/(train|validation)-\d+-[0-9a-f]{32}\.json",
)
"""The files of an unfinished set (its shards have their run in their names), as `storage.Owned` takes them."""
RESULT_FILES = (
    r"data/(train|validation)/part-\d{5,}\.parquet",
    r"config\.yaml|README\.md|labels\.svg|dead_letters\.jsonl|decontamination\.json",
)
"""The files of a set beside its manifest."""


@dataclass(frozen=True)
class Pairs:
    """Columns of exploded (instruction, response) pairs, all of one length."""

    instructions: list[str]
    responses: list[str]
    labels: np.ndarray
    """float32, in [0, 1]."""
    groups: np.ndarray
    """int64: position of the pair's instruction in its split."""

    def __len__(self) -> int:
        return len(self.instructions)


class RegressionSet:
    """A published set. `RegressionSet(uri)` raises `CappyError` where no finished set is."""

    def __init__(self, uri: str, setting: str = "dataset") -> None:
        self.uri = storage.check_uri(uri, setting)
        self.manifest = storage.read_manifest(self.uri, "dataset", "generate")

    def shards(self, split: str) -> list[str]:
        """Return the URIs of a split's Parquet files in order."""
        prefix = f"data/{split}/"
        return [storage.join(self.uri, name) for name in sorted(self.manifest["files"]) if name.startswith(prefix)]

    def rows(self, split: str) -> int:
        return int(self.manifest["counts"].get(split, {}).get("instructions", 0))

    def greedy(self) -> str | None:
        """Return the name of the decoding without chance, None where the set was sampled without one."""
        decodings = self.manifest.get("config", {}).get("sampler", {}).get("decodings", [])
        return next((each["name"] for each in decodings if each["temperature"] == 0), None)

    def batches(self, split: str, rows: int = 1024, columns: Sequence[str] | None = None, only: str | None = None) -> Iterator[pa.Table]:
        """Yield a split's rows in order as tables of at most `rows` rows, holding one of them in memory.

        With `only` the rows of that dataset alone (`columns` must have `dataset`); what surely holds none of them is not read.
        Raises `CappyError` when a shard is damaged (its pages carry checksums) or shorter than the manifest says.
        """
        seen = 0
        for uri in self.shards(split):
            fs, path = storage.filesystem(uri)
            try:
                with fs.open_input_file(path) as file:
                    parquet = pq.ParquetFile(file, page_checksum_verification=True)
                    groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
                    wanted = [number for number, group in enumerate(groups) if only is None or _may_contain(group, only)]
                    seen += sum(group.num_rows for number, group in enumerate(groups) if number not in wanted)
                    for batch in parquet.iter_batches(batch_size=rows, row_groups=wanted, columns=list(columns) if columns else None):
                        seen += batch.num_rows
                        table = pa.Table.from_batches([batch])
                        if only is not None:
                            table = table.filter(pc.equal(table["dataset"], only))
                        if table.num_rows:
                            yield table
            except (OSError, pa.ArrowInvalid) as error:
                raise CappyError(f"{uri} is damaged or missing ({str(error).splitlines()[0]}); copy or generate the set again") from None
        if seen != self.rows(split):
            raise CappyError(f"{self.uri} has {seen} rows in split {split}, its manifest says {self.rows(split)}; generate it again")

    def pairs(self, split: str, rows: int = 1024) -> Iterator[Pairs]:
        """Yield a split's (instruction, response) pairs batch by batch, in order; see `explode`."""
        offset = 0
        for table in self.batches(split, rows, ["instruction", "candidates"]):
            yield explode(table, offset)
            offset += table.num_rows

    def to_pandas(self, split: str = "train") -> pandas.DataFrame:
        """Return a split as one DataFrame, a row an instruction."""
        return pa.concat_tables(self.batches(split)).to_pandas()

    def to_huggingface(self, split: str = "train") -> datasets.Dataset:
        """Return a split as a Hugging Face dataset."""
        import datasets

        return datasets.Dataset(pa.concat_tables(self.batches(split)))

    def to_ray(self, split: str = "train") -> ray.data.Dataset:
        """Return a split as a Ray dataset that streams the shards."""
        import ray.data

        located = [storage.filesystem(uri) for uri in self.shards(split)]
        if not located:
            raise CappyError(f"{self.uri} has no split {split!r}; it has {', '.join(self.manifest['counts'])}")
        return ray.data.read_parquet([path for _, path in located], filesystem=located[0][0])


def _may_contain(group: pq.RowGroupMetaData, dataset: str) -> bool:
    """Whether a row group can have rows of a dataset, by the least and the greatest name that its statistics give."""
    column = next(column for column in map(group.column, range(group.num_columns)) if column.path_in_schema == "dataset")
    names = column.statistics
    return names is None or not names.has_min_max or names.min <= dataset <= names.max


def explode(table: pa.Table, offset: int = 0) -> Pairs:
    """Return the pairs of a table of rows, in order, exact repeats of a response within an instruction left out.

    A repeat keeps the best of its labels (a reference also sampled is right). Empty responses are kept: they are wrong.
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
    """Return a table of rows as a plain table of pairs (columns of `schema.PAIRS`): a row a candidate, in order, repeats kept."""
    candidates = table["candidates"].combine_chunks()
    flat = candidates.flatten()
    repeated = table.select(["instruction", "dataset", "template", "id"]).take(pc.list_parent_indices(candidates))
    columns = [repeated[name] if name in repeated.column_names else flat.field(name) for name in PAIRS.names]
    return pa.table(columns, schema=PAIRS)


def compute_statistics(table: pa.Table) -> dict[str, Any]:
    """Return counts of a table of rows that add up over tables: `instructions`, `pairs`, `tokens`, histograms.

    `sources`, `decodings` and `datasets` count candidates (datasets: instructions) by name; `labels` counts candidates in
    `LABEL_BINS` equal bins of [0, 1], the last closed, and `source_labels` the same for each source.
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
    """Return the sum of two results of `statistics`, keys in order."""
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
