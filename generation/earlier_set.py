"""The set that a run extends (`generate.extend`): its rows, their splits, and their sampled candidates. Imports no Ray.

The rows of the set are a further source of the run, after `source`. A row is found by its dataset, template, instruction and choices. So a
row with other references keeps its candidates, and the references are united. Memory holds 8 bytes for each row; the candidates are in
a temporary SQLite file.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, TypedDict

from cluster.config import Config
from cluster.errors import CappyError, UsageError
from generation import labels, reuse, sampling_records
from generation.dataset import RegressionSet
from generation.feedback import RATING
from generation.reuse import Candidates
from generation.schema import SAMPLED
from generation.sources.row import DeadLetter, Instruction, hash_text
from generation.sources.split import HeldOutTexts

SETTING = "generate.extend"
PART = SETTING
"""`Instruction.part` of the rows of the set that the source does not have."""
_FIELDS = (*SAMPLED.value_type.names, "model", "label")
ROW = ("dataset", "template", "instruction", "answer_choices")
"""The columns that identify a row."""
_BATCH_ROWS = 1024


class Extended(TypedDict):
    """The rows and candidates that a run took from the set that it extends; the manifest has it as `extends`."""

    uri: str
    version: str | None
    """`writer` of its manifest."""
    rows: int
    candidates: int
    """Sampled candidates."""
    tokens: int


class Kept(NamedTuple):
    """The sampled candidates of a row in the earlier set (fields of `schema.REUSED`)."""

    candidates: Candidates
    draw: list[int]
    """Number of candidates to sample for each decoding of the config, in order."""


class EarlierSet:
    """The set of `generate.extend`, opened by `open_earlier`."""

    def __init__(self, opened: RegressionSet, config: Config, database: sqlite3.Connection) -> None:
        self._opened, self._config, self._database = opened, config, database
        self.records = sampling_records.of_manifest(opened.manifest, opened.uri)
        """How its candidates were sampled; see `sampling_records`."""
        self._drawn = sampling_records.drawn_candidates(self.records, config.sampler.model)
        self._balanced = opened.manifest["config"]["generate"].get("max_per_bin") is not None
        self._texts = {split: HeldOutTexts() for split in opened.manifest["counts"]}
        self.total = sum(opened.rows(split) for split in opened.manifest["counts"])
        """Number of its rows."""
        self.counts: Extended = {
            "uri": opened.uri,
            "version": opened.manifest.get("writer"),
            "rows": 0,
            "candidates": 0,
            "tokens": 0,
        }
        """Counts of the rows that `find` returned."""
        self._store()

    @property
    def config(self) -> dict[str, Any]:
        """Return the config in its manifest."""
        return dict(self._opened.manifest["config"])

    def follow(self, source: Iterable[Instruction | DeadLetter]) -> Iterator[Instruction | DeadLetter]:
        """Yield the rows of the source, then those of this set. Rows of the source with an instruction of this set have its split."""
        return chain(map(self._keep_split, source), self._rows())

    def _rows(self) -> Iterator[Instruction]:
        """Yield its rows, each with its split."""
        columns = [*ROW, "references"]
        for split in self._opened.manifest["counts"]:
            for table in self._opened.batches(split, _BATCH_ROWS, columns):
                for row in table.to_pylist():
                    choices = row["answer_choices"]
                    yield Instruction(
                        dataset=row["dataset"],
                        template=row["template"],
                        split=split,
                        instruction=row["instruction"],
                        references=tuple(row["references"]),
                        answer_choices=tuple(choices) if choices is not None else None,
                        part=PART,
                    )

    def _keep_split(self, row: Instruction | DeadLetter) -> Instruction | DeadLetter:
        """Return a row of the source with the split of its instruction in this set, if the set has it. Dead letters are unchanged."""
        if isinstance(row, Instruction):
            for split, texts in self._texts.items():
                if split != row.split and row.instruction in texts:
                    return replace(row, split=split, split_by_hash=False)
        return row

    def find(self, row: Mapping[str, Any]) -> Kept | None:
        """Return the candidates of a prepared row, and count them; None if the set does not have the row.

        A candidate keeps its label if the metric and the references are the same.
        """
        found = self._database.execute("select id, candidates from pools where key = ?", (_key(row),)).fetchone()
        if found is None:
            return None
        row_id, candidates = found[0], json.loads(found[1])
        if row_id != row["id"]:
            candidates = [{**each, "label": None} for each in candidates]
        self.counts["rows"] += 1
        self.counts["candidates"] += len(candidates)
        self.counts["tokens"] += sum(each["tokens"] or 0 for each in candidates)
        return Kept(candidates, self._missing(candidates))

    def _missing(self, candidates: Candidates) -> list[int]:
        """Return the number of candidates that a row does not have, for each decoding of the config."""
        sampler = self._config.sampler
        have = Counter(each["decoding"] for each in candidates if each["model"] == sampler.model)
        draw = []
        for decoding in sampler.decodings:
            count = have[decoding.name]
            if count and self._balanced:  # `max_per_bin` removed candidates of the row, so count the drawn candidates
                count = max(count, self._drawn.get(decoding.name, 0))
            # The candidates of one search cannot be continued.
            draw.append(0 if count and decoding.temperature == 0 else max(0, decoding.n - count))
        return draw

    def _store(self) -> None:
        """Read the set, and store the texts of its splits and the candidates of its rows."""
        keep_labels = self._opened.manifest["metric"] == labels.describe_metric(self._config.generate.label)
        self._database.execute("create table pools (key blob primary key, id text, candidates text) without rowid")
        for split in self._opened.manifest["counts"]:
            for table in self._opened.batches(split, _BATCH_ROWS, ["id", *ROW, "candidates"]):
                for row in table.to_pylist():
                    self._texts[split].add(row["instruction"])
                    sampled = [{name: each[name] for name in _FIELDS} for each in row["candidates"] if each["source"] == "sampled"]
                    self._add(row, sampled if keep_labels else [{**each, "label": None} for each in sampled])
        self._database.commit()

    def _add(self, row: Mapping[str, Any], candidates: Candidates) -> None:
        key, row_id = _key(row), row["id"]
        same = self._database.execute("select candidates from pools where key = ?", (key,)).fetchone()
        if same is not None:  # sets of older versions can have a row for each reference
            row_id, candidates = "", [*json.loads(same[0]), *candidates]
        text = json.dumps(candidates, ensure_ascii=False)
        self._database.execute("insert or replace into pools values (?, ?, ?)", (key, row_id, text))


@contextmanager
def open_earlier(config: Config) -> Iterator[EarlierSet | None]:
    """Open and read the set of `generate.extend`; yield None without the setting.

    Raises `UsageError` if its candidates cannot be in one set with those of the config, and `CappyError` if it cannot be read.
    """
    if config.generate.extend is None:
        yield None
        return
    opened = RegressionSet(config.generate.extend, SETTING)
    refuse_unfit(opened, config)
    with reuse.temporary_database(SETTING) as database:
        yield EarlierSet(opened, config, database)


def refuse_unfit(opened: RegressionSet, config: Config) -> None:
    """Raise `UsageError` if a set with this config cannot extend the opened set, with the setting and the fix."""
    manifest, name, generate = opened.manifest, f"{SETTING}={opened.uri}", config.generate
    if manifest["metric"] == RATING or "log" in (manifest.get("lineage") or {}):
        raise UsageError(
            f"{name} was made from a log of serve, so the settings of its candidates are unknown; use a set of `cappy generate`"
        )
    if "combines" in manifest:
        raise UsageError(f"{name} is a combined set, whose sets have different settings; extend one of them, and run `cappy combine` again")
    sampling_records.refuse_other_settings(sampling_records.of_manifest(manifest, opened.uri), config, name)
    limit = manifest["config"]["generate"].get("max_per_bin")
    if limit is not None and (generate.max_per_bin is None or generate.max_per_bin > limit):
        raise UsageError(
            f"generate.max_per_bin: {limit} -> {generate.max_per_bin}: {name} does not have the candidates above its limit; "
            f"use max_per_bin={limit} or less, or `cappy generate`"
        )
    metric = labels.describe_metric(generate.label)
    if limit is not None and manifest["metric"] != metric:
        raise UsageError(
            f"generate.label: {manifest['metric']['name']} -> {metric['name']}: {name} was balanced by max_per_bin={limit} with the "
            f"labels of its metric; keep the metric, or use `cappy generate`"
        )


def refuse_other_version(counts: Extended, recorded: str | None) -> None:
    """Raise `CappyError` if the set was published again after the run recorded its version."""
    if recorded is not None and counts["version"] != recorded:
        raise CappyError(f"{SETTING}={counts['uri']} was published again while this run started; run the same command again")


def _key(row: Mapping[str, Any]) -> bytes:
    return hash_text(json.dumps([row[name] for name in ROW], ensure_ascii=False), 16)
