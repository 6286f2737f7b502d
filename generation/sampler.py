"""The sampling stage: instruction rows in, the same rows with their sampled candidates out.

Ray Data builds one `Sampler` per actor, so the LLM loads once in `__init__`. Calls overlap: while the tail of one unit
decodes, the next ones fill the engine. Knows no Ray and no files.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from cluster.config import DecodingConfig, SamplerConfig
from generation import engine, prompts
from generation.engine import Candidate, Engine, PromptTooLong

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


class LLM(Protocol):
    """What a sampler needs of an engine; `generation.engine.Engine` is one."""

    @property
    def dead(self) -> bool: ...

    def encode(self, turns: Sequence[prompts.Message], form: str, room: int) -> list[int]: ...

    async def sample(self, token_ids: Sequence[int], decoding: DecodingConfig, seed: int, request_id: str) -> list[Candidate]: ...


LoadLLM = Callable[[SamplerConfig], LLM]


def load_engine(config: SamplerConfig) -> LLM:
    """Return the vLLM engine of a sampler config."""
    return Engine(config.model, config.engine)


class Sampler:
    """Add `sampled` (list of structs, `SAMPLED`) and `error` (text or null) to rows with the columns of `schema.PREPARED`.

    A row that fails `max_attempts` times, or whose prompt is too long, gets an `error` and no candidates; classification
    rows (with `answer_choices`) are passed on unsampled, their choices are their candidates. When the engine itself is
    dead the process exits, so that Ray replaces it and runs the unit again.
    """

    def __init__(self, config: SamplerConfig, seed: int, load: LoadLLM = load_engine) -> None:
        self.config = config
        self.seed = seed
        self.llm = load(config)
        self._room = max(decoding.max_tokens for decoding in config.decodings)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        results = await asyncio.gather(*(self._row(row) for row in batch.to_pylist()))
        sampled = pa.array([candidates for candidates, _ in results], SAMPLED)
        errors = pa.array([error for _, error in results], pa.string())
        yield batch.append_column("sampled", sampled).append_column("error", errors)

    async def _row(self, row: dict[str, Any]) -> tuple[list[Candidate], str | None]:
        if row["answer_choices"] is not None:
            return [], None
        for attempt in range(1, self.config.max_attempts + 1):
            try:
                turns = prompts.messages(row["instruction"], row["shots"], self.config.prompt.system)
                token_ids = self.llm.encode(turns, self.config.prompt.form, self._room)
                pools = await asyncio.gather(*(self._sample(row["id"], token_ids, each, attempt) for each in self.config.decodings))
                return [candidate for pool in pools for candidate in pool], None
            except PromptTooLong as error:
                return [], str(error)
            except Exception as error:
                # One row must never end the run; a dead engine must, for Ray to start a new one.
                if self.llm.dead:
                    print(f"the engine died: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
                reason = f"{type(error).__name__}: {error}"
        return [], f"sampling failed {self.config.max_attempts} times, last with {reason}"

    async def _sample(self, identity: str, token_ids: list[int], decoding: DecodingConfig, attempt: int) -> list[Candidate]:
        seed = engine.request_seed(self.seed, identity, decoding.name)
        # Ids must differ between retries and equal rows; the seed, which decides the text, must not.
        request_id = f"{identity}-{decoding.name}-{attempt}-{os.urandom(4).hex()}"
        return await self.llm.sample(token_ids, decoding, seed, request_id)
