"""`cappy combine`: publish several regression sets as one set, by reference. No LLM, no Ray.

The manifest of the combined set lists the shards of its sets with their locations and SHA-256. A reader refuses a shard that was changed
after the combination. `cappy push` copies the shards into one folder.

The sets must have different rows, so that a row has one pool of candidates. No instruction may be a train row of one set and a validation
row of another. Reads the ids and instructions of all rows; memory holds an id and a 64-bit hash for each row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from cluster import artifacts, folder_writer, lease, storage
from cluster.config import differences
from cluster.errors import UsageError
from cluster.progress import Bar
from generation import dataset, dataset_card, sampling_records
from generation.dataset import RegressionSet
from generation.schema import DATASET, SPLITS
from generation.sources.split import HeldOutTexts

_OWNED = artifacts.OwnedFiles("dataset", "combine", dataset.WORKING_FILES, r"_staging/run\.json", dataset.RESULT_FILES)
_LEASE = "_lease"
_READ_ROWS = 4096
_LETTERS = "dead_letters.jsonl"
# Counts of a summary that are added up. Sets of older versions do not have all of them.
_COUNTS = (
    *("instructions", "pairs", "tokens", "sources", "decodings", "datasets", "labels", "source_labels", "dead_letters", "decontaminated"),
    *("merged", "unseen_references", "empty_responses", "missing_responses", "incomplete"),
)


def run_combine(sources: Sequence[str], destination: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Publish the sets at `sources` as one set at `destination`; return its summary.

    The same combination that is already published is kept. `overwrite` replaces any other set there.

    Raises:
        UsageError: if the sets cannot be one set: equal rows, an instruction in different splits, or another label metric. Also if the
            destination has other files or another finished run.
        CappyError: if a set is not published or is damaged, or another run holds the lease.
    """
    start = time.monotonic()
    uri = storage.check_uri(destination, "DST")
    opened = [RegressionSet(source, "SRC") for source in sources]
    for each in opened:
        artifacts.refuse_nested(each.uri, uri)
    refuse_unfit(opened, uri)
    config = _unite_configs(opened)
    sets = [_describe(each) for each in opened]
    if not overwrite and (published := _find_same(uri, sets)):
        return published
    if not overwrite:
        artifacts.refuse_published(uri, "DST", "combine")
    artifacts.refuse_foreign(uri, "DST", _OWNED, overwrite=overwrite)
    with lease.hold(storage.join(uri, _LEASE), f"DST={uri}", keep=False) as held:
        refuse_equal_rows(opened)  # before an earlier set at the destination is deleted
        artifacts.clear_destination(uri, "DST", _OWNED, _LEASE, held.check, overwrite=overwrite)
        artifacts.refuse_foreign(uri, "DST", _OWNED, overwrite=False)
        return _publish(uri, opened, config, sets, start, held.check)


def refuse_unfit(opened: Sequence[RegressionSet], uri: str) -> None:
    """Raise `UsageError` if the manifests of the sets show that they cannot be one set at `uri`."""
    first = opened[0]
    if len({each.uri for each in opened}) < max(len(opened), 2):
        raise UsageError(f"SRC={', '.join(each.uri for each in opened)}: give two different sets or more")
    for each in opened[1:]:
        if changes := differences(first.manifest["metric"], each.manifest["metric"]):
            raise UsageError(
                f"SRC={each.uri} has labels of another metric than {first.uri} ({'; '.join(changes)}); "
                f"label one of them again with `cappy annotate`"
            )
        if each.manifest["schema"] != first.manifest["schema"]:
            raise UsageError(
                f"SRC={each.uri} has other columns than {first.uri}, because another version wrote it; annotate or generate it again"
            )
    local = next((each.uri for each in opened if any(not storage.is_s3(shard) for shard in _shards(each))), None)
    if storage.is_s3(uri) and local:
        raise UsageError(f"SRC={local} is on this machine, and readers of DST={uri} elsewhere cannot reach it; `cappy push` it first")


