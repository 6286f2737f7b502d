"""Instructions: from a source to checked rows with a split, shots and mismatched references.

A source is read twice, streaming: once for the pools that shots and mismatched references are drawn from (bounded), once for
the rows; a mixture that draws is read once more before, to count. A row that cannot be used becomes a dead letter with its place
and the reason, never an exception. Each draw is a function of the run's seed and the row's id alone. What is held of a source
is its pools and 8 bytes for each validation row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from cluster.config import BigBenchSource, Config, FilesSource, HubSource, MixtureSource, RowsSource, Source
from cluster.errors import UsageError
from generation.sources import bigbench, files, formats, hub, mixture, promptsource, split
from generation.sources.decontaminate import Contamination
from generation.sources.row import DeadLetter, Instruction, dead, fault
from generation.tfidf import Similarity

__all__ = ["DeadLetter", "Instruction", "Pools", "contamination", "part_name", "prepare", "prepared", "read"]

Stream = Callable[[], Iterator[Instruction | DeadLetter]]

POOL_ROWS = 256
"""Train rows of one (dataset, template) that shots and mismatched references are drawn from, at most."""


class Pools:
    """What is drawn on for other rows: up to `POOL_ROWS` train rows of each (dataset, template), a uniform sample of it."""

    def __init__(
        self, rows: Iterable[Instruction | DeadLetter], seed: int, leave_out: Callable[[Instruction], bool] = lambda row: False
    ) -> None:
        """`leave_out` is asked only once all rows are read, of the rows sampled."""
        self._seed = seed
        self._shots: dict[tuple[str, str | None, int], list[Instruction]] = {}
        self._similarities: dict[tuple[str, str | None, bool], Similarity] = {}
        pools: dict[tuple[str, str | None], list[Instruction]] = {}
        seen: Counter[tuple[str, str | None]] = Counter()
        draw = random.Random(seed)
        for row in rows:
            if isinstance(row, DeadLetter) or row.split != "train":
                continue
            key = (row.dataset, row.template)
            pool = pools.setdefault(key, [])
            seen[key] += 1
            if len(pool) < POOL_ROWS:
                pool.append(row)
            elif (place := draw.randrange(seen[key])) < POOL_ROWS:
                pool[place] = row
        self._templates = {key: [row for row in pool if not leave_out(row)] for key, pool in pools.items()}
        self._datasets: dict[str, list[Instruction]] = {}
        for (dataset, _), pool in self._templates.items():
            self._datasets.setdefault(dataset, []).extend(pool)

    def dataset(self, row: Instruction) -> list[Instruction]:
        """The train rows of the row's dataset."""
        return self._datasets.get(row.dataset, [])

    def template(self, row: Instruction) -> list[Instruction]:
        """The train rows of the row's dataset and template."""
        return self._templates.get((row.dataset, row.template), [])

    def shots(self, row: Instruction, count: int, by: str = "seed") -> list[Instruction]:
        """Return `count` worked examples for a row (fewer where the dataset is smaller), never the row itself.

        They come from the row's template where it has enough rows, else from its dataset. By `seed` they are the same for
        all rows of it: the engine then reads them once and keeps them in its prefix cache. By `similarity` they are the
        most similar ones, the most similar last, next to the question.
        """
        if not count:
            return []
        own = len(self.template(row)) > count
        pool = self.template(row) if own else self.dataset(row)
        template = row.template if own else None
        if by == "similarity":
            return self._similar(row, count, pool, (row.dataset, template, own))
        key = (row.dataset, template, count)
        if key not in self._shots:
            draw = random.Random(f"{self._seed}:{row.dataset}:{template}")
            self._shots[key] = draw.sample(pool, min(count + 1, len(pool)))
        return [shot for shot in self._shots[key] if shot.instruction != row.instruction][:count]

    def _similar(self, row: Instruction, count: int, pool: list[Instruction], key: tuple[str, str | None, bool]) -> list[Instruction]:
        if key not in self._similarities:
            self._similarities[key] = Similarity([each.instruction for each in pool])
        scores = self._similarities[key].scores(row.instruction)
        # Equal texts would be the same shot again; of equal scores the earlier row of the pool is taken.
        nearest: dict[str, Instruction] = {}
        for place in (-scores).argsort(kind="stable"):
            shot = pool[int(place)]
            if len(nearest) == count:
                break
            if shot.instruction != row.instruction:
                nearest.setdefault(shot.instruction, shot)
        return list(nearest.values())[::-1]


