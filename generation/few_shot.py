"""Instructions: from a source to checked rows with a split, shots and mismatched references.

A source is read twice, streaming: once for the pools that shots and mismatched references are drawn from (bounded), once for
the rows; a mixture that draws is read once more before, to count. A row that cannot be used becomes a dead letter with its place
and the reason, never an exception. Each draw is a function of the run's seed and the row's id alone. What is held of a source
is its pools and 8 bytes for each validation row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cluster.config import Config, FilesSource
from generation.sources import files, split
from generation.sources.decontaminate import NgramIndex
from generation.sources.reader import read_rows, row_reader
from generation.sources.row import DeadLetter, Instruction, dead_letter
from generation.tfidf import TfidfIndex

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
        self._similarities: dict[tuple[str, str | None, bool], TfidfIndex] = {}
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
            self._similarities[key] = TfidfIndex([each.instruction for each in pool])
        scores = self._similarities[key].similarities(row.instruction)
        # Equal texts would be the same shot again; of equal scores the earlier row of the pool is taken.
        nearest: dict[str, Instruction] = {}
        for place in (-scores).argsort(kind="stable"):
            shot = pool[int(place)]
            if len(nearest) == count:
                break
            if shot.instruction != row.instruction:
                nearest.setdefault(shot.instruction, shot)
        return list(nearest.values())[::-1]


def prepare_rows(config: Config, evaluation: NgramIndex | None = None) -> Iterator[tuple[str, dict[str, Any]] | DeadLetter]:
    """Yield `(split, row)` for every usable instruction, a row having the columns of `schema.PREPARED`; dead letters between.

    Train rows that overlap `evaluation` (null is what the config names) are left out and counted there. A train row whose
    instruction also stands in validation is a dead letter, so no instruction is ever on both sides.
    Raises `UsageError` or `CappyError` where the source as a whole cannot be read.
    """
    evaluation = evaluation or load_contamination(config)
    held_out = split.HeldOutTexts()
    rows = row_reader(config.source, config.seed)

    def watched() -> Iterator[Instruction | DeadLetter]:
        for row in rows():
            if isinstance(row, Instruction) and row.split == "validation":
                held_out.add(row.instruction)
            yield row

    def unfit(row: Instruction) -> bool:
        return row.instruction in held_out or evaluation.find_overlap(row.instruction) is not None

    pools = Pools(watched(), config.seed, unfit)
    for each in rows():
        if isinstance(each, DeadLetter):
            yield each
        elif each.split == "train" and each.instruction in held_out:
            yield dead_letter(
                each.id, "the same instruction stands in validation", {"dataset": each.dataset, "instruction": each.instruction}
            )
        elif each.split == "validation" or not evaluation.check_row(each):
            yield each.split, prepare_row(each, pools, config)


def load_contamination(config: Config) -> NgramIndex:
    """Return the word runs of the evaluation rows that `config.decontaminate` names; empty where it names none."""
    uris = [uri for path in config.decontaminate.files for uri in files.find_data_files(path, "decontaminate.files")]
    return NgramIndex([(uri, read_rows(FilesSource(path=uri), config.seed)) for uri in uris], config.decontaminate.n)


def prepare_row(row: Instruction, pools: Pools, config: Config) -> dict[str, Any]:
    """Return the row with its shots and mismatched references drawn (columns of `schema.PREPARED`, and `part`)."""
    draw = random.Random(f"{config.seed}:{row.id}")
    mismatched: list[str] = []
    # A classification row's wrong answers are its other choices (paper, section 3.1); a generation row borrows them.
    if row.answer_choices is None:
        for pool, each in ((pools.dataset(row), config.generate.mismatched), (pools.template(row), config.generate.hard_mismatched)):
            mismatched += _draw_references(pool, each * len(row.references), {*row.references, *mismatched}, draw)
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


def _draw_references(pool: list[Instruction], count: int, known: set[str], draw: random.Random) -> list[str]:
    """Return up to `count` references of a pool that are not `known` and differ from each other."""
    found: list[str] = []
    for _ in range(4 * count if pool else 0):
        text = draw.choice(draw.choice(pool).references)
        if text not in known and text not in found:
            found.append(text)
            if len(found) == count:
                break
    return found
