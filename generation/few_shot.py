"""Prepare instruction rows: select their few-shot examples (shots) and their mismatched references. Imports no Ray.

The rows of a source are read and merged (`sources.merge`), then passed twice: first for the pools, from which shots and mismatched
references are drawn, then for the rows. A row that cannot be used becomes a dead letter with its location and the reason; it
raises no exception. Each draw depends only on the seed of the run and the id of the row. Memory holds the pools, which are
bounded, and 8 bytes per validation row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.config import Config, FilesSource
from cluster.progress import log
from generation import labels
from generation.earlier_set import PART, EarlierSet
from generation.mismatched import draw_mismatched
from generation.sources import files, split
from generation.sources.decontaminate import NgramIndex
from generation.sources.merge import merge_rows
from generation.sources.notes import Notes
from generation.sources.reader import read_rows, row_reader
from generation.sources.row import DeadLetter, Instruction, dead_letter
from generation.tfidf import TfidfIndex
from generation.token_limits import ReferenceLengths

POOL_ROWS = 256
"""Maximum number of train rows in the pool of one (dataset, template)."""
_BLOCK_ROWS = 256


class Pools:
    """The train rows from which shots and mismatched references of other rows are drawn.

    The pool of a (dataset, template) is a uniform sample of its train rows, of at most `POOL_ROWS` rows.
    """

    def __init__(
        self, rows: Iterable[Instruction | DeadLetter], seed: int, leave_out: Callable[[Instruction], bool] = lambda row: False
    ) -> None:
        """Read `rows` once and build the pools.

        `leave_out` excludes rows from the pools. It is called after all rows are read, for the sampled rows only.
        """
        self._seed = seed
        self._shots: dict[tuple[str, str | None, int], list[Instruction]] = {}
        self._indexes: dict[tuple[str, str | None, bool], TfidfIndex] = {}
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
            elif (index := draw.randrange(seen[key])) < POOL_ROWS:  # reservoir sampling
                pool[index] = row
        self._templates = {key: [row for row in pool if not leave_out(row)] for key, pool in pools.items()}
        self._datasets: dict[str, list[Instruction]] = {}
        for (dataset, _), pool in self._templates.items():
            self._datasets.setdefault(dataset, []).extend(pool)

    def dataset(self, row: Instruction) -> list[Instruction]:
        """Return the pooled rows of the dataset of `row`."""
        return self._datasets.get(row.dataset, [])

    def template(self, row: Instruction) -> list[Instruction]:
        """Return the pooled rows of the dataset and template of `row`."""
        return self._templates.get((row.dataset, row.template), [])

    def shots(self, row: Instruction, count: int, by: str = "seed") -> list[Instruction]:
        """Return `count` few-shot examples for a row, or fewer if its dataset is too small; never the row itself.

        The examples are rows of the template if it has more than `count` rows, else rows of the dataset. With
        `by="seed"`, all rows of the template (or dataset) have the same examples, so that the prefix cache of the engine
        can share them. With `by="similarity"`, they are the most similar rows; the most similar row is last, next to the
        instruction.
        """
        if not count:
            return []
        use_template = len(self.template(row)) > count
        pool = self.template(row) if use_template else self.dataset(row)
        template = row.template if use_template else None
        if by == "similarity":
            return self._similar(row, count, pool, (row.dataset, template, use_template))
        key = (row.dataset, template, count)
        if key not in self._shots:
            draw = random.Random(f"{self._seed}:{row.dataset}:{template}")
            self._shots[key] = draw.sample(pool, min(count + 1, len(pool)))
        return [shot for shot in self._shots[key] if shot.instruction != row.instruction][:count]

    def _similar(self, row: Instruction, count: int, pool: list[Instruction], key: tuple[str, str | None, bool]) -> list[Instruction]:
        if key not in self._indexes:
            self._indexes[key] = TfidfIndex([each.instruction for each in pool])
        scores = self._indexes[key].similarities(row.instruction)
        # Equal instructions would repeat a shot. The stable sort keeps the order of the pool for equal scores.
        nearest: dict[str, Instruction] = {}
        for index in (-scores).argsort(kind="stable"):
            shot = pool[int(index)]
            if len(nearest) == count:
                break
            if shot.instruction != row.instruction:
                nearest.setdefault(shot.instruction, shot)
        return list(nearest.values())[::-1]


@dataclass
class PreparationCounts:
    """Counts of the rows that `prepare_rows` has yielded; complete after its last row."""

    merged: int = 0
    """Rows of the source that were merged into an earlier, equal row."""
    blank: int = 0
    """Renderings of templates that were blank: such a template does not apply to the row."""
    sampled: int = 0
    """Rows to sample: rows without answer choices."""
    split_by_hash: int = 0
    """Rows whose split was chosen by a hash."""
    unseen_references: int = 0
    """Rows to sample with a reference that the label metric cannot see."""
    too_long: int = 0
    """Rows that were left out because of `source.max_instruction_chars`."""
    lengths: ReferenceLengths = field(default_factory=ReferenceLengths)
    """Lengths of the references; counted for `sampler.max_tokens_from: references` only."""

    def add(self, row: Instruction, config: Config) -> None:
        """Count a prepared row."""
        self.split_by_hash += row.split_by_hash
        if row.answer_choices is None:
            self.sampled += 1
            self.unseen_references += any(labels.has_unseen_words(text, config.generate.label) for text in row.references)
        if config.sampler.max_tokens_from == "references":
            self.lengths.add(row)


def prepare_rows(
    config: Config,
    evaluation: NgramIndex | None = None,
    counts: PreparationCounts | None = None,
    earlier: EarlierSet | None = None,
) -> Iterator[tuple[str, dict[str, Any]] | DeadLetter]:
    """Yield `(split, row)` for every usable instruction and a `DeadLetter` for every other; the rows are in the order of the source.

    The rows of `earlier` follow. Rows of the source with an instruction of `earlier` have its split.

    A row has the columns of `schema.PREPARED`, and `part`. Repeated rows are merged. Train rows that overlap `evaluation` are
    left out and counted in it; None means the files of `config.decontaminate`. A train row whose instruction is also in the
    validation split becomes a dead letter, so no instruction is in both splits. Raises `UsageError` or `CappyError` if the
    source cannot be read.
    """
    evaluation = evaluation or load_contamination(config)
    counts = counts or PreparationCounts()
    held_out = split.HeldOutTexts()

    def with_held_out_recorded() -> Iterator[Instruction | DeadLetter]:
        for row in rows:
            if isinstance(row, Instruction) and row.split == "validation":
                held_out.add(row.instruction)
            yield row

    def is_excluded(row: Instruction) -> bool:
        return row.instruction in held_out or evaluation.find_overlap(row.instruction) is not None

    notes = Notes()
    source = row_reader(config.source, config.seed, notes)()
    if earlier is not None:
        source = earlier.follow(source)
    only_earlier = 0
    with merge_rows(source) as rows:
        counts.merged, counts.blank, counts.too_long = rows.merged + notes.merged, notes.blank, notes.too_long
        pools = Pools(with_held_out_recorded(), config.seed, is_excluded)
        block: list[Instruction] = []
        for each in rows:
            only_earlier += isinstance(each, Instruction) and each.part == PART
            if isinstance(each, DeadLetter):
                yield each
            elif each.split == "train" and each.instruction in held_out:
                yield dead_letter(
                    each.id, "the same instruction is in the validation split", {"dataset": each.dataset, "instruction": each.instruction}
                )
            elif each.split == "validation" or not evaluation.check_row(each):
                counts.add(each, config)
                block.append(each)
                if len(block) == _BLOCK_ROWS:
                    yield from _prepare_block(block, pools, config)
                    block = []
        yield from _prepare_block(block, pools, config)
    if earlier is not None:  # the other rows of the earlier set were merged into rows of the source
        counts.merged -= earlier.total - only_earlier


def load_contamination(config: Config) -> NgramIndex:
    """Return the word n-grams of the evaluation rows in the files of `config.decontaminate`; empty without files."""
    uris = [uri for path in config.decontaminate.files for uri in files.find_data_files(path, "decontaminate.files")]
    index = NgramIndex([(uri, read_rows(FilesSource(path=uri), config.seed)) for uri in uris], config.decontaminate.n)
    if index.first_unreadable:
        log(
            f"warning: decontaminate.files: {index.unreadable:,} evaluation rows cannot be read, so only the first 500 characters of each "
            f"are compared; the first error: {index.first_unreadable.reason} at {index.first_unreadable.where}"
        )
    return index


def _prepare_block(rows: Sequence[Instruction], pools: Pools, config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the splits and rows of a block with their shots and mismatched references (the columns of `schema.PREPARED`, and `part`)."""
    generate, prompt = config.generate, config.sampler.prompt

    def sources_of(row: Instruction) -> list[tuple[list[Instruction], int]]:
        return [(pools.dataset(row), generate.mismatched), (pools.template(row), generate.hard_mismatched)]

    for row, mismatched in zip(rows, draw_mismatched(rows, sources_of, config), strict=True):
        shots = pools.shots(row, prompt.shots, prompt.shots_by)
        yield row.split, {**prompt_columns(row, shots), "mismatched": mismatched, "part": row.part}


def prompt_columns(row: Instruction, shots: Sequence[Instruction]) -> dict[str, Any]:
    """Return the columns of a prepared row that its prompt is made of, with its id and its references."""
    return {
        "id": row.id,
        "dataset": row.dataset,
        "template": row.template,
        "instruction": row.instruction,
        "references": list(row.references),
        "answer_choices": list(row.answer_choices) if row.answer_choices is not None else None,
        "shots": [{"instruction": shot.instruction, "response": shot.references[0]} for shot in shots],
    }
