"""Find the sampled candidates of rows in earlier sets (`generate.reuse`), so that they are not sampled again. Imports no Ray.

A row is found by its id, which hashes its dataset, template, instruction and references. Each decoding is found on its own. Memory holds
no candidates: they are in a temporary SQLite file.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cluster.config import Config, SamplerConfig, differences
from cluster.errors import CappyError, UsageError, first_line
from cluster.progress import log
from generation.candidate_file import SampledRows, open_sampled

Candidates = list[dict[str, Any]]


class Reused(TypedDict):
    """The candidates that a run took from earlier sets."""

    rows: int
    complete: NotRequired[int]
    """Rows with all their candidates. Runs of older versions took complete rows only."""
    candidates: int
    tokens: int
    sources: dict[str, int]
    """Rows by URI of `generate.reuse`."""


class ReusableCandidates:
    """The candidates of `generate.reuse`; `reuse_candidates` opens it."""

    def __init__(self, database: sqlite3.Connection, config: Config) -> None:
        self._database = database
        self._uris = config.generate.reuse
        self.counts: Reused = {"rows": 0, "complete": 0, "candidates": 0, "tokens": 0, "sources": dict.fromkeys(self._uris, 0)}
        """Counts of the rows that were given to `count`."""

    def find(self, row_id: str, decodings: Collection[str]) -> dict[str, tuple[int, Candidates]]:
        """Return the candidates of a row (fields of `schema.SAMPLED`) by decoding, each with the number of its set.

        Only these decodings are returned, and of them only decodings with all their candidates in one set.
        """
        if not self._uris:
            return {}
        found = self._database.execute("select decoding, source, candidates from pools where id = ?", (row_id,)).fetchall()
        return {name: (source, json.loads(text)) for name, source, text in found if name in decodings}

    def count(self, found: Mapping[str, tuple[int, Candidates]], complete: bool) -> None:
        """Count the candidates of a row that the run takes; `complete` is whether nothing of the row is sampled."""
        pool = [candidate for _, candidates in found.values() for candidate in candidates]
        self.counts["rows"] += 1
        self.counts["complete"] += complete
        self.counts["candidates"] += len(pool)
        self.counts["tokens"] += sum(each["tokens"] for each in pool)
        for source in {source for source, _ in found.values()}:
            self.counts["sources"][self._uris[source]] += 1


@contextmanager
def temporary_database(setting: str) -> Iterator[sqlite3.Connection]:
    """Yield an empty SQLite database in a temporary folder. An error of SQLite in the block is raised as `CappyError` naming `setting`."""
    with tempfile.TemporaryDirectory(prefix="cappy-reuse-") as folder, closing(sqlite3.connect(Path(folder, "candidates"))) as database:
        try:
            yield database
        except sqlite3.Error as error:
            raise CappyError(
                f"{folder}: the candidates of {setting} cannot be stored ({first_line(error)}); free space there, or set TMPDIR to a "
                f"folder with more"
            ) from None


@contextmanager
def reuse_candidates(config: Config) -> Iterator[ReusableCandidates]:
    """Read the sets and files of `generate.reuse`, and yield their candidates that fit the config.

    Raises `UsageError` if one of them has no candidates of the config. Raises `CappyError` if one cannot be read, or the temporary folder
    is full.
    """
    with temporary_database("generate.reuse") as database:
        database.execute(
            "create table pools (id text, decoding text, source integer, candidates text, primary key (id, decoding)) without rowid"
        )
        for source, uri in enumerate(config.generate.reuse):
            _store(database, source, open_sampled(uri, "generate.reuse", config.sampler.model), config.sampler)
        database.commit()
        yield ReusableCandidates(database, config)


def select_decodings(candidates: Sequence[dict[str, Any]], config: SamplerConfig) -> dict[str, Candidates]:
    """Return the candidates of each decoding of `config` that has all of them, by name.

    Of a decoding with more candidates than `n`, the first `n` are taken.
    """
    pools = {each.name: [one for one in candidates if one["decoding"] == each.name][: each.n] for each in config.decodings}
    return {each.name: pools[each.name] for each in config.decodings if len(pools[each.name]) == each.n}


def _store(database: sqlite3.Connection, source: int, opened: SampledRows, config: SamplerConfig) -> None:
    """Store the decodings of a set that have all candidates. A decoding of an earlier set is kept."""
    usable = 0
    for row_id, candidates in opened.rows if opened.model == config.model else ():
        pools = select_decodings(candidates, config)
        usable += bool(pools)
        for name, pool in pools.items():
            text = json.dumps(pool, ensure_ascii=False)
            database.execute("insert or ignore into pools values (?, ?, ?, ?)", (row_id, name, source, text))
    if not usable:
        decodings = ", ".join(f"{each.n} of {each.name}" for each in config.decodings)
        raise UsageError(
            f"generate.reuse={opened.uri} has no row with all candidates of a decoding of this run (sampler.model={config.model}; "
            f"{decodings}); its candidates are of {opened.model}; leave it out, or use its model and decodings"
        )
    _log_differences(opened, config)


def _log_differences(opened: SampledRows, config: SamplerConfig) -> None:
    """Log the settings in which the sampling of a set differs from the config; `n` and `max_tokens` may differ."""
    now = config.model_dump(mode="json")
    changes: set[str] = set()
    for settings in opened.settings:
        names = {each["name"] for each in settings["decodings"]} & {each.name for each in config.decodings}
        changes.update(differences(_comparable(settings, names), _comparable(now, names)))
    if changes:
        log(
            f"warning: generate.reuse={opened.uri} was sampled with other settings, and its candidates are used: "
            f"{'; '.join(sorted(changes))}"
        )


def _comparable(settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    decodings = {
        each["name"]: {key: value for key, value in each.items() if key not in ("name", "n", "max_tokens")}
        for each in settings["decodings"]
        if each["name"] in names
    }
    return {"prompt": settings["prompt"], "decodings": decodings}
