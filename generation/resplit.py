"""Publish a regression set with the rows and the sampled candidates of another set, and with other splits. No LLM, no Ray.

An evaluation in folds uses it: the candidates of all rows are sampled once, and each fold is a separate set. A mismatched reference of
the source set can be the reference of a row that is now a validation row. So mismatched references are drawn again, from the train rows
of the new split.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster import artifacts, folder_writer, lease, storage
from cluster.config import Config
from generation import dataset, dataset_card, labels, shards
from generation.dataset import RegressionSet
from generation.mismatched import draw_mismatched
from generation.schema import SPLITS
from generation.sources.row import Instruction

_OWNED = artifacts.OwnedFiles("dataset", "evaluate", dataset.WORKING_FILES, r"_staging/run\.json", dataset.RESULT_FILES)
_LEASE = "_lease"


def publish_resplit(source: RegressionSet, uri: str, setting: str, validation: Mapping[str, bool], note: Mapping[str, Any]) -> None:
    """Publish the rows of `source` at `uri` with other splits. A published set at `uri` made by the same note is kept.

    Args:
        source: the set with the rows and their candidates.
        uri: the destination. Its folder must be empty, or hold an interrupted run.
        setting: the setting that names the destination, for errors.
        validation: True for a validation row and False for a train row, by row id. Rows without an entry are left out.
        note: how the split was made, as JSON values. The manifest has it, with the URI of the source, as `resplit_from`.

    Raises:
        UsageError: if the folder has foreign files or a set that was made in another way; `cappy evaluate --overwrite` replaces it.
        CappyError: if the source is damaged, or another run holds the lease.
    """
    made = {"uri": source.uri, "writer": source.manifest.get("writer"), **note}
    if _is_published(uri, made):
        return
    start = time.monotonic()
    artifacts.refuse_foreign(uri, setting, _OWNED, overwrite=True)
    with lease.hold(storage.join(uri, _LEASE), f"{setting}={uri}", keep=False) as held:
        if _is_published(uri, made):
            return
        # A set of another source or split is a former result of this command, which this run replaces.
        artifacts.clear_destination(uri, setting, _OWNED, _LEASE, held.check, overwrite=True)
        rows = [row for split in source.manifest["counts"] for table in source.batches(split) for row in table.to_pylist()]
        split = {name: [row for row in rows if validation.get(row["id"]) is (name == "validation")] for name in SPLITS}
        config = _source_config(source)
        for rows_of_split in split.values():
            _redraw_mismatched(rows_of_split, split["train"], config)
        _publish(source, uri, split, made, start, held.check)


def _is_published(uri: str, made: Mapping[str, Any]) -> bool:
    if not storage.exists(storage.join(uri, artifacts.MANIFEST)):
        return False
    return artifacts.read_manifest(uri, "dataset", "evaluate").get("resplit_from") == made


def _source_config(source: RegressionSet) -> Config:
    """Return the settings of the source set that decide its mismatched references."""
    tree = source.manifest["config"]
    kept = {key: tree["generate"][key] for key in ("label", "mismatched", "hard_mismatched") if key in tree["generate"]}
    return Config.model_validate({"seed": tree["seed"], "generate": kept})


def _redraw_mismatched(rows: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]], config: Config) -> None:
    """Replace the mismatched references of `rows`, in place, by references of `train` rows of the same dataset."""
    pools: dict[tuple[str, str | None], list[Instruction]] = defaultdict(list)
    by_dataset: dict[str, list[Instruction]] = defaultdict(list)
    for each in map(_instruction, train):
        pools[each.dataset, each.template].append(each)
        by_dataset[each.dataset].append(each)
    generate = config.generate
    drawn = draw_mismatched(
        [_instruction(row) for row in rows],
        lambda row: [(by_dataset[row.dataset], generate.mismatched), (pools[row.dataset, row.template], generate.hard_mismatched)],
        config,
    )
    for row, texts in zip(rows, drawn, strict=True):
        sampled = [each for each in row["candidates"] if each["source"] == "sampled"]
        row["candidates"] = [*labels.unsampled_candidates({**row, "mismatched": texts}), *sampled]


def _instruction(row: Mapping[str, Any]) -> Instruction:
    choices = row["answer_choices"]
    return Instruction(
        dataset=row["dataset"],
        template=row["template"],
        split="train",
        instruction=row["instruction"],
        references=tuple(row["references"]),
        answer_choices=tuple(choices) if choices is not None else None,
    )


def _publish(
    source: RegressionSet,
    uri: str,
    split: Mapping[str, list[dict[str, Any]]],
    made: dict[str, Any],
    start: float,
    check: Callable[[], None],
) -> None:
    """Write shards, settings and card, then the manifest."""
    folder = folder_writer.FolderWriter(uri, check)
    # If this run stops before the manifest exists, this file shows the next run that the other files are its own.
    folder.write_json("_staging/run.json", made)
    manifest = source.manifest
    files = {"config.yaml": folder.write_bytes("config.yaml", storage.read_bytes(storage.join(source.uri, "config.yaml")))}
    files["dead_letters.jsonl"] = folder.write_bytes("dead_letters.jsonl", b"")
    if "decontamination.json" in manifest["files"]:
        overlap = storage.read_bytes(storage.join(source.uri, "decontamination.json"))
        files["decontamination.json"] = folder.write_bytes("decontamination.json", overlap)
    written, counts, total = shards.write_rows(folder, split)
    files |= written
    summary = {
        **manifest["summary"],
        **total,
        "uri": uri,
        "splits": counts,
        "dead_letters": 0,
        "seconds": round(time.monotonic() - start, 1),
    }
    artifacts.publish_folder(
        uri,
        "dataset",
        version=manifest["version"],
        command=manifest["command"],
        counts=counts,
        rates=manifest.get("rates", {}),
        schema=manifest["schema"],
        metric=manifest["metric"],
        lineage=manifest["lineage"],
        **{name: manifest[name] for name in dataset.SAMPLING_FACTS if name in manifest},
        resplit_from=made,
        summary=summary,
        config=manifest["config"],
        files=files,
        describe=lambda uri, manifest: dataset_card.write_card(uri, manifest, check),
        check=check,
    )
    artifacts.cleanup(storage.join(uri, "_staging"), check)
