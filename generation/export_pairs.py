"""Copy a published folder between any two places, checked: `cappy push`, `cappy pull`, and the pairs of `push --pairs`.

Each file comes to a local file beside the destination first, its SHA-256 taken on the way; only one that matches the manifest
gets its name there, and the manifest is written last. Interrupted, the same copy goes on: files that are there and sound are
not copied again. Threads of one machine, not Ray: a copy waits on disks and on the network, hashing and compressing let go of
the interpreter, and so a laptop without a cluster can pull.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, storage
from cluster.config import fingerprint
from cluster.copying import CopySession, copy_summary, is_already_copied, refuse_other_files
from cluster.errors import CappyError
from cluster.runtime import code_version
from generation import dataset_card
from generation.dataset import RegressionSet, pair_table
from generation.schema import PAIRS

_PAIR_THREADS = 4  # each holds a row group of pairs
_ROW_GROUP_BYTES = 64 << 20


def export_pairs(source: str, destination: str) -> dict[str, Any]:
    """Publish the pairs of a set as plain Parquet shards (columns of `schema.PAIRS`), one for each of its own.

    A pair is a row, exact repeats within an instruction included. Holds a row group of each thread in memory. Interrupted, it
    starts over. Raises as `copy` does.
    """
    destination = storage.check_uri(destination, "DST")
    opened = RegressionSet(source, "SRC")
    manifest, source = opened.manifest, opened.uri
    shards = {name: entry for name, entry in manifest["files"].items() if name.startswith("data/")}
    made_from = {"uri": source, "fingerprint": fingerprint(manifest["files"])}
    if is_already_copied(destination, lambda there: there.get("made_from", {}).get("fingerprint") == made_from["fingerprint"]):
        return copy_summary(destination, "pairs", source, shards, ())
    refuse_other_files(destination, {*shards, "config.yaml", "README.md", "labels.svg"})
    start = time.monotonic()
    with CopySession(destination, len(shards)) as copying:

        def one(name: str) -> dict[str, Any]:
            with copying.scratch() as grouped, copying.scratch() as plain:
                copying.fetch(storage.join(source, name), shards[name], grouped)
                rows = _explode(grouped, plain)
                entry = {"bytes": plain.stat().st_size, "sha256": storage.sha256(str(plain)), "rows": rows}
                copying.place(plain, name)
            return entry

        written = dict(sorted(copying.each(one, shards, _PAIR_THREADS)))
        settings = manifest["files"]["config.yaml"]
        with copying.scratch() as file:
            copying.fetch(storage.join(source, "config.yaml"), settings, file)
            copying.place(file, "config.yaml")
    for split, counts in manifest["counts"].items():
        found = sum(entry["rows"] for name, entry in written.items() if name.startswith(f"data/{split}/"))
        if found != counts["pairs"]:
            raise CappyError(f"SRC={source} has {found} pairs in split {split}, its manifest says {counts['pairs']}; generate it again")
    kept = ("version", "counts", "metric", "lineage", "config")
    summary = {**manifest["summary"], "uri": destination, "dead_letters": 0, "seconds": round(time.monotonic() - start, 1)}
    made = {
        "kind": "pairs",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "command": "cappy push --pairs",
        "made_from": made_from,
        **{key: manifest[key] for key in kept},
        "summary": summary,
        "schema": {field.name: str(field.type) for field in PAIRS},
        "files": written | {"config.yaml": settings},
    }
    artifacts.publish(destination, dataset_card.write_card(destination, made))
    return copy_summary(destination, "pairs", source, written, written, time.monotonic() - start)


def _explode(grouped: Path, plain: Path) -> int:
    """Write the pairs of a local shard to another local file; return how many."""
    count = 0
    with pq.ParquetFile(grouped) as shard, pq.ParquetWriter(plain, PAIRS, compression="zstd", write_page_checksum=True) as writer:
        waiting: list[pa.Table] = []
        for batch in shard.iter_batches(batch_size=256):
            waiting.append(pair_table(pa.Table.from_batches([batch])))
            count += waiting[-1].num_rows
            if sum(table.nbytes for table in waiting) >= _ROW_GROUP_BYTES:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return count