def refuse_equal_rows(opened: Sequence[RegressionSet]) -> None:
    """Raise `UsageError` if a row is in two sets, or an instruction is in different splits of two sets.

    Reads all rows, so `CappyError` is raised for a damaged shard.
    """
    ids: dict[str, pa.Array] = {}
    earlier: list[dict[str, HeldOutTexts]] = []
    clashes: list[tuple[str, str]] = []
    with Bar("comparing", sum(each.rows(split) for each in opened for split in each.manifest["counts"]), "instructions") as bar:
        for each in opened:
            chunks: list[pa.Array] = []
            own = {split: HeldOutTexts() for split in SPLITS}
            for split in each.manifest["counts"]:
                others = [texts[other] for texts in earlier for other in SPLITS if other != split]
                for table in each.batches(split, _READ_ROWS, ["id", "instruction"]):
                    chunks += table["id"].chunks
                    for text in table["instruction"].to_pylist():
                        own[split].add(text)
                        if any(text in other for other in others):
                            clashes.append((each.uri, text))
                    bar.advance(table.num_rows)
            earlier.append(own)
            # Sets of older versions can have a row for each reference, with equal ids.
            ids[each.uri] = pa.chunked_array(chunks, pa.string()).unique()
    counts = pa.chunked_array(list(ids.values())).value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(repeated):
        where = " and ".join(uri for uri, column in ids.items() if pc.any(pc.is_in(column, repeated)).as_py())
        raise UsageError(
            f"{len(repeated):,} rows are in more than one set ({where}), e.g. with id {repeated[0]}; a row has one pool of candidates: "
            f"`cappy extend` adds decodings or another LLM to the rows of a set"
        )
    if clashes:
        found, text = clashes[0]
        raise UsageError(
            f"{len(clashes):,} instructions of {found} are in another split in an earlier SRC, e.g. {text[:80]!r}; a scorer would be "
            f"validated on instructions that it was trained on: generate one of the sets as an extension of the other (`cappy extend`), "
            f"which keeps the splits"
        )


def _describe(opened: RegressionSet) -> dict[str, Any]:
    """Return the entry of a set in `combines` of the manifest."""
    manifest = opened.manifest
    return {
        "uri": opened.uri,
        "version": manifest.get("writer"),
        "instructions": sum(opened.rows(split) for split in manifest["counts"]),
        "config": manifest["config"],
    }


def _unite_configs(opened: Sequence[RegressionSet]) -> dict[str, Any]:
    """Return the settings of the first set, with the decodings of all sets. Raises as `sampling_records.unite_decodings` does."""
    decodings = sampling_records.unite_decodings({each.uri: each.manifest["config"]["sampler"]["decodings"] for each in opened})
    config = opened[0].manifest["config"]
    return {**config, "sampler": {**config["sampler"], "decodings": decodings}}


def _shards(opened: RegressionSet) -> list[str]:
    return [shard for split in opened.manifest["counts"] for shard in opened.shards(split)]


def _find_same(uri: str, sets: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the summary of the published combination of the same sets; None if there is none."""
    if not storage.exists(storage.join(uri, artifacts.MANIFEST)):
        return None
    manifest = artifacts.read_manifest(uri, "dataset", "combine")
    return dict(manifest["summary"]) if manifest.get("combines") == sets else None


def _entries(opened: Sequence[RegressionSet]) -> dict[str, dict[str, Any]]:
    """Return the entries of the shards of all sets, with their locations, numbered within each split."""
    entries: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        number = 0
        for each in opened:
            files = each.manifest["files"]
            for name in sorted(name for name in files if name.startswith(f"data/{split}/")):
                entries[f"data/{split}/part-{number:05d}.parquet"] = {**files[name], "uri": artifacts.file_uri(each.uri, name, files[name])}
                number += 1
    return entries


def _publish(
    uri: str,
    opened: Sequence[RegressionSet],
    config: dict[str, Any],
    sets: list[dict[str, Any]],
    start: float,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Write the settings, the dead letters and the card, then the manifest; return the summary."""
    manifests = [each.manifest for each in opened]
    folder = folder_writer.FolderWriter(uri, check)
    # If this run stops before the manifest exists, this file shows the next run that the other files are its own.
    folder.write_json("_staging/run.json", {"sources": [each.uri for each in opened]})
    letters = b"".join(storage.read_bytes(storage.join(each.uri, _LETTERS)) for each in opened if _LETTERS in each.manifest["files"])
    files = _entries(opened) | {
        "config.yaml": folder.write_bytes("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()),
        _LETTERS: folder.write_bytes(_LETTERS, letters),
    }
    total: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for manifest in manifests:
        total = dataset.add_statistics(total, {name: manifest["summary"][name] for name in _COUNTS if name in manifest["summary"]})
        counts = dataset.add_statistics(counts, manifest["counts"])
    files["decontamination.json"] = folder.write_json("decontamination.json", {"train_rows_left_out": total.get("decontaminated", 0)})
    counts = {split: counts[split] for split in SPLITS if split in counts}
    summary = {"dead_letters": 0, **total, "uri": uri, "splits": counts, "sets": len(sets), "seconds": round(time.monotonic() - start, 1)}
    artifacts.publish_folder(
        uri,
        "dataset",
        version=manifests[0]["version"],
        command="cappy combine SRC... DST",
        counts=counts,
        schema={field.name: str(field.type) for field in DATASET},
        metric=manifests[0]["metric"],
        lineage={"combines": [{"uri": each["uri"], "version": each["version"]} for each in sets]},
        combines=sets,
        sampling=sampling_records.unite_records([sampling_records.of_manifest(each.manifest, each.uri) for each in opened]),
        summary=summary,
        config=config,
        files=files,
        describe=lambda uri, manifest: dataset_card.write_card(uri, manifest, check),
        check=check,
    )
    artifacts.cleanup(storage.join(uri, "_staging"), check)
    return summary
