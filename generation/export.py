"""`cappy export`: publish a regression set, answers or scores in the columns that trainers read.

The candidates of the source are grouped by prompt in files of a scratch folder, then each file becomes one part of the export.
The manifest is written last. After an interruption, the same command starts again. The work runs in this process and imports no
Ray, so a machine without a cluster can run it.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import artifacts, disk, folder_writer, storage
from cluster.config import fingerprint
from cluster.copying import LEASE, SCRATCH_FOLDER, CopySession, hold_destination
from cluster.errors import CappyError, UsageError, first_line
from cluster.redaction import redact_text, redact_tree
from generation import export_card, export_formats, export_pairs, export_pools, export_source
from generation.dataset_card import GIVEN
from generation.export_card import LEFT_OUT
from generation.export_formats import FORMATS, KTO_THRESHOLD, TABLE, Selection
from generation.export_pools import Partitions
from generation.export_source import Columns, Source

_MARK = "_export.json"
_OWNED = artifacts.OwnedFiles(
    "export",
    "export",
    (rf"{LEASE}/\d+\.json", rf"{SCRATCH_FOLDER}/[^/]+(/[^/]+)?", r"_export\.json"),
    r"_export\.json",
    (r"data/[^/]+/part-\d{5}\.(parquet|jsonl)", r"README\.md"),
)
_SOURCES = (*GIVEN, "sampled")
_BATCH_ROWS = 1024
_OUTPUT_ROWS = 8192


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export, as on the command line."""

    form: str
    """One of `FORMATS`."""
    by: str | None = None
    """The column or field of a candidate that ranks responses. None: `label` of a regression set, else `score`, else `label`."""
    prompt: str = "instruction"
    """The column with the prompt."""
    response: str = "response"
    """The column, or field of a candidate, with the response."""
    sources: tuple[str, ...] = ()
    """Sources of candidates to use. Empty: `sampled`, or all for pairs and ranking."""
    per_instruction: int | None = None
    """As in `Selection`, like `margin` and `threshold`. None: 1 for sft, chat, dpo and reward, all for the others."""
    margin: float | None = None
    threshold: float | None = None
    messages: bool = False
    """Write texts as lists of messages."""
    system: str | None = None
    """A system message for each prompt."""
    duplicates: bool = False
    """Publish all pairs of a regression set unchanged, as `cappy push --pairs` (pairs)."""


def run_export(source: str, destination: str, options: ExportOptions, *, overwrite: bool = False) -> dict[str, Any]:
    """Publish the source at the destination in one format; return the summary.

    The same export that is already published is kept. Memory holds the candidates of one part.

    Raises:
        UsageError: For an option that the format does not take, a missing column, or an export without rows. Also for a destination
            with other files or another finished run.
        CappyError: If the source is not published or is damaged, or if another run works at the destination.
    """
    check_options(options)
    if options.duplicates:
        return export_pairs.export_pairs(source, destination, overwrite=overwrite)
    start = time.monotonic()
    opened = export_source.open_source(source)
    destination = storage.check_uri(destination, "DST")
    artifacts.refuse_nested(opened.uri, destination)
    settings = result_settings(options)
    made_from = {"uri": redact_text(opened.uri), "fingerprint": fingerprint(opened.manifest["files"], settings)}
    if not overwrite and (published := _find_same(destination, made_from)):
        return {**published, "uri": destination, "kept": True}
    artifacts.refuse_foreign(destination, "DST", _OWNED, overwrite=overwrite)
    parts = _part_names(opened, options.form)
    names = {*itertools.chain(*parts.values()), "README.md", _MARK}
    with hold_destination(destination, names, _OWNED, overwrite=overwrite) as check:
        with CopySession(destination, len(opened.files) + len(names) - 2, check, "exporting") as copying:
            folder = folder_writer.FolderWriter(destination, check)
            run = _Run(opened, options, copying, partial(folder.write_json, _MARK, made_from))
            for split, split_parts in parts.items():
                run.export_split(split, split_parts)
        if not run.written:
            raise run.describe_nothing_left()
        check()
        leftover = {name for name in storage.list_files(destination) if name.startswith("data/")} - run.written.keys()
        storage.delete_files(destination, sorted(leftover))
        summary = run.summarise(destination, time.monotonic() - start)
        artifacts.publish_folder(
            destination,
            "export",
            command=redact_text(command_line(opened.uri, options)),
            made_from=made_from,
            schema={each.name: str(each.type) for each in export_formats.schema(options.form, messages=options.messages)},
            **{name: redact_tree(opened.manifest[name]) for name in ("metric", "lineage") if name in opened.manifest},
            summary=summary,
            config={**opened.manifest.get("config", {}), "export": settings},
            files=dict(sorted(run.written.items())),
            describe=lambda uri, manifest: export_card.write_card(uri, manifest, check),
            check=check,
        )
        storage.delete_files(destination, [_MARK])
    return {**summary, "kept": False}


def result_settings(options: ExportOptions) -> dict[str, Any]:
    """Return the options that are given, as the manifest records them."""
    given: dict[str, Any] = redact_tree({name: value for name, value in asdict(options).items() if value not in (None, (), False)})
    return given


