"""From finished units to the published Parquet shards: which units make a shard, its name, and writing it in bounded memory.

A shard's name carries the run that wrote it, so no run ever writes over the shard of another one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import CappyError
from generation import dataset, units
from generation.schema import DATASET, SPLITS

# Sets of older versions have shards without a run in their names.
_NAME = re.compile(rf"data/(?:{'|'.join(SPLITS)})/part-\d{{5,}}(?:-([0-9a-f]{{8}}))?\.parquet")


def group_by_size(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Cut names in order into groups whose sizes (bytes) add up to at most `limit`; a larger one stands alone."""
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
    """Return the path of a shard within its set; `run` is the 8 hex digits of the lease its writer holds."""
    return f"data/{split}/part-{number:05d}-{run}.parquet"


def remove_superseded(uri: str, published: Iterable[str], check: Callable[[], None]) -> None:
    """Remove the shards that earlier runs left unpublished, once `check` passed; `published` are the paths to keep.

    What another run writes after `check` has other names, so it stays.
    """
    left = sorted(name for name in _list_data_files(uri).difference(published) if _NAME.fullmatch(name))
    check()
    storage.delete_files(uri, left)


def remove_own(uri: str, run: str) -> None:
    """Remove the shards that one run wrote, at the end of a run that lost its lease."""
    found = {name: _NAME.fullmatch(name) for name in _list_data_files(uri)}
    storage.delete_files(uri, [name for name, match in found.items() if match and match[1] == run])


def _list_data_files(uri: str) -> set[str]:
    """The files below `data/`, without those that are still being written."""
    names = {f"data/{name}" for name in storage.list_files(storage.join(uri, "data"))}
    return {name for name in names if not name.split("/")[-1].startswith(".")}


def write_shard(names: Sequence[str], staging: str, target: str, row_group_rows: int, check: Callable[[], None]) -> dict[str, Any]:
    """Merge units into the shard `target`, their dead letters into `{staging}/letters`, one unit in memory at a time.

    `check` raises where the run has lost its lease; it is called before anything is written.
    Returns `entry` (bytes, rows and SHA-256 for the manifest), `statistics`, `letters`, their number, and `cost` in dollars.
    """
    statistics: dict[str, Any] = {}
    letters: list[str] = []
    cost = 0.0
    with tempfile.TemporaryDirectory(prefix="cappy-shard-") as folder:
        file = Path(folder, "shard.parquet")
        with pq.ParquetWriter(file, DATASET, compression="zstd", write_page_checksum=True) as writer:
            waiting: list[pa.Table] = []
            for name in names:
                table = _read(staging, name)
                beside = units.unit_metadata(table)
                letters += beside["letters"]
                cost += beside["counts"]["cost"]
                statistics = dataset.add_statistics(statistics, dataset.compute_statistics(table))
                waiting.append(table.replace_schema_metadata(None).cast(DATASET))
                if sum(map(len, waiting)) >= row_group_rows:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=row_group_rows)
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting), row_group_size=row_group_rows)
        check()
        entry = storage.upload_file(file, target) | {"rows": statistics["instructions"]}
    storage.write_bytes(dead_letters_uri(staging, target), "".join(f"{line}\n" for line in letters).encode())
    return {"entry": entry, "statistics": statistics, "letters": len(letters), "cost": cost}


def dead_letters_uri(staging: str, target: str) -> str:
    """Where the dead letters of the units in a shard stand until the set is published."""
    return storage.join(staging, "letters", "-".join(target.split("/")[-2:]) + ".jsonl")


def _read(staging: str, name: str) -> pa.Table:
    uri = units.unit_uri(staging, "units", name)
    try:
        return units.read_unit(uri)
    except FileNotFoundError:
        raise CappyError(f"{uri} is gone since it was written; run `cappy generate` again to sample it anew") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise CappyError(
            f"{uri} is damaged ({str(error).splitlines()[0]}); delete it and run `cappy generate` again to sample it anew"
        ) from None
