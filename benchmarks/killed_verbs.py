"""The verbs that `benchmarks.kills` interrupts: an LLM and a scorer that log their process, and the rows of the published folders."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks.answer_quality import read_answers
from benchmarks.synthetic import SyntheticLLM
from cluster import artifacts
from cluster.config import Config, DecodingConfig, load
from generation import engines, generate
from generation.dataset import RegressionSet
from generation.engines.contract import Candidate
from serving import answer, answer_units
from serving.scorer_cache import LoadedScorer

Pools = dict[str, list[str]]
"""The responses of rows, by id."""


class Call(NamedTuple):
    """One line of a log: a request to the LLM, or a call of the scorer."""

    row: str
    """Id of the row, with its round after the first; "load" or "score" in the log of the scorer."""
    moment: float
    """Seconds since 1970."""
    pid: int
    """The process of the actor."""
    node: str
    """The node of the actor, in Ray's hex digits."""


def read_calls(log: Path) -> list[Call]:
    """Return the lines of a log, empty without a file. The last line can be incomplete and is then left out."""
    if not log.exists():
        return []
    lines = [line.split() for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [Call(row, float(moment), int(pid), node) for row, moment, pid, node in lines]


def _write_call(log: str, row: str, node: str) -> None:
    with Path(log).open("a") as file:
        file.write(f"{row} {time.time()} {os.getpid()} {node}\n")


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


class LoggedLLM:
    """An LLM (`generation.engines.contract.LLM`) that logs each request, waits `delay_s` seconds and calls another LLM."""

    def __init__(self, llm: Any, log: str, delay_s: float) -> None:
        self._llm, self._log, self._delay_s, self._node = llm, log, delay_s, _node()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def sample(self, prompt: Any, decoding: DecodingConfig, seed: int | None, request_id: str) -> list[Candidate]:
        _write_call(self._log, request_id.split("-")[0], self._node)
        await asyncio.sleep(self._delay_s)
        drawn: list[Candidate] = await self._llm.sample(prompt, decoding, seed, request_id)
        return drawn


def _load_llm(config: Any, log: str, real: bool) -> Any:
    return LoggedLLM(engines.load_engine(config), log, 0.0) if real else LoggedLLM(SyntheticLLM(config), log, 0.5)


class SyntheticScorer:
    """A scorer without weights: the score of a pair is a hash in [0, 1). A call takes 0.2 seconds."""

    def score(self, instructions: Sequence[str], responses: Sequence[str]) -> Any:
        time.sleep(0.2)
        pairs = (f"{instruction}\0{response}".encode() for instruction, response in zip(instructions, responses, strict=True))
        return np.array([zlib.crc32(pair) / 2**32 for pair in pairs], np.float32)


class LoggedScorer:
    """A scorer that logs each call and calls another scorer."""

    def __init__(self, scorer: Any, log: str) -> None:
        self._scorer, self._log, self._node = scorer, log, _node()

    def score(self, instructions: Sequence[str], responses: Sequence[str]) -> Any:
        _write_call(self._log, "score", self._node)
        return self._scorer.score(instructions, responses)


def _load_scorer(config: Config, log: str, real: bool) -> LoadedScorer:
    _write_call(log, "load", _node())
    synthetic: Any = SyntheticScorer()
    loaded = answer_units.load_main_scorer(config) if real else LoadedScorer(synthetic, None, None)
    scorer: Any = LoggedScorer(loaded.model, log)
    return replace(loaded, model=scorer)


@dataclass(frozen=True)
class Verb:
    """A verb that publishes a folder from units."""

    destination: str
    """The setting with the folder."""
    settings: tuple[str, ...]
    """Further settings of every run."""
    sampled: str
    """Folder of the objects of sampled units, below the staging folder."""
    run: Callable[[Config, Path, bool], Any]
    """Runs the verb: the config, the log of the LLM, and whether LLM and scorer are those of the config."""
    read: Callable[[str], list[dict[str, Any]]]
    """Verifies the files of the published folder and returns its rows."""


def _generate(config: Config, log: Path, real: bool) -> Any:
    return generate.run_generate(config, load=functools.partial(_load_llm, log=str(log), real=real))


def _answer(config: Config, log: Path, real: bool) -> Any:
    load_scorer = functools.partial(_load_scorer, log=str(scorer_log(log)), real=real)
    return answer.run_answer(config, load=functools.partial(_load_llm, log=str(log), real=real), load_scorer=load_scorer)


def _read_set(uri: str) -> list[dict[str, Any]]:
    opened = RegressionSet(uri)
    assert artifacts.verify(uri, opened.manifest) == []
    return [row for split in ("train", "validation") for batch in opened.batches(split) for row in batch.to_pylist()]


def _read_answers(uri: str) -> list[dict[str, Any]]:
    assert artifacts.verify(uri, artifacts.read_manifest(uri, "answers", "answer")) == []
    return read_answers(uri)


VERBS: Mapping[str, Verb] = {
    "generate": Verb("dataset", (), "units", _generate, _read_set),
    "answer": Verb("answers_path", ("answer.keep_candidates=true", "scorer_path=cappy-minilm"), "sampled", _answer, _read_answers),
}


def scorer_log(log: Path) -> Path:
    """Return the log of the scorer beside that of the LLM."""
    return log.with_name(f"{log.name}.scorer")


def drive(verb: str, place: str, log: str, real: bool, settings: Sequence[str]) -> None:
    """Run a verb; the benchmark starts this in a separate process."""
    chosen = VERBS[verb]
    chosen.run(load(None, [f"{chosen.destination}={place}", *chosen.settings, *settings]), Path(log), real)


def sampled_pools(unit: pa.Table) -> Pools:
    """Return the sampled responses of the rows of a unit. A row of a later round has the number of its round in its id, as in the log."""
    pools: Pools = {}
    for row in unit.to_pylist():
        drawn = row["sampled"] if "sampled" in row else [each for each in row["candidates"] if each["source"] == "sampled"]
        pools[f"{row['id']}.{row['round']}" if row.get("round") else row["id"]] = [each["response"] for each in drawn]
    return pools


def changed_pools(sampled: Pools, published: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows of sampled units that the published rows do not have with these responses, in any order."""
    found = {row["id"]: [each["response"] for each in row["candidates"]] for row in published}
    return [row for row, pool in sampled.items() if not _contains(found.get(row.split(".")[0], []), pool)]


def _contains(responses: Sequence[str], part: Sequence[str]) -> bool:
    return all(responses.count(response) >= part.count(response) for response in part)


def as_multiset(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return published rows as JSON, sorted."""
    return sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)


def pool_sizes(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Return the ids of published rows and the number of candidates of each, sorted."""
    return sorted((row["id"], len(row["candidates"])) for row in rows)