def check_options(options: ExportOptions) -> None:
    """Raise `UsageError` for an option with a value outside its range, or that the format does not take."""
    if options.form not in FORMATS:
        raise UsageError(f"--as={options.form}: no such format; choose one of {', '.join(FORMATS)}")
    form = TABLE[options.form]
    for name in ("per_instruction", "margin", "threshold"):
        value = getattr(options, name)
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}={value:g}"
        if name not in form.takes:
            takers = ", ".join(each for each in FORMATS if name in TABLE[each].takes)
            raise UsageError(f"{option} is for {takers}; leave it out for --as={options.form}")
        least = {"per_instruction": 2 if options.form == "ranking" else 1, "margin": 0}.get(name)
        if not math.isfinite(value) or (least is not None and value < least):
            raise UsageError(f"{option}: give {'a number' if least is None else f'at least {least}'}")
    if unknown := next((each for each in options.sources if each not in _SOURCES), None):
        raise UsageError(f"--source={unknown}: no such source of responses; choose from {', '.join(_SOURCES)}")
    if options.messages and not form.texts:
        able = ", ".join(each for each in FORMATS if TABLE[each].texts)
        raise UsageError(f"--messages is for {able}; leave it out for --as={options.form}")
    if options.system is not None and not (options.messages or options.form == "chat"):
        raise UsageError("--system needs a format of messages: --as=chat, or --messages")
    if options.duplicates and (options.form != "pairs" or options != ExportOptions("pairs", duplicates=True)):
        raise UsageError("--duplicates publishes all pairs of a regression set: give --as=pairs and no option that selects")


def command_line(source: str, options: ExportOptions) -> str:
    """Return the command of an export, with `DST` for the destination."""
    words = ["cappy", "export", source, "DST", "--as", options.form]
    for name, value in asdict(options).items():
        option = {"sources": "--source"}.get(name, f"--{name.replace('_', '-')}")
        if name == "form" or value in (None, (), False) or value == getattr(ExportOptions(options.form), name):
            continue
        for each in value if isinstance(value, tuple) else (value,):
            words += [option] if each is True else [option, str(each)]
    return shlex.join(words)


