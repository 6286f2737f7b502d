"""Publish an evaluation: the lease and the checks of its destination, its files, and the manifest. Imports no Ray and no torch."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, folder_writer, lease, storage
from cluster.config import Config
from cluster.lease import Lease

VERSION = 1
_RUN_MARKER = "_staging/run.json"
_LEASE = "_lease"
_OWNED = artifacts.OwnedFiles(
    "evaluation",
    "evaluate",
    (r"_lease/\d+\.json", r"_staging/run\.json"),
    r"_staging/run\.json",
    (r"results\.json|rows\.parquet|report\.html|config\.yaml",),
)


@contextmanager
def hold_destination(config: Config, *, overwrite: bool) -> Iterator[Lease]:
    """Hold the lease of `config.evaluation_uri`; it is kept beside the files as `_lease`.

    Raises `UsageError` if the folder holds other files, or a published evaluation and `overwrite` is false. Raises `CappyError` if
    another run holds the lease.
    """
    uri = storage.check_uri(config.evaluation_uri, "evaluation_path")
    _check(uri, overwrite)
    with lease.hold(storage.join(uri, _LEASE), f"evaluation_path={uri}", keep=False) as held:
        _check(uri, overwrite)
        yield held


def _check(uri: str, overwrite: bool) -> None:
    if not overwrite:
        artifacts.refuse_published(uri, "evaluation_path", "evaluate")
    artifacts.refuse_foreign(uri, "evaluation_path", _OWNED, overwrite=overwrite)


def publish_evaluation(
    config: Config,
    results: Mapping[str, Any],
    rows: pa.Table,
    page: str,
    summary: Mapping[str, Any],
    overwrite: bool,
    held: Lease,
    **facts: Any,
) -> None:
    """Write the files, then the manifest. With `overwrite` an earlier evaluation is deleted first.

    Args:
        config: the whole config; the destination is `config.evaluation_uri`.
        results: the content of `results.json`. Its key `made` has `created`, `dataset` and `scorer`.
        rows: the content of `rows.parquet`.
        page: the content of `report.html`.
        summary: the summary of the verb, for the manifest.
        overwrite: whether a published evaluation is replaced.
        held: the lease of the destination.
        **facts: further keys of the manifest.
    """
    uri = storage.check_uri(config.evaluation_uri, "evaluation_path")
    made = results["made"]
    artifacts.clear_destination(uri, "evaluation_path", _OWNED, _LEASE, held.check, overwrite=overwrite)
    folder = folder_writer.FolderWriter(uri, held.check)
    # If this run stops before the manifest exists, this file shows the next run that the other files belong to an evaluation.
    folder.write_json(_RUN_MARKER, {"scorer": config.scorer_uri, "dataset": config.dataset_uri})
    files = {
        "results.json": folder.write_json("results.json", results),
        "rows.parquet": folder.write_bytes("rows.parquet", _parquet(rows)),
        "report.html": folder.write_bytes("report.html", page.encode()),
        "config.yaml": folder.write_bytes("config.yaml", config.to_yaml().encode()),
    }
    artifacts.publish_folder(
        uri,
        "evaluation",
        version=VERSION,
        created=made["created"],
        dataset=made["dataset"],
        scorer=made["scorer"],
        **facts,
        summary=summary,
        config=config,
        files=files,
        check=held.check,
    )
    artifacts.cleanup(storage.join(uri, "_staging"), held.check)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