def prepared(config: Config, evaluation: Contamination | None = None) -> Iterator[tuple[str, dict[str, Any]] | DeadLetter]:
    """Yield `(split, row)` for every usable instruction, a row having the columns of `schema.PREPARED`; dead letters between.

    Train rows that overlap `evaluation` (null is what the config names) are left out and counted there. A train row whose
    instruction also stands in validation is a dead letter, so no instruction is ever on both sides.
    Raises `UsageError` or `CappyError` where the source as a whole cannot be read.
    """
    evaluation = evaluation or contamination(config)
    held_out = split.HeldOut()
    rows = reader(config.source, config.seed)

    def watched() -> Iterator[Instruction | DeadLetter]:
        for row in rows():
            if isinstance(row, Instruction) and row.split == "validation":
                held_out.add(row.instruction)
            yield row

    def unfit(row: Instruction) -> bool:
        return row.instruction in held_out or evaluation.overlap(row.instruction) is not None

    pools = Pools(watched(), config.seed, unfit)
    for each in rows():
        if isinstance(each, DeadLetter):
            yield each
        elif each.split == "train" and each.instruction in held_out:
            yield dead(each.id, "the same instruction stands in validation", {"dataset": each.dataset, "instruction": each.instruction})
        elif each.split == "validation" or not evaluation.record(each):
            yield each.split, prepare(each, pools, config)


def contamination(config: Config) -> Contamination:
    """Return the word runs of the evaluation rows that `config.decontaminate` names; empty where it names none."""
    uris = [uri for path in config.decontaminate.files for uri in files.find(path, "decontaminate.files")]
    return Contamination([(uri, read(FilesSource(path=uri), config.seed)) for uri in uris], config.decontaminate.n)


def prepare(row: Instruction, pools: Pools, config: Config) -> dict[str, Any]:
    """Return the row with its shots and mismatched references drawn (columns of `schema.PREPARED`, and `part`)."""
    draw = random.Random(f"{config.seed}:{row.id}")
    mismatched: list[str] = []
    # A classification row's wrong answers are its other choices (paper, section 3.1); a generation row borrows them.
    if row.answer_choices is None:
        for pool, each in ((pools.dataset(row), config.generate.mismatched), (pools.template(row), config.generate.hard_mismatched)):
            mismatched += _borrow(pool, each * len(row.references), {*row.references, *mismatched}, draw)
    prompt = config.sampler.prompt
    return {
        "id": row.id,
        "dataset": row.dataset,
        "template": row.template,
        "instruction": row.instruction,
        "references": list(row.references),
        "answer_choices": list(row.answer_choices) if row.answer_choices is not None else None,
        "shots": [
            {"instruction": shot.instruction, "response": shot.references[0]} for shot in pools.shots(row, prompt.shots, prompt.shots_by)
        ],
        "mismatched": mismatched,
        "part": row.part,
    }


def _borrow(pool: list[Instruction], count: int, known: set[str], draw: random.Random) -> list[str]:
    """Return up to `count` references of a pool that are not `known` and differ from each other."""
    found: list[str] = []
    for _ in range(4 * count if pool else 0):
        text = draw.choice(draw.choice(pool).references)
        if text not in known and text not in found:
            found.append(text)
            if len(found) == count:
                break
    return found


def read(source: Source, seed: int) -> Iterator[Instruction | DeadLetter]:
    """Yield a source's rows in order, within its limits."""
    return reader(source, seed)()


def reader(source: Source, seed: int) -> Stream:
    """Return what yields a source's rows, anew each time it is called; what a mixture must count first is counted once."""
    if not isinstance(source, MixtureSource):
        return partial(_limited, source, seed, part_name(source))
    streams = [partial(_limited, part.source, seed, part.name or part_name(part.source)) for part in source.parts]

    def everything() -> Iterator[Instruction | DeadLetter]:
        return chain.from_iterable(stream() for stream in streams)

    if source.policy == "concatenate":
        return everything
    if source.policy == "t0":
        counts = Counter(_template(row) for row in everything() if isinstance(row, Instruction))
        caps = mixture.t0_caps(counts, source.cap)
        return lambda: mixture.draw(everything(), _template, counts, caps, seed)
    sizes = [sum(isinstance(row, Instruction) for row in stream()) for stream in streams]
    wanted = mixture.in_ratio(sizes, [part.weight or 0.0 for part in source.parts], source.rows)

    def weighted() -> Iterator[Instruction | DeadLetter]:
        parts = zip(streams, sizes, wanted, strict=True)
        drawn = [mixture.draw(stream(), _whole, {None: size}, {None: rows}, seed) for stream, size, rows in parts]
        return mixture.interleave(drawn, wanted)

    return weighted


