"""Read an instruction source: checked rows in order, with limits, splits and mixtures applied. Imports no Ray.

Rows are streamed. A row that cannot be used becomes a dead letter with its location and the reason; it raises no exception.
Files and hub datasets are read one more time before, to find the texts that do not distinguish their rows (`split.SharedTexts`).
The t0 policy reads its sources one more time to count their rows, and so does the weights policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

from cluster.config import BigBenchSource, FilesSource, HubSource, MixtureSource, RowsSource, Source
from cluster.errors import UsageError
from generation.sources import bigbench, files, folders, formats, hub, mixture, prompt_rows, promptsource, split
from generation.sources.caps import DatasetCaps
from generation.sources.notes import Notes
from generation.sources.row import OWN, DeadLetter, Instruction, dead_letter, row_error

Stream = Callable[[], Iterator[Instruction | DeadLetter]]


def read_rows(source: Source, seed: int, notes: Notes | None = None) -> Iterator[Instruction | DeadLetter]:
    """Yield the rows of a source in order, within its limits, and a dead letter for each unusable row."""
    return row_reader(source, seed, notes)()


def row_reader(source: Source, seed: int, notes: Notes | None = None, *, as_prompts: bool = False) -> Stream:
    """Return a function that reads the source from its start at each call. Rows of a mixture are counted once, before.

    Args:
        source: the source.
        seed: seed of the split and of the draws.
        notes: logs the unused parts of the source, each line once.
        as_prompts: accept rows without references, and keep their other columns in `Instruction.own`; see `sources.prompt_rows`.
    """
    notes = notes or Notes()
    if not isinstance(source, MixtureSource):
        return partial(_read_limited, source, seed, part_name(source), notes, as_prompts)
    streams = [partial(_read_limited, part.source, seed, part.name or part_name(part.source), notes, as_prompts) for part in source.parts]

    def everything() -> Iterator[Instruction | DeadLetter]:
        return chain.from_iterable(stream() for stream in streams)

    if source.policy == "concatenate":
        return everything
    if source.policy == "t0":
        counts = Counter(_template_key(row) for row in everything() if isinstance(row, Instruction))
        caps = mixture.t0_caps(counts, source.cap)
        notes.reset_counts()
        return lambda: mixture.sample_rows(everything(), _template_key, counts, caps, seed)
    sizes = [sum(isinstance(row, Instruction) for row in stream()) for stream in streams]
    notes.reset_counts()
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


def _read_limited(
    source: BigBenchSource | FilesSource | HubSource, seed: int, part: str, notes: Notes, as_prompts: bool
) -> Iterator[Instruction | DeadLetter]:
    """Yield the rows of a source with the name of its part, up to its limits per dataset and split and its total limit."""
    limits = {"train": source.train_rows, "validation": source.validation_rows}
    taken: Counter[tuple[str, str]] = Counter()
    count = 0
    if isinstance(source, BigBenchSource):
        rows: Generator[Instruction | DeadLetter] = _bigbench_rows(source, seed, notes)
    else:
        rows = _file_or_hub_rows(source, seed, notes, as_prompts)
    with closing(rows):
        for row in rows:
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


def _bigbench_rows(source: BigBenchSource, seed: int, notes: Notes) -> Generator[Instruction | DeadLetter]:
    bigbench.load_tasks(source.tasks)  # in one scan of the archive
    for task in source.tasks:
        without, repeated = bigbench.count_left_out(task, seed)
        if without:
            notes.log(f"source.tasks: {task}: {without:,} examples have no target and are left out")
        if repeated:
            notes.log(f"source.tasks: {task}: {repeated:,} examples repeat the instruction of another example, so they add no row")
    for task, side, example in bigbench.read_tasks(source.tasks, seed):
        yield Instruction(task, example["subtask"], side, example["instruction"], tuple(example["references"]))


def _file_or_hub_rows(source: FilesSource | HubSource, seed: int, notes: Notes, as_prompts: bool) -> Generator[Instruction | DeadLetter]:
    """Yield the rows of a source within its caps (`sources.caps`), and the dead letters."""
    shared = _find_shared_texts(source, seed, as_prompts)
    choice_rows = source.choice_rows or source.dataset_rows
    if choice_rows is None and source.dataset_rows is None:
        yield from _short_rows(source, _parsed_rows(source, seed, notes, shared, as_prompts), notes)
        return
    # The cap needs a separate reading, which counts and logs nothing.
    caps = DatasetCaps(
        _short_rows(source, _parsed_rows(source, seed, None, shared, as_prompts), None), choice_rows, source.dataset_rows, seed
    )
    yield from caps.take(_short_rows(source, _parsed_rows(source, seed, notes, shared, as_prompts), notes))


def _short_rows(
    source: FilesSource | HubSource, rows: Iterator[Instruction | DeadLetter], notes: Notes | None
) -> Iterator[Instruction | DeadLetter]:
    """Leave out the rows with an instruction above `source.max_instruction_chars`; count and log them in `notes`."""
    limit, left_out = source.max_instruction_chars, 0
    for row in rows:
        if limit is not None and isinstance(row, Instruction) and len(row.instruction) > limit:
            left_out += 1
        else:
            yield row
    if left_out and notes is not None:
        notes.too_long += left_out
        notes.log(f"{_setting(source)}: {left_out:,} rows are left out: longer than source.max_instruction_chars={limit}")


def _parsed_rows(
    source: FilesSource | HubSource, seed: int, notes: Notes | None, shared: split.SharedTexts, as_prompts: bool
) -> Generator[Instruction | DeadLetter]:
    first: DeadLetter | None = None
    usable = False
    with closing(_converted_rows(source, seed, notes, as_prompts)) as converted:
        for where, row, file in converted:
            parsed = row if isinstance(row, DeadLetter) else parse_row(row, where, file, source, shared, as_prompts)
            usable |= isinstance(parsed, Instruction)
            first = first or (parsed if isinstance(parsed, DeadLetter) else None)
            yield parsed
    if not usable:
        if as_prompts:
            needs, example = "`instruction` (text)", '{"instruction": "..."}'
        else:
            needs, example = "`instruction` (text) and `references` (a list of texts)", '{"instruction": "...", "references": ["..."]}'
        raise UsageError(
            f"{_setting(source)}: no row can be used; each needs {needs}, e.g. {example}, or the columns of another source.format"
            + (f"; the first error: {first.reason} at {first.where}" if first else "; the source has no rows")
        )


def _setting(source: FilesSource | HubSource) -> str:
    return f"source.path={source.path}" if isinstance(source, FilesSource) else f"source.name={source.name}"


def _find_shared_texts(source: FilesSource | HubSource, seed: int, as_prompts: bool) -> split.SharedTexts:
    """Read the rows within `source.limit` whose split a hash decides, and return the texts that many of them share."""
    shared = split.SharedTexts()
    if source.split_by == "dataset" or not source.validation_fraction:
        return shared
    with closing(_converted_rows(source, seed, None, as_prompts)) as converted:
        usable = (
            (row, file, source.dataset or row.get("dataset") or file.dataset)
            for _, row, file in converted
            if not isinstance(row, DeadLetter) and row_error(row, not as_prompts) is None
        )
        for row, file, dataset in islice(usable, source.limit):
            if not row.get("split") and not file.split:
                shared.add(dataset, row.get("template"), row["instruction"], row.get("example"))
    return shared


def _converted_rows(
    source: FilesSource | HubSource, seed: int, notes: Notes | None, as_prompts: bool
) -> Generator[tuple[str, Any, folders.DataFile]]:
    """Yield `(place, row in this project's columns or dead letter, file)`; `notes` logs the unused parts of the source."""
    name, renderer = None, None
    if source.templates is not None:
        name, templates = promptsource.load_templates(source.templates)
        renderer = promptsource.TemplateRenderer(templates, seed)
    # A template can use any column, and a prompt keeps all of them.
    columns = None if renderer or as_prompts else formats.columns_of(source.format)
    unused: Counter[str] = Counter()
    merged: Counter[str] = Counter()
    try:
        for file, raws in _raw_rows(source, columns, notes):
            if name is not None:
                file = replace(file, dataset=name)
            if renderer is not None:
                converted = renderer.render_rows(raws)
            else:
                raws = formats.parse_lists(raws)
                convert = prompt_rows.convert_row if as_prompts else formats.convert_row
                if not as_prompts:
                    raws = _count_unused(raws, source.format, unused)
                if source.format in ("auto", "p3"):
                    raws = formats.merge_choices(raws, merged)
                converted = chain.from_iterable(convert(where, raw, source.format) for where, raw in raws)
            for where, row in converted:
                yield where, row, file
    finally:
        if renderer is not None:
            renderer.close()
        if notes is not None:
            notes.add(_setting(source), merged.total(), renderer.blank if renderer else 0, unused)


def _raw_rows(
    source: FilesSource | HubSource, columns: Container[str] | None, notes: Notes | None
) -> Iterator[tuple[folders.DataFile, Iterable[tuple[str, Any]]]]:
    """Yield each file, or the hub dataset, with its raw rows; the columns in folder names are added to the rows."""
    if isinstance(source, HubSource):
        dataset = "_".join(filter(None, (source.name.rstrip("/").rsplit("/", 1)[-1], source.subset or source.data_dir)))
        yield folders.DataFile(source.name, dataset), hub.read_rows(source, columns)
        return
    found = folders.find(source.path)
    if notes is not None:
        for note in found.notes(_setting(source)):
            notes.log(note)
    for file in found.files:
        yield file, map(partial(with_columns, file.columns), files.read_rows(file.uri, columns))


def with_columns(columns: Mapping[str, str | None], located: tuple[str, Any]) -> tuple[str, Any]:
    """Return the location and the row with the columns in the folder names of its file; those of the row itself take precedence."""
    location, row = located
    return location, type(row)({**columns, **row}) if columns and isinstance(row, dict) else row


def _count_unused(rows: Iterable[tuple[str, Any]], format: str, unused: Counter[str]) -> Iterator[tuple[str, Any]]:
    for location, row in rows:
        if isinstance(row, Mapping):
            unused.update(formats.unused_fields(row, format))
        yield location, row


def parse_row(
    row: Mapping[str, Any],
    where: str,
    file: folders.DataFile,
    source: RowsSource,
    shared: split.SharedTexts | None = None,
    as_prompts: bool = False,
) -> Instruction | DeadLetter:
    """Return the instruction of a row in Cappy's own columns, or a dead letter with the field, its value and the fix.

    Dataset and split of `file` apply to a row without its own. With `as_prompts` the references are optional, and blank ones are
    left out.
    """
    if as_prompts and isinstance(row.get("references"), list | tuple):
        row = {**row, "references": [text for text in row["references"] if not isinstance(text, str) or text.strip()]}
    reason = row_error(row, not as_prompts)
    if reason:
        return dead_letter(where, reason, row)
    instruction, template = row["instruction"], row.get("template")
    choices = row.get("answer_choices")
    dataset = source.dataset or row.get("dataset") or file.dataset
    side = row.get("split") or file.split
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
        references=tuple(dict.fromkeys(_as_choices(row.get("references") or (), choices))),
        answer_choices=tuple(dict.fromkeys(choices)) if choices is not None else None,
        split_by_hash=not (row.get("split") or file.split) and source.validation_fraction > 0,
        own=row.get(OWN, ""),
    )


def _as_choices(references: Sequence[str], choices: Sequence[str] | None) -> list[str]:
    """Return the references in the notation of the choices: the two may differ in surrounding white space."""
    by_text = {choice.strip(): choice for choice in choices or ()}
    return [text if choices is None or text in choices else by_text[text.strip()] for text in references]
