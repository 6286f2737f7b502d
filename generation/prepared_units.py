"""Prepared units: read the source of a run, write its rows as units of `generate.unit_rows`, and count them. Imports no Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

from cluster import storage
from cluster.config import Config, MixtureSource
from cluster.errors import CappyError, UsageError
from cluster.folder_writer import FolderWriter
from cluster.lease import Lease
from cluster.progress import Bar, log
from generation import earlier_set, few_shot, reuse, sampling_records, shards, units
from generation.earlier_set import Extended
from generation.few_shot import PreparationCounts
from generation.reuse import Reused
from generation.row_plan import RowPlanner
from generation.schema import PREPARED, PREPARED_WITH_REUSE, SPLITS
from generation.sources import reader
from generation.sources.row import DeadLetter


class UnitWriter:
    """Write prepared rows as units of `unit_rows` rows below `{staging}/prepared`.

    Args:
        staging: URI of the staging folder.
        schema: columns of a row.
        splits: the splits; each has its own units.
        unit_rows: rows of a unit.
        run_lease: checked before each write.
    """

    def __init__(self, staging: str, schema: pa.Schema, splits: Sequence[str], unit_rows: int, run_lease: Lease) -> None:
        self._staging, self._schema, self._size, self._lease = staging, schema, unit_rows, run_lease
        self._pending: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        self.units = dict.fromkeys(splits, 0)
        """Number of units, by split."""
        self.counts = dict.fromkeys(splits, 0)
        """Number of rows, by split."""

    def add(self, split: str, row: dict[str, Any]) -> int:
        """Add a row; return the number of rows that were written."""
        self._pending[split].append(row)
        return self._write(split) if len(self._pending[split]) == self._size else 0

    def finish(self) -> int:
        """Write the rest of each split; return the number of rows that were written."""
        return sum(self._write(split) for split, rows in self._pending.items() if rows)

    def _write(self, split: str) -> int:
        self._lease.check(read_store=False)
        rows = self._pending[split]
        name = f"{split}-{self.units[split]:06d}"
        units.write_unit(units.unit_uri(self._staging, "prepared", name), pa.Table.from_pylist(rows, self._schema))
        self.units[split] += 1
        self.counts[split] += len(rows)
        self._pending[split] = []
        return len(rows)


class PreparedUnits(TypedDict):
    """The counts of the prepared units; `_staging/prepared.json` has them as JSON."""

    units: dict[str, int]
    """Number of units, by split."""
    counts: dict[str, int]
    """Number of instructions, by split."""
    rows: int
    """Number of instructions of all splits."""
    dead_letters: int
    """Number of rows of the source that cannot be used."""
    merged: NotRequired[int]
    """Number of repeated rows of the source that were merged into other rows. Runs of older versions have no such count."""
    sampled_rows: NotRequired[int]
    """Number of instructions to sample: the instructions without answer choices."""
    unseen_references: NotRequired[int]
    """Number of sampled instructions with a reference that the label metric cannot see."""
    too_long: NotRequired[int]
    """Number of rows that were left out because of `source.max_instruction_chars`, if any."""
    max_tokens: NotRequired[dict[str, int]]
    """Largest length of a candidate by dataset, in tokens; only with `sampler.max_tokens_from: references`."""
    reused: NotRequired[Reused]
    """The candidates from `generate.reuse`; only with this setting."""
    complete: NotRequired[int]
    """Number of instructions among `sampled_rows` whose candidates are all in earlier sets; only with `generate.reuse` or `extend`."""
    extends: NotRequired[Extended]
    """The rows and candidates from `generate.extend`; only with this setting, as the two below."""
    sampling: NotRequired[list[dict[str, Any]]]
    """How the candidates of the set were sampled; see `sampling_records`."""
    extended_config: NotRequired[dict[str, Any]]
    """The config of the extended set, so that the run can be resumed without it."""


def prepare(staging: str, config: Config, run_lease: Lease, inputs: Mapping[str, str] | None = None) -> PreparedUnits:
    """Write the prepared units, unless an earlier attempt wrote them; return their counts.

    `inputs` has the recorded versions of the folders that the run reads. Raises `CappyError` if the extended set has another one.
    """
    record = storage.join(staging, "prepared.json")
    if storage.exists(record):
        recorded: PreparedUnits = storage.read_json(record)
        return recorded
    found = PreparationCounts()
    planned = bool(config.generate.reuse or config.generate.extend)
    writer = UnitWriter(staging, PREPARED_WITH_REUSE if planned else PREPARED, SPLITS, config.generate.unit_rows, run_lease)
    counts = writer.counts

    def rows_to_sample() -> Iterator[tuple[str, dict[str, Any]] | DeadLetter]:
        for each in few_shot.prepare_rows(config, evaluation, found, earlier):
            if not planned or isinstance(each, DeadLetter) or planner.plan(each[1]):
                yield each

    with earlier_set.open_earlier(config) as earlier, reuse.reuse_candidates(config) as reusable:
        if earlier:
            earlier_set.refuse_other_version(earlier.counts, (inputs or {}).get(earlier_set.SETTING))
        planner = RowPlanner(config, reusable, earlier)
        evaluation = few_shot.load_contamination(config)
        bar = Bar(f"reading {describe_source(config)}", None, "instructions")
        failed = write_rows(staging, writer, rows_to_sample(), bar, run_lease)
    check_error_rate(failed, failed + sum(counts.values()), config)
    check_splits(counts, found, evaluation.left_out, config)
    storage.write_json(storage.join(staging, "prepared", "decontamination.json"), evaluation.report())
    result: PreparedUnits = {
        "units": writer.units,
        "counts": counts,
        "rows": sum(counts.values()),
        "dead_letters": failed,
        "merged": found.merged,
        "sampled_rows": found.sampled,
        "unseen_references": found.unseen_references,
    }
    if found.too_long:
        result["too_long"] = found.too_long
    if config.sampler.max_tokens_from == "references":
        result["max_tokens"] = found.lengths.limits()
    if planned:
        result["sampled_rows"] = found.sampled - planner.left_out
        result["complete"] = planner.complete
    if config.generate.reuse:
        result["reused"] = reusable.counts
        _log_reused(reusable.counts, found.sampled, planner.left_out)
    if earlier:
        result["extends"], result["extended_config"] = earlier.counts, earlier.config
        result["sampling"] = sampling_records.merge_records(earlier.records, config)
        _log_extended(earlier.counts, earlier.total, result["rows"], planner.draws)
    if found.merged:
        log(f"{found.merged:,} repeated rows of the source were merged")
    run_lease.check()
    storage.write_json(record, dict(result))
    return result


def _log_reused(reused: Reused, sampled: int, left_out: int) -> None:
    if left_out:
        log(f"generate.reuse_only: {left_out:,} rows are left out, because no set of generate.reuse has all their candidates")
    complete = reused.get("complete", 0)
    part = f", and some of the candidates of {reused['rows'] - complete:,} rows" if reused["rows"] > complete else ""
    log(f"generate.reuse has the candidates of {complete:,} of {sampled - left_out:,} rows to sample{part}")


def _log_extended(kept: Extended, total: int, rows: int, draws: int) -> None:
    log(
        f"generate.extend={kept['uri']}: {kept['rows']:,} rows and {kept['candidates']:,} sampled candidates are kept; "
        f"{rows - kept['rows']:,} rows are new; {draws:,} candidates are missing" + (" and are sampled" if draws else "")
    )
    if kept["rows"] < total:
        log(
            f"warning: {total - kept['rows']:,} rows of it are left out: they overlap with decontaminate.files, or their instruction is a "
            f"validation row too"
        )


def dead_letter_file() -> Any:
    """Open a local file that collects dead letters before the upload, because memory may not suffice for them."""
    return tempfile.NamedTemporaryFile("w+", prefix="cappy-dead-letters-", suffix=".jsonl", encoding="utf-8")


def publish_letters(folder: FolderWriter, staging: str, names: Iterable[str]) -> tuple[dict[str, Any], int]:
    """Write `dead_letters.jsonl` from the letters of the source and of the shards `names`; return its entry and the number of letters."""
    count = 0
    places = [storage.join(staging, "prepared", "dead_letters.jsonl"), *(shards.dead_letters_uri(staging, name) for name in names)]
    with dead_letter_file() as letters:
        for place in places:
            text = storage.read_bytes(place).decode()
            letters.write(text)
            count += text.count("\n")
        letters.flush()
        return folder.upload_file(Path(letters.name), "dead_letters.jsonl"), count


def write_rows(
    staging: str, writer: UnitWriter, rows: Iterable[tuple[str, dict[str, Any]] | DeadLetter], bar: Bar, run_lease: Lease
) -> int:
    """Write rows as units, and the dead letters among them as one file; return the number of dead letters.

    Args:
        staging: URI of the staging folder.
        writer: Writes the units.
        rows: The rows of the source, each with its split, and the dead letters, in order.
        bar: Shows the progress.
        run_lease: Checked before the file of dead letters is written.
    """
    failed = 0
    with dead_letter_file() as letters, bar:
        for each in rows:
            if isinstance(each, DeadLetter):
                letters.write(each.to_json() + "\n")
                failed += 1
            elif written := writer.add(*each):
                bar.advance(written, note=f"{failed} dead letters" if failed else "")
        bar.advance(writer.finish())
        letters.flush()
        run_lease.check()
        storage.upload_file(Path(letters.name), storage.join(staging, "prepared", "dead_letters.jsonl"))
    return failed


def describe_source(config: Config) -> str:
    """Return a phrase that names the source of the instructions, for progress lines."""
    source = config.source
    if source.kind == "mixture":
        return f"a mixture of {len(source.parts)} sources"
    return f"BIG-bench ({', '.join(source.tasks)})" if source.kind == "bigbench" else reader.part_name(source)


def unit_names(prepared: PreparedUnits) -> list[str]:
    """Return the names of all units, in order."""
    return [f"{split}-{number:06d}" for split, count in prepared["units"].items() for number in range(count)]


def check_error_rate(letters: int, rows: int, config: Config, uri: str | None = None) -> None:
    """Raise `CappyError` if the share of dead letters exceeds `generate.max_error_rate`. `uri` is the destination, by default the set."""
    if rows and letters / rows > config.generate.max_error_rate:
        raise CappyError(
            f"{letters} of {rows} rows failed, above generate.max_error_rate={config.generate.max_error_rate}; "
            f"the reasons are in {uri or config.dataset_uri}/_staging; fix the source or raise the rate"
        )


def check_splits(counts: dict[str, int], found: PreparationCounts, left_out: int, config: Config) -> None:
    """Raise `UsageError` if a split is empty although a hash distributes the rows over both splits.

    Args:
        counts: number of instructions, by split.
        found: the counts of the rows.
        left_out: number of train rows that overlap with evaluation rows.
        config: the config, for the error.
    """
    empty = next((split for split in SPLITS if not counts.get(split)), None)
    if empty is None or not found.split_by_hash:
        return
    rows = sum(counts.values())
    if empty == "train" and left_out:
        raise UsageError(
            f"decontaminate.files: all {left_out} train instructions overlap with evaluation rows, so the split train is empty; "
            f"use other rows, or raise decontaminate.n={config.decontaminate.n}"
        )
    for number, source in enumerate([part.source for part in config.source.parts] if config.source.kind == "mixture" else [config.source]):
        if source.kind == "bigbench" or not source.validation_fraction:
            continue
        name = f"source.parts.{number}.source" if isinstance(config.source, MixtureSource) else "source"
        if source.split_by == "dataset":
            setting, way = f"{name}.split_by=dataset", "use split_by=example"
        else:
            setting = f"{name}.validation_fraction={source.validation_fraction:g}"
            way = "lower it" if empty == "train" else "raise it, or set it to 0 for a set without validation rows"
        raise UsageError(f"{setting} leaves the split {empty} empty ({rows} instructions); {way}, or give each row its `split`")


def warn_about_labels(prepared: PreparedUnits, config: Config) -> None:
    """Log a warning if the label metric cannot see references of the set."""
    unseen = prepared.get("unseen_references", 0)
    if unseen:
        log(f"warning: {describe_unseen(unseen, prepared.get('sampled_rows', 0), config.generate.label.metric)}")


def describe_unseen(unseen: int, sampled: int, metric: str) -> str:
    """Return a sentence about references that the label metric cannot see, with the setting to change."""
    return (
        f"{unseen:,} of {sampled:,} sampled instructions have references that {metric} in mode paper cannot see, because it reads "
        f"Latin letters and digits only. The labels of their responses are too low; set generate.label.mode=unicode"
    )


def count_rows(units: Sequence[str], prepared: PreparedUnits, size: int) -> int:
    """Return the number of instructions in `units`: each has `size`, except the last unit of each split."""
    last = {
        f"{split}-{number - 1:06d}": prepared["counts"][split] - (number - 1) * size
        for split, number in prepared["units"].items()
        if number
    }
    return sum(last.get(unit, size) for unit in units)
