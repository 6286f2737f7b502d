"""`cappy annotate`: compute the labels of a published regression set again, without sampling.

With `--feedback` it labels a log of served candidates instead; see `generation.feedback`.

Each shard is a Ray task: it downloads the shard, compares its SHA-256 with the manifest, and writes it under the same name
with the same rows and row groups. Only the labels of `sampled` candidates change. The manifest is written last. After an
interruption, the same command writes every shard again. `_staging/run.json` records the source and the metric, so that a run
with another source or metric is refused. Loads no LLM.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from cluster import artifacts, folder_writer, lease, storage
from cluster.config import Config, LabelConfig, differences
from cluster.errors import CappyError, UsageError
from cluster.lease import Lease
from cluster.progress import Bar
from cluster.redaction import redact_tree
from cluster.runtime import ray_session
from generation import dataset, dataset_card, labels
from generation.dataset import RegressionSet
from generation.feedback import RATING, run_feedback
from generation.schema import DATASET

_OWNED = artifacts.OwnedFiles("dataset", "annotate", dataset.WORKING_FILES, r"_staging/run\.json", dataset.RESULT_FILES)
_LEASE = "_lease"
# Rows labelled per call; limits the memory of a task.
_BATCH_ROWS = 1024


class AnnotatedShard(TypedDict):
    """The result of one task."""

    name: str
    """Path of the shard within the set."""
    entry: dict[str, Any]
    """Bytes, rows and SHA-256 of the shard, for the manifest."""
    statistics: dict[str, Any]
    """The result of `dataset.compute_statistics` for its rows."""


def run_annotate(config: Config, *, src: str, dst: str, feedback: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Publish the set at `src` at `dst`, with labels by `config.generate.label`; return the summary of the new set.

    With `feedback`, `src` is a log of served candidates; see `feedback.run_feedback`.

    Raises `UsageError` if `dst` equals, contains or is inside `src`, or if it has a finished run or a run with another
    source or metric. Raises `CappyError` if `src` is not published, if a file of it is damaged, or if another run holds the lease.
    """
    if feedback is not None:
        return run_feedback(config, src=src, dst=dst, feedback=feedback, overwrite=overwrite)
    start = time.monotonic()
    source = RegressionSet(src, "SRC")
    if source.manifest["metric"] == RATING:
        raise UsageError(f"SRC={src} has ratings as labels, and most of its rows have no references; label its log again with --feedback")
    uri = storage.check_uri(dst, "DST")
    artifacts.refuse_nested(source.uri, uri)
    if not overwrite:
        artifacts.refuse_published(uri, "DST", "annotate")
    artifacts.refuse_foreign(uri, "DST", _OWNED, overwrite=overwrite)
    with lease.hold(storage.join(uri, _LEASE), f"DST={uri}") as held:
        artifacts.clear_destination(uri, "DST", _OWNED, _LEASE, held.check, overwrite=overwrite)
        artifacts.refuse_published(uri, "DST", "annotate")
        artifacts.refuse_foreign(uri, "DST", _OWNED, overwrite=False)
        origin = {"uri": source.uri, "writer": source.manifest["writer"], "metric": source.manifest["metric"]}
        metric = labels.describe_metric(config.generate.label)
        held.check()
        _claim_destination(uri, {"relabelled_from": origin, "metric": metric})
        with ray_session():
            shards = _write_shards(source, uri, config.generate.label, held)
        summary = _publish(uri, source, shards, origin, config.generate.label, time.monotonic() - start, held)
        held.finish()
    return summary


def replace_labels(table: pa.Table, config: LabelConfig) -> pa.Table:
    """Return rows of a set with new labels of their sampled candidates, by `config`; all other values are unchanged."""
    table = table.combine_chunks()
    lists = table["candidates"].combine_chunks()
    candidates = lists.flatten()
    sampled = pc.equal(candidates.field("source"), "sampled").to_numpy(zero_copy_only=False)
    # `sampled_before[i]` is the number of sampled candidates before candidate i, the offset of its list without the others.
    sampled_before = np.concatenate([np.zeros(1, np.int32), sampled.cumsum(dtype=np.int32)])
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    responses = pa.ListArray.from_arrays(pa.array(sampled_before[offsets]), candidates.field("response").filter(pa.array(sampled)))
    new_labels = candidates.field("label").to_numpy().copy()
    new_labels[sampled] = _compute_labels(table, responses, config)
    fields = {field.name: candidates.field(field.name) for field in candidates.type} | {"label": pa.array(new_labels)}
    struct = pa.StructArray.from_arrays(list(fields.values()), fields=list(candidates.type))
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct, type=DATASET.field("candidates").type)
    return table.set_column(table.schema.get_field_index("candidates"), DATASET.field("candidates"), lists)


def _compute_labels(table: pa.Table, responses: pa.ListArray, config: LabelConfig) -> np.ndarray:
    """Return the labels of all responses. Raises `CappyError`, with the id of the row, if the label function of a user fails."""
    references, instructions = table["references"].combine_chunks(), table["instruction"].to_pylist()
    try:
        return labels.compute_labels(responses, references, config, instructions)
    except CappyError:
        for row, row_id in enumerate(table["id"].to_pylist()):
            try:
                labels.compute_labels(responses[row : row + 1], references[row : row + 1], config, instructions[row : row + 1])
            except CappyError as error:
                raise CappyError(f"{error} (row {row_id})") from None
        raise


