"""`cappy push --pairs` and `cappy export --as pairs --duplicates`: publish the (instruction, response) pairs of a set as plain Parquet.

Each shard is downloaded, verified against the SHA-256 in the manifest, converted and written. The manifest is written last.
The work runs in threads of this process and imports no Ray, so a machine without a cluster can run it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, disk, storage
from cluster.config import fingerprint
from cluster.copying import LEASE, SCRATCH_FOLDER, CopySession, copy_summary, hold_destination, is_already_copied, refuse_other_files
from cluster.errors import CappyError
from generation import dataset_card
from generation.dataset import RegressionSet, concat_tables, pair_table
from generation.schema import PAIRS

# Each thread has a row group of pairs in memory.
_PAIR_THREADS = 4
_ROW_GROUP_BYTES = 64 << 20


_OWNED = artifacts.OwnedFiles(
    "pairs",
    "export",
    (rf"{LEASE}/\d+\.json", rf"{SCRATCH_FOLDER}/[^/]+"),
    r"_export\.json",
    (r"data/[^/]+/part-[^/]+\.parquet", r"config\.yaml|README\.md|labels\.svg"),
)


def export_pairs(source: str, destination: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Publish the pairs of a set as Parquet shards with the columns of `schema.PAIRS`, one for each shard of the set.

    A row is one pair; duplicates within an instruction are included. Memory holds one row group per thread. After an
    interruption, the same command starts again. `overwrite` replaces pairs that are published at the destination. Returns the same
    summary and raises the same errors as `cluster.copying.copy_folder`.
    """
    destination = storage.check_uri(destination, "DST")
    opened = RegressionSet(source, "SRC")
    manifest, source = opened.manifest, opened.uri
    shards = {name: entry for name, entry in manifest["files"].items() if name.startswith("data/")}
    made_from = {"uri": source, "fingerprint": fingerprint(manifest["files"])}
    if overwrite:
        artifacts.refuse_nested(source, destination)
        artifacts.refuse_foreign(destination, "DST", _OWNED, overwrite=True)
    elif is_already_copied(destination, lambda there: there.get("made_from", {}).get("fingerprint") == made_from["fingerprint"]):
        return copy_summary(destination, "pairs", source, shards, ())
    names = {*shards, "config.yaml", "README.md", "labels.svg"}
    if not overwrite:
        refuse_other_files(destination, names)
    start = time.monotonic()
    owned = _OWNED if overwrite else None
    with (
        hold_destination(destination, names, owned, overwrite=overwrite) as check,
        CopySession(destination, len(shards), check) as copying,
    ):

        def export_shard(name: str) -> dict[str, Any]:
            with copying.scratch() as shard, copying.scratch() as pairs:
                copying.fetch(artifacts.file_uri(source, name, shards[name]), shards[name], shard)
                with disk.errors_of(pairs.parent):
                    rows = _write_pairs(shard, pairs)
                entry = {"bytes": pairs.stat().st_size, "sha256": storage.sha256(str(pairs)), "rows": rows}
                copying.place(pairs, name)
            return entry

        written = dict(sorted(copying.each(export_shard, shards, _PAIR_THREADS)))
        settings = manifest["files"]["config.yaml"]
        with copying.scratch() as file:
            copying.fetch(storage.join(source, "config.yaml"), settings, file)
            copying.place(file, "config.yaml")
        for split, counts in manifest["counts"].items():
            found = sum(entry["rows"] for name, entry in written.items() if name.startswith(f"data/{split}/"))
            if found != counts["pairs"]:
                raise CappyError(
                    f"SRC={source} has {found} pairs in split {split}, its manifest has {counts['pairs']}; copy or generate the set again"
                )
        summary = {**manifest["summary"], "uri": destination, "dead_letters": 0, "seconds": round(time.monotonic() - start, 1)}
        artifacts.publish_folder(
            destination,
            "pairs",
            version=manifest["version"],
            command="cappy push --pairs",
            made_from=made_from,
            counts=manifest["counts"],
            metric=manifest["metric"],
            lineage=manifest["lineage"],
            **({"combines": manifest["combines"]} if "combines" in manifest else {}),
            schema={field.name: str(field.type) for field in PAIRS},
            summary=summary,
            config=manifest["config"],
            files=written | {"config.yaml": settings},
            describe=lambda uri, manifest: dataset_card.write_card(uri, manifest, check),
            check=check,
        )
    return copy_summary(destination, "pairs", source, written, written, time.monotonic() - start)


def _write_pairs(shard: Path, pairs: Path) -> int:
    """Write the pairs of a local shard to another local file; return their number."""
    count = 0
    with pq.ParquetFile(shard) as parquet, pq.ParquetWriter(pairs, PAIRS, compression="zstd", write_page_checksum=True) as writer:
        tables = (pair_table(pa.Table.from_batches([batch])) for batch in parquet.iter_batches(batch_size=256))
        for table in concat_tables(tables, _ROW_GROUP_BYTES, size=lambda table: table.nbytes):
            writer.write_table(table)
            count += table.num_rows
    return count