class _Run:
    """One export: reads the files of the source, writes the parts, and counts the omitted candidates."""

    def __init__(self, opened: Source, options: ExportOptions, copying: CopySession, begin: Callable[[], object]) -> None:
        self.written: dict[str, Any] = {}
        """The manifest's entries of the parts."""
        self._opened, self._options, self._copying, self._begin = opened, options, copying, begin
        self._form = TABLE[options.form]
        self._selection = Selection(options.per_instruction or (1 if self._form.one else None), options.margin or 0.0, options.threshold)
        self._sources = frozenset(options.sources or (("sampled",) if self._form.sampled else ()))
        self._valued = self._form.compares or options.threshold is not None
        self._columns: Columns | None = None
        self._counts: Counter[str] = Counter()
        self._found_sources: Counter[str] = Counter()
        self._largest: dict[str, float] = {}

    def export_split(self, split: str, parts: Sequence[str]) -> None:
        """Write the parts of a split, from the files of the source with this split."""
        files = [name for name in self._opened.files if export_source.split_of(name) == split]
        with export_pools.Partitions(self._copying.folder / f"prompts-{split}", len(parts)) as partitions:
            for _ in self._copying.each(partial(self._read_file, partitions), files, 1):
                pass
        numbers = {name: number for number, name in enumerate(parts)}
        for _ in self._copying.each(lambda name: self._write_part(partitions, numbers[name], name), parts, 1):
            pass

    def _read_file(self, partitions: Partitions, name: str) -> None:
        """Distribute the candidates of one file of the source."""
        options = self._options
        with self._copying.scratch() as file:
            self._copying.fetch(artifacts.file_uri(self._opened.uri, name, self._opened.files[name]), self._opened.files[name], file)
            try:
                with pq.ParquetFile(file) as parquet:
                    columns = self._columns = export_source.find_columns(
                        self._opened.uri,
                        parquet.schema_arrow,
                        prompt=options.prompt,
                        response=options.response,
                        value=options.by,
                        needs_value=self._valued,
                        selected=not self._form.compares and self._selection.per_instruction == 1 and options.by is None,
                    )
                    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns.names()):
                        flat = export_source.flatten(pa.Table.from_batches([batch]), columns)
                        known = flat.filter(pc.is_valid(flat["prompt"]))
                        self._counts["without_prompt"] += flat.num_rows - known.num_rows
                        self._counts["candidates"] += flat.num_rows
                        self._found_sources.update(known["source"].drop_null().to_pylist())
                        partitions.add(known)
            except (OSError, pa.ArrowException) as error:
                raise CappyError(f"SRC={self._opened.uri}: {name} cannot be read ({first_line(error)}); make it again") from None

    def _write_part(self, partitions: Partitions, number: int, name: str) -> None:
        """Write one part, unless it has no rows."""
        with self._copying.scratch() as file:
            with disk.errors_of(file.parent):
                write = _write_json_lines if self._options.form == "chat" else _write_parquet
                schema = export_formats.schema(self._options.form, messages=self._options.messages)
                count = write(file, schema, self._rows(partitions.read(number)))
            partitions.delete(number)
            if not count:
                return
            entry = {"bytes": file.stat().st_size, "sha256": storage.sha256(str(file)), "rows": count}
            if not self.written:
                self._begin()
            self._copying.place(file, name)
            self.written[name] = entry

    def _rows(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        for prompt, found in export_pools.pools(table):
            candidates = export_pools.merge_candidates(found, self._sources, self._counts, valued=self._valued)
            self._counts["instructions"] += 1
            if candidates:
                self._note_largest("value", candidates[0].value)
                self._note_largest("margin", candidates[0].value - candidates[-1].value)
                threshold = KTO_THRESHOLD if self._selection.threshold is None else self._selection.threshold
                self._note_largest("distance", threshold - candidates[-1].value)
            rows = self._form.rows(prompt, candidates, self._selection) if candidates else []
            self._counts["instructions_left_out"] += not rows
            for row in rows:
                if self._options.messages:
                    row = export_formats.as_messages(row, self._form.texts, self._options.system)
                yield export_formats.add_system(row, self._options.system) if self._options.form == "chat" else row

    def _note_largest(self, name: str, value: float) -> None:
        self._largest[name] = max(value, self._largest.get(name, value))

    def summarise(self, destination: str, seconds: float) -> dict[str, Any]:
        """Return the summary of the export."""
        splits: Counter[str] = Counter()
        for name, entry in self.written.items():
            splits[export_source.split_of(name)] += entry["rows"]
        return {
            "uri": destination,
            "format": self._options.form,
            "from": redact_text(self._opened.uri),
            "by": self._columns.value if self._columns else None,
            "rows": splits.total(),
            "splits": dict(splits),
            "instructions": self._counts["instructions"],
            "candidates": self._counts["candidates"],
            "left_out": {name: self._counts[name] for name in LEFT_OUT},
            "files": len(self.written),
            "bytes": sum(entry["bytes"] for entry in self.written.values()),
            "seconds": round(seconds, 1),
        }

    def describe_nothing_left(self) -> UsageError:
        """Return the error of an export without rows, with the reason and the contents of the source."""
        options, found = self._options, self._opened.uri
        start = f"SRC={found}: no row is left for --as={options.form}"
        by = self._columns.value if self._columns else None
        if not self._counts["candidates"]:
            return UsageError(f"{start}: it has no responses; give another source")
        if not self._largest and self._counts["other_sources"]:
            there = ", ".join(f"{name} {count:,}" for name, count in sorted(self._found_sources.items()))
            wanted = ", ".join(sorted(self._sources))
            return UsageError(f"{start} from candidates of source {wanted}; it has {there}: choose with --source")
        if not self._largest:
            there = ", ".join(
                f"{name} {self._counts[name]:,}" for name in LEFT_OUT if self._counts[name] and name != "instructions_left_out"
            )
            return UsageError(f"{start}: all {self._counts['candidates']:,} candidates are left out ({there})")
        if options.threshold is not None and self._largest["value"] < options.threshold:
            return UsageError(f"{start} with --threshold={options.threshold:g}: the largest {by} is {self._largest['value']:.4g}; lower it")
        margin = self._largest["distance" if options.form == "kto" else "margin"]
        if options.margin and margin > 0:
            return UsageError(f"{start} with --margin={options.margin:g}: the largest margin of {by} is {margin:.4g}; lower it")
        return UsageError(
            f"{start}: no instruction has two responses with different values of {by}; "
            f"rank by another column with --by, or use more candidates with --source"
        )


def _find_same(destination: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of the same published export. Raises `UsageError` if another one is published there."""
    if not storage.exists(storage.join(destination, artifacts.MANIFEST)):
        return None
    manifest = artifacts.read_any_manifest(destination, "DST")
    if manifest["kind"] == "export" and manifest.get("made_from", {}).get("fingerprint") == made_from["fingerprint"]:
        return manifest["summary"]
    artifacts.refuse_published(destination, "DST", "export")
    return None


def _part_names(opened: Source, form: str) -> dict[str, list[str]]:
    """Return the names of the parts of each split."""
    suffix = "jsonl" if form == "chat" else "parquet"
    sizes: Counter[str] = Counter()
    for name, entry in opened.files.items():
        sizes[export_source.split_of(name)] += entry["bytes"]
    return {
        split: [f"data/{split}/part-{number:05d}.{suffix}" for number in range(export_pools.count_files(size))]
        for split, size in sizes.items()
    }


def _write_parquet(file: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    """Write rows as Parquet; return their number."""
    count = 0
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        while batch := list(itertools.islice(rows, _OUTPUT_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def _write_json_lines(file: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    """Write rows as JSON lines in UTF-8; return their number."""
    count = 0
    with file.open("w", encoding="utf-8", newline="\n") as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
