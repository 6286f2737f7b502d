"""From finished units to the published Parquet shards: which units make a shard, and writing one in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import CappyError
from generation import dataset, units
from generation.schema import DATASET


def fill(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
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


def write(names: Sequence[str], staging: str, target: str, row_group_rows: int) -> dict[str, Any]:
    """Merge units into the shard `target`, their dead letters into `{staging}/letters`, one unit in memory at a time.

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
                beside = units.metadata(table)
                letters += beside["letters"]
                cost += beside["counts"]["cost"]
                statistics = dataset.add_statistics(statistics, dataset.statistics(table))
                waiting.append(table.replace_schema_metadata(None).cast(DATASET))
                if sum(map(len, waiting)) >= row_group_rows:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=row_group_rows)
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting), row_group_size=row_group_rows)
        entry = storage.upload_file(file, target) | {"rows": statistics["instructions"]}
    storage.write_bytes(letters_of(staging, target), "".join(f"{line}\n" for line in letters).encode())
    return {"entry": entry, "statistics": statistics, "letters": len(letters), "cost": cost}


def letters_of(staging: str, target: str) -> str:
    """Where the dead letters of the units in a shard stand until the set is published."""
    return storage.join(staging, "letters", "-".join(target.split("/")[-2:]) + ".jsonl")


def _read(staging: str, name: str) -> pa.Table:
    uri = units.place(staging, "units", name)
    try:
        return units.read(uri)
    except FileNotFoundError:
        raise CappyError(f"{uri} is gone since it was written; run `cappy generate` again to sample it anew") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise CappyError(
            f"{uri} is damaged ({str(error).splitlines()[0]}); delete it and run `cappy generate` again to sample it anew"
        ) from None