def _template(row: Instruction) -> tuple[str, str | None]:
    return row.dataset, row.template


def _whole(row: Instruction) -> None:
    """A part is drawn from as one stratum."""


def part_name(source: Source) -> str:
    """What rows of a source are counted under where the config does not say."""
    if isinstance(source, FilesSource):
        return source.path
    return source.name if isinstance(source, HubSource) else source.kind


def _limited(source: BigBenchSource | FilesSource | HubSource, seed: int, part: str) -> Iterator[Instruction | DeadLetter]:
    limits = {"train": source.train_rows, "validation": source.validation_rows}
    taken: Counter[tuple[str, str]] = Counter()
    count = 0
    for row in _bigbench(source, seed) if isinstance(source, BigBenchSource) else _rows(source, seed):
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


def _bigbench(source: BigBenchSource, seed: int) -> Iterator[Instruction]:
    for task, side, example in bigbench.read(source.tasks, seed):
        yield Instruction(task, example["subtask"], side, example["instruction"], tuple(example["references"]))


def _rows(source: FilesSource | HubSource, seed: int) -> Iterator[Instruction | DeadLetter]:
    name, renderer = None, None
    if source.templates is not None:
        name, templates = promptsource.load(source.templates)
        renderer = promptsource.Renderer(templates, seed)
    first: DeadLetter | None = None
    usable = False
    for default, raws in _opened(source):
        if renderer is not None:
            converted = chain.from_iterable(renderer.rows(where, raw) for where, raw in raws)
        else:
            merged = formats.merge_choices(raws) if source.format in ("auto", "p3") else raws
            converted = chain.from_iterable(formats.convert(where, raw, source.format) for where, raw in merged)
        for where, row in converted:
            parsed = row if isinstance(row, DeadLetter) else check(row, where, name or default, source)
            usable |= isinstance(parsed, Instruction)
            first = first or (parsed if isinstance(parsed, DeadLetter) else None)
            yield parsed
    if not usable:
        place = f"source.path={source.path}" if isinstance(source, FilesSource) else f"source.name={source.name}"
        raise UsageError(
            f"{place}: no row can be used; each needs `instruction` (text) and `references` (a list of texts), "
            f'e.g. {{"instruction": "...", "references": ["..."]}}, or the columns of another source.format'
            + (f"; the first: {first.reason} at {first.where}" if first else "; there are no rows")
        )


def _opened(source: FilesSource | HubSource) -> Iterator[tuple[str, Iterable[tuple[str, Any]]]]:
    """Yield `(dataset name where the rows have none, raw rows)` of each file, or of the hub dataset."""
    if isinstance(source, HubSource):
        yield "_".join(filter(None, (source.name.rstrip("/").rsplit("/", 1)[-1], source.subset or source.data_dir))), hub.rows(source)
        return
    for uri in files.find(source.path):
        yield uri.rsplit("/", 1)[-1].split(".")[0], files.rows(uri)


def check(row: Mapping[str, Any], where: str, dataset: str, source: RowsSource) -> Instruction | DeadLetter:
    """Return the instruction a row in our own columns holds, or a dead letter that names the field, what it holds and must."""
    reason = fault(row)
    if reason:
        return dead(where, reason, row)
    instruction = row["instruction"]
    choices = row.get("answer_choices")
    dataset = source.dataset or row.get("dataset") or dataset
    key = dataset if source.split_by == "dataset" else row.get("example") or split.longest_sentence(instruction)
    return Instruction(
        dataset=dataset,
        template=row.get("template"),
        split=row.get("split") or split.side(key, source.validation_fraction),
        instruction=instruction,
        references=tuple(dict.fromkeys(row["references"])),
        answer_choices=tuple(dict.fromkeys(choices)) if choices is not None else None,
    )
