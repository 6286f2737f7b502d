"""Sources: from BIG-bench or the user's files to checked instruction rows, with a split, shots and mismatched references.

A source is read twice, streaming: once for the pools that shots and mismatched references are drawn from (bounded), once for
the rows. A row that cannot be used becomes a dead letter with its place and the reason, never an exception. Each draw is a
function of the run's seed and the row's id alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from cluster import storage
from cluster.config import BigBenchSource, Config, FilesSource, Source
from cluster.errors import UsageError
from generation import bigbench
from generation.schema import SPLITS

POOL_ROWS = 1000
"""Train rows of one (dataset, template) that shots and mismatched references are drawn from, at most."""


@dataclass(frozen=True)
class DeadLetter:
    """A row that was left out."""

    where: str
    """File and line, or the row's id."""
    stage: str
    """`read` or `sample`."""
    reason: str
    row: str
    """The row as JSON, cut to 500 characters."""

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False)


@dataclass(frozen=True)
class Instruction:
    """A checked row: `references` has at least one text, none blank."""

    dataset: str
    template: str | None
    split: str
    instruction: str
    references: tuple[str, ...]
    answer_choices: tuple[str, ...] | None = None

    @property
    def id(self) -> str:
        """32 hex digits that change with the text or its place in a dataset, not with the split."""
        return _hash(json.dumps([self.dataset, self.template, self.instruction, self.references], ensure_ascii=False), 16).hex()


class Pools:
    """What is drawn on for other rows: up to `POOL_ROWS` train rows of each (dataset, template), a uniform sample of it."""

    def __init__(self, rows: Iterable[Instruction | DeadLetter], seed: int) -> None:
        self._seed = seed
        self._rows: dict[str, dict[str | None, list[Instruction]]] = {}
        self._shots: dict[tuple[str, str | None, int], list[Instruction]] = {}
        seen: dict[tuple[str, str | None], int] = {}
        draw = random.Random(seed)
        for row in rows:
            if isinstance(row, DeadLetter) or row.split != "train":
                continue
            pool = self._rows.setdefault(row.dataset, {}).setdefault(row.template, [])
            count = seen[row.dataset, row.template] = seen.get((row.dataset, row.template), 0) + 1
            if len(pool) < POOL_ROWS:
                pool.append(row)
            elif (place := draw.randrange(count)) < POOL_ROWS:
                pool[place] = row

    def dataset(self, row: Instruction) -> list[Instruction]:
        """The train rows of the row's dataset."""
        return [each for pool in self._rows.get(row.dataset, {}).values() for each in pool]

    def shots(self, row: Instruction, count: int) -> list[Instruction]:
        """Return `count` worked examples for a row (fewer where the dataset is smaller), never the row itself.

        They come from the row's template where it has enough rows, else from its dataset, and are the same for all rows
        of it: the engine then reads them once and keeps them in its prefix cache.
        """
        own = self._rows.get(row.dataset, {}).get(row.template, [])
        template = row.template if len(own) > count else None
        key = (row.dataset, template, count)
        if key not in self._shots:
            pool = own if len(own) > count else self.dataset(row)
            draw = random.Random(f"{self._seed}:{row.dataset}:{template}")
            self._shots[key] = draw.sample(pool, min(count + 1, len(pool)))
        return [shot for shot in self._shots[key] if shot.instruction != row.instruction][:count]


def prepared(config: Config) -> Iterator[tuple[str, dict[str, Any]] | DeadLetter]:
    """Yield `(split, row)` for every usable instruction, a row having the columns of `schema.PREPARED`; dead letters between.

    Raises `UsageError` or `CappyError` where the source as a whole cannot be read.
    """
    pools = Pools(read(config.source, config.seed), config.seed)
    for each in read(config.source, config.seed):
        yield each if isinstance(each, DeadLetter) else (each.split, prepare(each, pools, config))


def prepare(row: Instruction, pools: Pools, config: Config) -> dict[str, Any]:
    """Return the row with its shots and mismatched references drawn (columns of `schema.PREPARED`)."""
    draw = random.Random(f"{config.seed}:{row.id}")
    mismatched: list[str] = []
    # A classification row's wrong answers are its other choices (paper, section 3.1); a generation row borrows them.
    if row.answer_choices is None:
        pool = pools.dataset(row)
        wanted = config.generate.mismatched * len(row.references)
        for _ in range(4 * wanted):
            if len(mismatched) == wanted or not pool:
                break
            text = draw.choice(draw.choice(pool).references)
            if text not in row.references and text not in mismatched:
                mismatched.append(text)
    return {
        "id": row.id,
        "dataset": row.dataset,
        "template": row.template,
        "instruction": row.instruction,
        "references": list(row.references),
        "answer_choices": list(row.answer_choices) if row.answer_choices is not None else None,
        "shots": [
            {"instruction": shot.instruction, "response": shot.references[0]} for shot in pools.shots(row, config.sampler.prompt.shots)
        ],
        "mismatched": mismatched,
    }


def read(source: Source, seed: int) -> Iterator[Instruction | DeadLetter]:
    """Yield a source's rows in order, at most `train_rows` and `validation_rows` of each dataset."""
    limits = {"train": source.train_rows, "validation": source.validation_rows}
    taken: dict[tuple[str, str], int] = {}
    for row in _bigbench(source, seed) if isinstance(source, BigBenchSource) else _files(source):
        if isinstance(row, Instruction):
            key = (row.dataset, row.split)
            taken[key] = taken.get(key, 0) + 1
            limit = limits[row.split]
            if limit is not None and taken[key] > limit:
                continue
        yield row


