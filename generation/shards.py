"""Merge finished units into the Parquet shards of a set: group the units, name the shards, write them in bounded memory.

The name of a shard contains the id of the run that wrote it, so a run never overwrites a shard of another run. Imports no
Ray: `generation.generate` runs `write_shard` as a Ray task.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.disk import final_name
from cluster.errors import CappyError, first_line
from cluster.folder_writer import FolderWriter
from generation import dataset, units
from generation.schema import DATASET, SPLITS

# Shards of older versions have no run id in their names.
_NAME = re.compile(rf"data/(?:{'|'.join((*SPLITS, 'answers', 'scores'))})/part-\d{{5,}}(?:-([0-9a-f]{{8}}))?\.parquet")

_SHARD_ROWS, _ROW_GROUP_ROWS = 100_000, 1024
"""Rows of a shard and of a row group that `write_rows` makes."""


class MergedShard(TypedDict):
    """The result of `write_shard`."""

    entry: dict[str, Any]
    """Bytes, rows and SHA-256 of the shard, for the manifest."""
    statistics: dict[str, Any]
    """The result of `dataset.compute_statistics` for its rows."""
    letters: int
    """Number of dead letters of its units."""
    incomplete: int
    """The part of `letters` whose rows are in the shard, with the candidates of an earlier set."""
    cost: float
    """Dollars spent on its units."""
    sampled: int
    """Sampled candidates of its units; `generate.max_per_bin` can have removed some of them from the rows."""
    empty: int
    """The part of `sampled` without text."""
    missing: int
    """Candidates that a content filter stopped."""


def group_by_size(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Yield groups of names, in order, of at most `limit` bytes each; a name above the limit is a group alone."""
    group: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


def shard_path(split: str, number: int, run: str) -> str:
    """Return the path of a shard within its set; `run` is the run id of the writer's lease, 8 hex digits."""
    return f"data/{split}/part-{number:05d}-{run}.parquet"


def remove_superseded(uri: str, published: Iterable[str], check: Callable[[], None]) -> None:
    """Delete the shards, and their temporary files, that earlier runs wrote and did not publish; keep the paths in `published`.

    `check` raises if the run has lost its lease. It is called after the listing and before the deletion. Shards that
    another run writes later have other names and are not deleted.
    """
    superseded = sorted(name for name in _list_data_files(uri).difference(published) if _NAME.fullmatch(final_name(name) or name))
    check()
    storage.delete_files(uri, superseded)


def remove_own(uri: str, run: str) -> None:
    """Delete the shards that the run `run` wrote; a run calls it after it has lost its lease."""
    found = {name: _NAME.fullmatch(final_name(name) or name) for name in _list_data_files(uri)}
    storage.delete_files(uri, [name for name, match in found.items() if match and match[1] == run])


def _list_data_files(uri: str) -> set[str]:
    """Return the paths of the files below `data/`, with the temporary files that killed runs left."""
    return {f"data/{name}" for name in storage.list_files(storage.join(uri, "data"))}


def write_shard(names: Sequence[str], staging: str, target: str, row_group_rows: int, check: Callable[[], None]) -> MergedShard:
    """Merge units into one shard, and write their dead letters below `{staging}/letters`.

    Memory holds the rows of one row group and one unit at a time.

    Args:
        names: The units, in the order of their rows.
        staging: URI of the staging folder of the set.
        target: URI of the shard.
        row_group_rows: Rows of a row group of the shard.
        check: Raises if the run has lost its lease; it is called before the first write.
    """
    statistics: dict[str, Any] = {}
    letters: list[str] = []
    cost = 0.0
    counted: Counter[str] = Counter()

    def read_units() -> Iterator[pa.Table]:
        nonlocal statistics, cost
        for name in names:
            table = read_finished(staging, name)
            metadata = units.unit_metadata(table)
            letters.extend(metadata["letters"])
            cost += metadata["counts"]["cost"]
            counts = metadata["counts"]
            counted.update(sampled=counts["candidates"], empty=counts.get("empty", 0), missing=counts.get("missing", 0))
            counted.update(incomplete=counts.get("incomplete", 0))
            statistics = dataset.add_statistics(statistics, dataset.compute_statistics(table))
            yield table.replace_schema_metadata(None).cast(DATASET)

    entry = write_tables(read_units(), DATASET, target, row_group_rows, check)
    write_letters(staging, target, letters)
    return {
        "entry": entry,
        "statistics": statistics,
        "letters": len(letters),
        "incomplete": counted["incomplete"],
        "cost": cost,
        "sampled": counted["sampled"],
        "empty": counted["empty"],
        "missing": counted["missing"],
    }


def write_tables(
    tables: Iterable[pa.Table], schema: pa.Schema, target: str, row_group_rows: int, check: Callable[[], None]
) -> dict[str, Any]:
    """Write tables to the shard `target`, with page checksums; return its entry for the manifest. `check` is called before the upload."""
    rows = 0
    with storage.temporary_folder("shard") as folder:
        file = folder / "shard.parquet"
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in dataset.concat_tables(tables, row_group_rows):
                rows += len(table)
                writer.write_table(table, row_group_size=row_group_rows)
        check()
        return storage.upload_file(file, target) | {"rows": rows}


def write_rows(
    folder: FolderWriter, split: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Write the rows of each split, which are in memory, as shards of a set.

    Returns the entries of the shards for the manifest, `instructions` and `pairs` by split, and the statistics of all rows
    (`dataset.compute_statistics`).
    """
    files: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    total: dict[str, Any] = {}
    with storage.temporary_folder("shards") as scratch:
        for name, rows in split.items():
            counts[name] = {"instructions": 0, "pairs": 0}
            for number, first in enumerate(range(0, len(rows), _SHARD_ROWS)):
                table = pa.Table.from_pylist(rows[first : first + _SHARD_ROWS], DATASET)
                file = scratch / "shard.parquet"
                pq.write_table(table, file, compression="zstd", write_page_checksum=True, row_group_size=_ROW_GROUP_ROWS)
                shard = f"data/{name}/part-{number:05d}.parquet"
                files[shard] = folder.upload_file(file, shard) | {"rows": table.num_rows}
                statistics = dataset.compute_statistics(table)
                total = dataset.add_statistics(total, statistics)
                counts[name] = dataset.add_statistics(counts[name], {key: statistics[key] for key in counts[name]})
    return files, counts, total


def write_letters(staging: str, target: str, letters: Sequence[str]) -> None:
    """Write the dead letters of a shard's units, each a line of JSON, below `{staging}/letters`."""
    storage.write_bytes(dead_letters_uri(staging, target), "".join(f"{line}\n" for line in letters).encode())


def dead_letters_uri(staging: str, target: str) -> str:
    """Return the URI of the dead letters of a shard's units, which is used until the set is published."""
    return storage.join(staging, "letters", "-".join(target.split("/")[-2:]) + ".jsonl")


def read_finished(staging: str, name: str, verb: str = "generate") -> pa.Table:
    """Read the object of a finished unit. Raises `CappyError` if it is missing or damaged."""
    uri = units.unit_uri(staging, "units", name)
    try:
        return units.read_unit(uri)
    except FileNotFoundError:
        raise CappyError(f"{uri} was deleted after it was written; run `cappy {verb}` again to make it again") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise CappyError(f"{uri} is damaged ({first_line(error)}); delete it and run `cappy {verb}` again to make it again") from None