def _claim_destination(uri: str, work: dict[str, Any]) -> None:
    """Record the source and the metric of the run, or check them against the record of an earlier attempt."""
    record = storage.join(uri, "_staging", "run.json")
    if storage.create_json(record, work):
        return
    started = {key: value for key, value in storage.read_json(record).items() if key != "writer"}
    if started != work:
        raise UsageError(
            f"DST={uri} was started with another source or metric ({'; '.join(differences(started, work))}); "
            f"use the same ones to resume, choose another DST, or start again with --overwrite"
        )


def _write_shards(source: RegressionSet, uri: str, config: LabelConfig, held: Lease) -> list[AnnotatedShard]:
    """Write every shard in a separate Ray task; return the results, sorted by name."""
    import ray

    entries = {name: entry for name, entry in source.manifest["files"].items() if name.startswith("data/")}
    task = ray.remote(num_cpus=1)(_write_shard)
    check = held.claim.check
    pending = [
        task.remote(artifacts.file_uri(source.uri, name, entry), uri, name, entry["sha256"], config, check)
        for name, entry in entries.items()
    ]
    shards = []
    with Bar("labelling", sum(entry["rows"] for entry in entries.values()), "instructions") as bar:
        while pending:
            (ready, *_), pending = ray.wait(pending)
            held.check(read_store=False)
            shard: AnnotatedShard = ray.get(ready)
            shards.append(shard)
            bar.advance(shard["entry"]["rows"], pairs=shard["statistics"]["pairs"])
    return sorted(shards, key=lambda shard: shard["name"])


def _write_shard(shard: str, uri: str, name: str, sha256: str, config: LabelConfig, check: Callable[[], None]) -> AnnotatedShard:
    """Download a shard, verify it, write it with new labels. `check` raises if another run has the destination."""
    statistics: dict[str, Any] = {}
    with storage.temporary_folder("relabel") as folder:
        old, new = folder / "old.parquet", folder / "new.parquet"
        try:
            found = storage.download_file(shard, old)
        except FileNotFoundError:
            raise _damaged(shard, "is missing") from None
        if found != sha256:
            raise _damaged(shard, "does not match the SHA-256 in its manifest")
        parquet = pq.ParquetFile(old, page_checksum_verification=True)
        with pq.ParquetWriter(new, DATASET, compression="zstd", write_page_checksum=True) as writer:
            for group in range(parquet.num_row_groups):
                batches = parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group])
                tables = [replace_labels(pa.Table.from_batches([batch]).cast(DATASET), config) for batch in batches]
                for table in tables:
                    statistics = dataset.add_statistics(statistics, dataset.compute_statistics(table))
                writer.write_table(pa.concat_tables(tables))
        entry = folder_writer.FolderWriter(uri, check).upload_file(new, name) | {"rows": statistics["instructions"]}
    return {"name": name, "entry": entry, "statistics": statistics}


def _damaged(file: str, problem: str) -> CappyError:
    return CappyError(f"SRC: {file} {problem}; copy or generate the set again")


def _publish(
    uri: str,
    source: RegressionSet,
    shards: list[AnnotatedShard],
    origin: dict[str, Any],
    label: LabelConfig,
    seconds: float,
    held: Lease,
) -> dict[str, Any]:
    """Write the files beside the shards, then the manifest; return the summary of the set."""
    manifest = source.manifest
    config = {**manifest["config"], "generate": {**manifest["config"]["generate"], "label": label.model_dump(mode="json")}}
    config_yaml = yaml.safe_dump(redact_tree(config), sort_keys=False, allow_unicode=True).encode()
    kept = {}
    folder = folder_writer.FolderWriter(uri, held.check)
    for name in ("dead_letters.jsonl", "decontamination.json"):
        data = storage.read_bytes(storage.join(source.uri, name))
        if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
            raise _damaged(storage.join(source.uri, name), "does not match the SHA-256 in its manifest")
        kept[name] = folder.write_bytes(name, data)
    total: dict[str, Any] = {}
    for shard in shards:
        total = dataset.add_statistics(total, shard["statistics"])
    summary = {**manifest["summary"], **total, "uri": uri, "seconds": round(seconds, 1)}
    kept["config.yaml"] = folder.write_bytes("config.yaml", config_yaml)
    files = {shard["name"]: shard["entry"] for shard in shards} | kept
    artifacts.publish_folder(
        uri,
        manifest["kind"],
        version=manifest["version"],
        command=f"cappy annotate SRC DST --set generate.label.metric={label.metric} --set generate.label.mode={label.mode}",
        counts=manifest["counts"],
        schema=manifest["schema"],
        metric=labels.describe_metric(label),
        lineage=manifest["lineage"],
        **{name: manifest[name] for name in (*dataset.SAMPLING_FACTS, "rates") if name in manifest},
        relabelled_from=origin,
        summary=summary,
        config=config,
        files=files,
        describe=lambda uri, manifest: dataset_card.write_card(uri, manifest, held.check),
        check=held.check,
    )
    artifacts.cleanup(storage.join(uri, "_staging"), held.check)
    return summary
