"""The sampling stage: add sampled candidates to prepared rows. Imports no Ray and reads no files.

Ray Data builds one `Sampler` per actor, so the LLM loads once, in `__init__`. Calls run concurrently: the next units keep
the engine busy during the last tokens of a unit.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError

from cluster.config import DecodingConfig, SamplerConfig
from cluster.errors import CappyError
from generation import engines, prompts, token_limits
from generation.engines import contract
from generation.engines.chat_template import template_refusal
from generation.engines.contract import LLM, Candidate, ContentFiltered, RowError
from generation.schema import SAMPLED

LoadLLM = Callable[[SamplerConfig], LLM]
Sampled = tuple[list[Candidate], str | None, float]
"""The candidates of a row, the error if it has none, and its cost in dollars."""


class NoLLM:
    """The LLM of a run without rows to sample: a source of classification rows only. It loads nothing."""

    dead = False

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int) -> Any:
        raise CappyError(f"sampler.model={self._config.model} was not loaded, because no row is sampled")

    async def sample(self, prompt: Any, decoding: DecodingConfig, seed: int | None, request_id: str) -> list[Candidate]:
        raise CappyError(f"sampler.model={self._config.model} was not loaded, because no row is sampled")

    def max_cost(self, prompt: Any, decoding: DecodingConfig) -> float:
        return 0.0

    def pop_cost(self, request_id: str) -> float:
        return 0.0


class Sampler:
    """Add the sampled candidates of each row. The input has the columns of `schema.PREPARED`; the output has three more:

    - `sampled`: a list of structs (`SAMPLED`), without the candidates from earlier sets (`reused`);
    - `error`: the reason why the row has no candidates, or null;
    - `cost`: float64, in dollars; 0 for an engine that runs in this process.

    A row fails if its sampling fails `sampler.max_attempts` times, or if the engine rejects it (`RowError`). A failed row
    has an `error`, no candidates, and the cost of its attempts. `known_result` has the rows that are not sampled.

    Raises the engine's `CappyError` if the cause is not the row, for example a rejected API key; the run then ends. If the
    engine process has crashed, this process exits. Ray then starts a new actor and runs the unit again; see `attempts`.
    """

    def __init__(
        self,
        config: SamplerConfig,
        seed: int,
        load: LoadLLM = engines.load_engine,
        limits: Mapping[str, int] | None = None,
        rounds: Sequence[Sequence[DecodingConfig]] | None = None,
    ) -> None:
        """Load the LLM.

        Args:
            config: the sampler settings.
            seed: the seed of the run.
            load: loads the LLM.
            limits: the largest length of a candidate in tokens, by dataset; see `generation.token_limits`.
            rounds: the decodings of each round; a row has the number of its round in `round`. None samples the decodings of the config.
        """
        self.config = config
        self.limits = limits or {}
        self.rounds = rounds or (config.decodings,)
        self.seed = seed
        self.llm = load(config)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        yield append_results(batch, await asyncio.gather(*(self.sample_row(row) for row in batch.to_pylist())))

    def max_cost(self, rows: Sequence[dict[str, Any]]) -> float:
        """Return an upper bound of the cost of sampling these rows, in dollars, failed attempts included."""
        return sum(self._max_row_cost(row) for row in rows if known_result(row) is None)

    def _max_row_cost(self, row: dict[str, Any]) -> float:
        decodings = self._decodings(row)
        try:
            prompt = self._encode(self._turns(row), decodings)
        except RowError:
            return 0.0
        return sum(self.llm.max_cost(prompt, decoding) for decoding in decodings)

    def _decodings(self, row: dict[str, Any]) -> tuple[DecodingConfig, ...]:
        decodings: Sequence[DecodingConfig] = self.rounds[row.get("round") or 0]
        if row.get("draw") is not None:
            drawn = zip(decodings, row["draw"], strict=True)
            decodings = [each.model_copy(update={"n": count}) for each, count in drawn if count]
        return token_limits.limit_decodings(decodings, self.limits.get(row.get("dataset", "")))

    def _identity(self, row: Mapping[str, Any], decoding: DecodingConfig) -> str:
        """Return the text that decides the seeds of a decoding of a row, beside the seed of the run and the name of the decoding.

        It is the id of the row, with its round after the first, or with the number of the candidates that an earlier set has.
        """
        number = row.get("round") or 0
        earlier = next(each.n for each in self.rounds[number] if each.name == decoding.name) - decoding.n
        return str(row["id"]) + (f".{number}" if number else "") + (f".after{earlier}" if earlier else "")

    def _encode(self, turns: Sequence[prompts.Message], decodings: Sequence[DecodingConfig]) -> Any:
        return self.llm.encode(turns, self.config.prompt.form, max(decoding.max_tokens for decoding in decodings))

    def _turns(self, row: dict[str, Any]) -> list[prompts.Message]:
        return prompts.messages(row["instruction"], row["shots"], self.config.prompt.system)

    async def sample_row(self, row: dict[str, Any]) -> Sampled:
        """Sample one row, with the errors and retries of the class."""
        if (known := known_result(row)) is not None:
            return known
        turns, decodings, cost = self._turns(row), self._decodings(row), 0.0
        for _ in range(self.config.max_attempts):
            try:
                prompt = self._encode(turns, decodings)
                draws = await asyncio.gather(*(self._sample_decoding(self._identity(row, each), turns, prompt, each) for each in decodings))
            except TemplateError as error:
                # All rows have the same turns, so the template refuses each of them.
                raise template_refusal(self.config.prompt, self.config.model, error) from None
            except Exception as error:
                failure = error
            else:
                cost += sum(spent for _, _, spent in draws)
                failures = [error for _, error, _ in draws if error]
                pool = [candidate for drawn, _, _ in draws for candidate in drawn]
                # A content filter that stopped some candidates does not take the others from the row.
                if not failures or (pool and all(isinstance(error, ContentFiltered) for error in failures)):
                    return pool, None, cost
                failure = failures[0]
            if isinstance(failure, RowError):
                return [], str(failure), cost
            if isinstance(failure, CappyError):
                raise failure
            # An error of one row must not end the process. A crashed engine must end it, so that Ray starts a new actor.
            if self.llm.dead:
                print(f"the sampling engine crashed, exiting this actor: {failure}", file=sys.stderr, flush=True)
                os._exit(1)
            reason = f"{type(failure).__name__}: {failure}"
        return [], f"sampling failed {self.config.max_attempts} times; the last error: {reason}", cost

    async def _sample_decoding(
        self, identity: str, turns: Sequence[prompts.Message], prompt: Any, decoding: DecodingConfig
    ) -> tuple[list[Candidate], Exception | None, float]:
        """Return the candidates of one decoding or its exception, and its cost in dollars. A failed request can have a cost."""
        seed = contract.request_seed(self.seed, identity, decoding.name)
        request_id = f"{identity}-{contract.request_identity(self.config.model, turns, decoding, seed)}"
        try:
            found = await self.llm.sample(prompt, decoding, seed, request_id)
            return [_without_undefined_logprob(candidate) for candidate in found], None, self.llm.pop_cost(request_id)
        except Exception as error:
            return [], error, self.llm.pop_cost(request_id)


def known_result(row: Mapping[str, Any]) -> Sampled | None:
    """Return the result of a row that is not sampled, else None.

    The choices of a classification row (with `answer_choices`) are its candidates. A row with all its candidates in earlier sets has
    them in `reused`, and `draw` is 0 for each decoding. Rows that older versions prepared have no `draw`.
    """
    draw = row.get("draw")
    complete = row.get("reused") is not None if draw is None else not any(draw)
    return ([], None, 0.0) if complete or row["answer_choices"] is not None else None


def append_results(batch: pa.Table, results: Sequence[Sampled]) -> pa.Table:
    """Return a table with the columns `sampled`, `error` and `cost` of its rows."""
    sampled, errors, costs = zip(*results, strict=True) if results else ((), (), ())
    return (
        batch.append_column("sampled", pa.array(sampled, SAMPLED))
        .append_column("error", pa.array(errors, pa.string()))
        .append_column("cost", pa.array(costs, pa.float64()))
    )


def _without_undefined_logprob(candidate: Candidate) -> Candidate:
    """Return a candidate whose log-probability is None if it is NaN or infinite, so that sums and JSON stay defined."""
    logprob = candidate["logprob"]
    return candidate if logprob is None or math.isfinite(logprob) else {**candidate, "logprob": None}
