"""The sampling stage: instruction rows in, the same rows with their sampled candidates out.

Ray Data builds one `Sampler` per actor, so the LLM loads once in `__init__`. Calls overlap: while the tail of one unit
decodes, the next ones fill the engine. Knows no Ray and no files.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pyarrow as pa

from cluster.config import DecodingConfig, SamplerConfig
from cluster.errors import CappyError
from generation import engines, prompts
from generation.engines import contract
from generation.engines.contract import LLM, Candidate, RowError

SAMPLED = pa.list_(
    pa.struct(
        [
            ("response", pa.string()),
            ("decoding", pa.string()),
            ("tokens", pa.int32()),
            ("finish_reason", pa.string()),
            ("logprob", pa.float64()),
        ]
    )
)


LoadLLM = Callable[[SamplerConfig], LLM]


class Sampler:
    """Add `sampled` (list of structs, `SAMPLED`), `error` (text or null) and `cost` (float64, dollars, 0 for an engine of our
    own) to rows with the columns of `schema.PREPARED`.

    A row that fails `max_attempts` times, or that the engine will never answer, gets an `error` and no candidates, and its
    cost all the same; classification rows (with `answer_choices`) are passed on unsampled, their choices are their
    candidates. A `CappyError` of the engine's that is no row's fault (a refused key) ends the run. When the engine itself is
    dead the process exits, so that Ray replaces it and runs the unit again.
    """

    def __init__(self, config: SamplerConfig, seed: int, load: LoadLLM = engines.load_engine) -> None:
        self.config = config
        self.seed = seed
        self.llm = load(config)
        self._room = max(decoding.max_tokens for decoding in config.decodings)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        results = await asyncio.gather(*(self._row(row) for row in batch.to_pylist()))
        sampled, errors, costs = zip(*results, strict=True) if results else ((), (), ())
        yield (
            batch.append_column("sampled", pa.array(sampled, SAMPLED))
            .append_column("error", pa.array(errors, pa.string()))
            .append_column("cost", pa.array(costs, pa.float64()))
        )

    def max_cost(self, rows: Sequence[dict[str, Any]]) -> float:
        """Return the most dollars the sampling of some rows can cost, whatever happens to it."""
        return sum(self._max_row_cost(row) for row in rows if row["answer_choices"] is None)

    def _max_row_cost(self, row: dict[str, Any]) -> float:
        try:
            prompt = self.llm.encode(self._turns(row), self.config.prompt.form, self._room)
        except RowError:
            return 0.0
        return sum(self.llm.max_cost(prompt, decoding) for decoding in self.config.decodings)

    def _turns(self, row: dict[str, Any]) -> list[prompts.Message]:
        return prompts.messages(row["instruction"], row["shots"], self.config.prompt.system)

    async def _row(self, row: dict[str, Any]) -> tuple[list[Candidate], str | None, float]:
        """Return a row's candidates, its error and its cost."""
        if row["answer_choices"] is not None:
            return [], None, 0.0
        turns, cost = self._turns(row), 0.0
        for _ in range(self.config.max_attempts):
            try:
                prompt = self.llm.encode(turns, self.config.prompt.form, self._room)
                draws = await asyncio.gather(*(self._draw(row["id"], turns, prompt, each) for each in self.config.decodings))
            except Exception as error:
                failure = error
            else:
                cost += sum(spent for _, _, spent in draws)
                failures = [error for _, error, _ in draws if error]
                if not failures:
                    return [candidate for pool, _, _ in draws for candidate in pool], None, cost
                failure = failures[0]
            if isinstance(failure, RowError):
                return [], str(failure), cost
            if isinstance(failure, CappyError):
                raise failure
            # One row must never end the run; a dead engine must, for Ray to start a new one.
            if self.llm.dead:
                print(f"the engine died: {failure}", file=sys.stderr, flush=True)
                os._exit(1)
            reason = f"{type(failure).__name__}: {failure}"
        return [], f"sampling failed {self.config.max_attempts} times, last with {reason}", cost

    async def _draw(
        self, row_id: str, turns: Sequence[prompts.Message], prompt: Any, decoding: DecodingConfig
    ) -> tuple[list[Candidate], Exception | None, float]:
        """Return the candidates of one decoding, or what went wrong, and what it cost: money is spent on failures too."""
        seed = contract.request_seed(self.seed, row_id, decoding.name)
        request_id = f"{row_id}-{contract.request_identity(self.config.model, turns, decoding, seed)}"
        try:
            return await self.llm.sample(prompt, decoding, seed, request_id), None, self.llm.pop_cost(request_id)
        except Exception as error:
            return [], error, self.llm.pop_cost(request_id)
