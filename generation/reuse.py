"""Find the sampled candidates of rows in earlier sets (`generate.reuse`), so that the rows are not sampled again. Imports no Ray.

A row is found by its id, which hashes its dataset, template, instruction and references. Memory holds no candidates: they are in a
temporary SQLite file.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypedDict

from cluster.config import Config, SamplerConfig, differences
from cluster.errors import CappyError, UsageError, first_line
from cluster.progress import log
from generation.candidate_file import SampledRows, open_sampled


class Reused(TypedDict):
    """The candidates that a run took from earlier sets."""

    rows: int
    candidates: int
    tokens: int
    sources: dict[str, int]
    """Rows by URI of `generate.reuse`."""


class ReusableCandidates:
    """The candidates of `generate.reuse`; `reuse_candidates` opens it."""

    def __init__(self, database: sqlite3.Connection, config: Config) -> None:
        self._database = database
        self._uris = config.generate.reuse
        self.counts: Reused = {"rows": 0, "candidates": 0, "tokens": 0, "sources": dict.fromkeys(self._uris, 0)}
        """Counts of the rows that `find` returned."""

    def find(self, row_id: str) -> list[dict[str, Any]] | None:
        """Return the candidates of a row (fields of `schema.SAMPLED`) and count them; None if no set has all its decodings."""
        found = self._database.execute("select source, candidates from pools where id = ?", (row_id,)).fetchone()
        if found is None:
            return None
        pool: list[dict[str, Any]] = json.loads(found[1])
        self.counts["rows"] += 1
        self.counts["candidates"] += len(pool)
        self.counts["tokens"] += sum(each["tokens"] for each in pool)
        self.counts["sources"][self._uris[found[0]]] += 1
        return pool


@contextmanager
def reuse_candidates(config: Config) -> Iterator[ReusableCandidates]:
    """Read the sets and files of `generate.reuse`, and yield their candidates that fit the config.

    Raises `UsageError` if one of them has no row with all decodings of the config. Raises `CappyError` if one cannot be read, or the
    temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="cappy-reuse-") as folder, closing(sqlite3.connect(Path(folder, "candidates"))) as database:
        try:
            database.execute("create table pools (id text primary key, source integer, candidates text) without rowid")
            for source, uri in enumerate(config.generate.reuse):
                _store(database, source, open_sampled(uri, "generate.reuse"), config.sampler)
            database.commit()
        except sqlite3.Error as error:
            raise CappyError(
                f"{folder}: the candidates of generate.reuse cannot be stored ({first_line(error)}); free space there, or set TMPDIR to a "
                f"folder with more"
            ) from None
        yield ReusableCandidates(database, config)


def select_decodings(candidates: Sequence[dict[str, Any]], config: SamplerConfig) -> list[dict[str, Any]] | None:
    """Return the candidates that the decodings of `config` draw, in their order; None if a decoding has too few.

    Of a decoding with more candidates than `n`, the first `n` are taken.
    """
    pool: list[dict[str, Any]] = []
    for decoding in config.decodings:
        drawn = [each for each in candidates if each["decoding"] == decoding.name][: decoding.n]
        if len(drawn) < decoding.n:
            return None
        pool += drawn
    return pool


def _store(database: sqlite3.Connection, source: int, opened: SampledRows, config: SamplerConfig) -> None:
    """Store the rows of a set that have all decodings. A row of an earlier set is kept."""
    usable = 0
    for row_id, candidates in opened.rows if opened.model == config.model else ():
        pool = select_decodings(candidates, config)
        if pool is not None:
            usable += 1
            text = json.dumps(pool, ensure_ascii=False)
            database.execute("insert or ignore into pools values (?, ?, ?)", (row_id, source, text))
    if not usable:
        decodings = ", ".join(f"{each.n} of {each.name}" for each in config.decodings)
        raise UsageError(
            f"generate.reuse={opened.uri} has no row with all candidates of this run (sampler.model={config.model}; {decodings}); "
            f"its candidates are of {opened.model}; leave it out, or use its model and decodings"
        )
    _log_differences(opened, config)


def _log_differences(opened: SampledRows, config: SamplerConfig) -> None:
    """Log the settings in which the sampling of a set differs from the config; `n` and `max_tokens` may differ."""
    now = _comparable(config.model_dump(mode="json"), config)
    changes = sorted({change for settings in opened.settings for change in differences(_comparable(settings, config), now)})
    if changes:
        log(f"warning: generate.reuse={opened.uri} was sampled with other settings, and its candidates are used: {'; '.join(changes)}")


def _comparable(settings: dict[str, Any], config: SamplerConfig) -> dict[str, Any]:
    names = {decoding.name for decoding in config.decodings}
    decodings = {
        each["name"]: {key: value for key, value in each.items() if key not in ("name", "n", "max_tokens")}
        for each in settings["decodings"]
        if each["name"] in names
    }
    return {"prompt": settings["prompt"], "decodings": decodings}
