"""Read an instruction source: checked rows in order, with limits, splits and mixtures applied. Imports no Ray.

Rows are streamed. A row that cannot be used becomes a dead letter with its location and the reason; it raises no exception.
Files and hub datasets are read one more time before, to find the texts that do not distinguish their rows (`split.SharedTexts`).
The t0 policy reads its sources one more time to count their rows, and so does the weights policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

from cluster.config import BigBenchSource, FilesSource, HubSource, MixtureSource, RowsSource, Source
from cluster.errors import UsageError
from generation.sources import bigbench, files, formats, hub, mixture, promptsource, split
from generation.sources.row import DeadLetter, Instruction, dead_letter, row_error

Stream = Callable[[], Iterator[Instruction | DeadLetter]]


def read_rows(source: Source, seed: int) -> Iterator[Instruction | DeadLetter]:
    """Yield the rows of a source in order, within its limits, and a dead letter for each unusable row."""
    return row_reader(source, seed)()


def row_reader(source: Source, seed: int) -> Stream:
    """Return a function that reads the source from its start at each call. Rows of a mixture are counted once, before."""
    if not isinstance(source, MixtureSource):
        return partial(_read_limited, source, seed, part_name(source))
    streams = [partial(_read_limited, part.source, seed, part.name or part_name(part.source)) for part in source.parts]

    def everything() -> Iterator[Instruction | DeadLetter]:
        return chain.from_iterable(stream() for stream in streams)

    if source.policy == "concatenate":
        return everything
    if source.policy == "t0":
        counts = Counter(_template_key(row) for row in everything() if isinstance(row, Instruction))
        caps = mixture.t0_caps(counts, source.cap)
        return lambda: mixture.sample_rows(everything(), _template_key, counts, caps, seed)
    sizes = [sum(isinstance(row, Instruction) for row in stream()) for stream in streams]
    row_counts = mixture.rows_per_part(sizes, [part.weight or 0.0 for part in source.parts], source.rows)

    def weighted() -> Iterator[Instruction | DeadLetter]:
        parts = zip(streams, sizes, row_counts, strict=True)
        drawn = [mixture.sample_rows(stream(), _single_stratum, {None: size}, {None: rows}, seed) for stream, size, rows in parts]
        return mixture.interleave(drawn, row_counts)

    return weighted


def _template_key(row: Instruction) -> tuple[str, str | None]:
    return row.dataset, row.template


def _single_stratum(row: Instruction) -> None:
    """Return the same stratum for all rows, so that a part of a weighted mixture is sampled as a whole."""


def part_name(source: Source) -> str:
    """Return the name under which rows of a source are counted if the config has no name for it."""
    if isinstance(source, FilesSource):
        return source.path
    return source.name if isinstance(source, HubSource) else source.kind


def _read_limited(source: BigBenchSource | FilesSource | HubSource, seed: int, part: str) -> Iterator[Instruction | DeadLetter]:
    """Yield the rows of a source with the name of its part, up to its limits per dataset and split and its total limit."""
    limits = {"train": source.train_rows, "validation": source.validation_rows}
    taken: Counter[tuple[str, str]] = Counter()
    count = 0
    for row in _bigbench_rows(source, seed) if isinstance(source, BigBenchSource) else _file_or_hub_rows(source, seed):
        if isinstance(row, Instruction):
            taken[row.dataset, row.split] += 1
            limit = limits[row.split]
            if limit is not None and taken[row.dataset, row.split] > limit:
                continue
            if count == source.limit:
                return
            count += 1
            row = replace(row, part=part)
        yield row


def _bigbench_rows(source: BigBenchSource, seed: int) -> Iterator[Instruction]:
    for task, side, example in bigbench.read_tasks(source.tasks, seed):
        yield Instruction(task, example["subtask"], side, example["instruction"], tuple(example["references"]))


def _file_or_hub_rows(source: FilesSource | HubSource, seed: int) -> Iterator[Instruction | DeadLetter]:
    shared = _find_shared_texts(source, seed)
    first: DeadLetter | None = None
    usable = False
    for where, row, name in _converted_rows(source, seed):
        parsed = row if isinstance(row, DeadLetter) else parse_row(row, where, name, source, shared)
        usable |= isinstance(parsed, Instruction)
        first = first or (parsed if isinstance(parsed, DeadLetter) else None)
        yield parsed
    if not usable:
        setting = f"source.path={source.path}" if isinstance(source, FilesSource) else f"source.name={source.name}"
        raise UsageError(
            f"{setting}: no row can be used; each needs `instruction` (text) and `references` (a list of texts), "
            f'e.g. {{"instruction": "...", "references": ["..."]}}, or the columns of another source.format'
            + (f"; the first error: {first.reason} at {first.where}" if first else "; the source has no rows")
        )


def _find_shared_texts(source: FilesSource | HubSource, seed: int) -> split.SharedTexts:
    """Read the rows within `source.limit` whose split a hash decides, and return the texts that many of them share."""
    shared = split.SharedTexts()
    if source.split_by == "dataset" or not source.validation_fraction:
        return shared
    usable = (
        (row, source.dataset or row.get("dataset") or name)
        for _, row, name in _converted_rows(source, seed)
        if not isinstance(row, DeadLetter) and row_error(row) is None
    )
    for row, dataset in islice(usable, source.limit):
        if not row.get("split"):
            shared.add(dataset, row.get("template"), row["instruction"], row.get("example"))
    return shared


def _converted_rows(source: FilesSource | HubSource, seed: int) -> Iterator[tuple[str, Any, str]]:
    """Yield `(place, row in this project's columns or dead letter, default dataset name)`."""
    name, renderer = None, None
    if source.templates is not None:
        name, templates = promptsource.load_templates(source.templates)
        renderer = promptsource.TemplateRenderer(templates, seed)
    for default, raws in _raw_rows(source):
        if renderer is not None:
            converted = chain.from_iterable(renderer.render_rows(where, raw) for where, raw in raws)
        else:
            merged = formats.merge_choices(raws) if source.format in ("auto", "p3") else raws
            converted = chain.from_iterable(formats.convert_row(where, raw, source.format) for where, raw in merged)
        for where, row in converted:
            yield where, row, name or default


def _raw_rows(source: FilesSource | HubSource) -> Iterator[tuple[str, Iterable[tuple[str, Any]]]]:
    """Yield `(default dataset name, raw rows)` for each file, or for the hub dataset."""
    if isinstance(source, HubSource):
        yield "_".join(filter(None, (source.name.rstrip("/").rsplit("/", 1)[-1], source.subset or source.data_dir))), hub.read_rows(source)
        return
    for uri in files.find_data_files(source.path):
        yield uri.rsplit("/", 1)[-1].split(".")[0], files.read_rows(uri)


def parse_row(
    row: Mapping[str, Any], where: str, dataset: str, source: RowsSource, shared: split.SharedTexts | None = None
) -> Instruction | DeadLetter:
    """Return the instruction of a row in Cappy's own columns, or a dead letter with the field, its value and the fix."""
    reason = row_error(row)
    if reason:
        return dead_letter(where, reason, row)
    instruction, template = row["instruction"], row.get("template")
    choices = row.get("answer_choices")
    dataset = source.dataset or row.get("dataset") or dataset
    side = row.get("split")
    if not side:
        key = dataset
        if source.split_by == "example":
            key = (shared or split.SharedTexts()).distinguish(dataset, template, instruction, row.get("example"))
        side = split.assign_split(key, source.validation_fraction)
    return Instruction(
        dataset=dataset,
        template=template,
        split=side,
        instruction=instruction,
        references=tuple(dict.fromkeys(row["references"])),
        answer_choices=tuple(dict.fromkeys(choices)) if choices is not None else None,
        split_by_hash=not row.get("split") and source.validation_fraction > 0,
    )