def _bigbench(source: BigBenchSource, seed: int) -> Iterator[Instruction]:
    for task, split, example in bigbench.read(source.tasks, seed):
        yield Instruction(task, example["subtask"], split, example["instruction"], tuple(example["references"]))


def _files(source: FilesSource) -> Iterator[Instruction | DeadLetter]:
    usable = False
    for uri in find_files(source.path):
        for where, row in _parquet_rows(uri) if uri.endswith(".parquet") else _json_rows(uri):
            parsed = row if isinstance(row, DeadLetter) else check(row, where, uri, source.validation_fraction)
            usable |= isinstance(parsed, Instruction)
            yield parsed
    if not usable:
        raise UsageError(
            f"source.path={source.path}: no row can be used; each needs `instruction` (text) and `references` (a list of texts), "
            f'e.g. {{"instruction": "...", "references": ["..."]}}'
        )


def find_files(path: str) -> list[str]:
    """Return the JSONL and Parquet files of a path, folder or glob, local or s3://, sorted.

    Raises `UsageError` where there is none.
    """
    storage.check(path, "source.path")
    found = [uri for uri in storage.glob(path) if uri.removesuffix(".gz").endswith((".jsonl", ".ndjson", ".parquet"))]
    if not found:
        raise UsageError(f"source.path={path}: no .jsonl, .jsonl.gz or .parquet file is there; give a file, a folder or a glob")
    return found


def _json_rows(uri: str) -> Iterator[tuple[str, Any]]:
    fs, path = storage.filesystem(uri)
    rest = b""
    number = 0
    with fs.open_input_stream(path) as stream:  # a name ending in .gz is decompressed
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield _json_row(line, f"{uri}:{number}")
    if rest.strip():
        yield _json_row(rest, f"{uri}:{number + 1}")


def _json_row(line: bytes, where: str) -> tuple[str, Any]:
    try:
        return where, json.loads(line)
    except (ValueError, RecursionError) as error:
        return where, _dead(where, f"the line is not JSON: {error}", line.decode("utf-8", "replace"))


def _parquet_rows(uri: str) -> Iterator[tuple[str, Any]]:
    fs, path = storage.filesystem(uri)
    number = 0
    try:
        with fs.open_input_file(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{uri}:{number}", row
    except (OSError, ValueError) as error:
        raise UsageError(f"source.path: {uri} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def check(row: Any, where: str, uri: str, validation_fraction: float) -> Instruction | DeadLetter:
    """Return the instruction a plain row holds, or a dead letter that names the field, what it holds and what it must."""
    reason = _fault(row)
    if reason:
        return _dead(where, reason, row)
    instruction = row["instruction"]
    choices = row.get("answer_choices")
    split = row.get("split") or (
        "validation" if int.from_bytes(_hash(instruction.strip(), 8), "big") < validation_fraction * 2**64 else "train"
    )
    return Instruction(
        dataset=row.get("dataset") or uri.rsplit("/", 1)[-1].split(".")[0],
        template=row.get("template"),
        split=split,
        instruction=instruction,
        references=tuple(dict.fromkeys(row["references"])),
        answer_choices=tuple(choices) if choices is not None else None,
    )


def _fault(row: Any) -> str | None:
    """What is wrong with a plain row, as one line, or None."""
    if not isinstance(row, Mapping):
        return f"the row is a {type(row).__name__}; it must be an object with `instruction` and `references`"
    for name, required in (("instruction", True), ("dataset", False), ("template", False), ("split", False)):
        value = row.get(name)
        if value is None and required:
            return f"`{name}` is missing; the row has {', '.join(map(str, row)) or 'no key'}"
        if value is not None and not isinstance(value, str):
            return f"`{name}` is a {type(value).__name__}; it must be text"
        if value is not None and not value.strip():
            return f"`{name}` is empty"
        if value is not None and not _encodes(value):
            return f"`{name}` holds a lone surrogate, which is no text"
    if row.get("split") is not None and row["split"] not in SPLITS:
        return f"`split` is {row['split']!r}; it must be train or validation"
    return _list_fault("references", row.get("references"), True) or _list_fault("answer_choices", row.get("answer_choices"), False)


def _list_fault(name: str, values: Any, required: bool) -> str | None:
    if values is None:
        return f"`{name}` is missing; give the correct responses as a list of texts" if required else None
    if not isinstance(values, list | tuple):
        return f"`{name}` is a {type(values).__name__}; it must be a list of texts"
    if not values:
        return f"`{name}` is empty; at least one text is needed"
    for value in values:
        if not isinstance(value, str):
            return f"`{name}` holds a {type(value).__name__}; each must be text"
        if not value.strip():
            return f"`{name}` holds an empty text"
        if not _encodes(value):
            return f"`{name}` holds a lone surrogate, which is no text"
    return None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _dead(where: str, reason: str, row: Any) -> DeadLetter:
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=True, default=str)
    return DeadLetter(where=where, stage="read", reason=reason, row=text[:500])


def _hash(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
