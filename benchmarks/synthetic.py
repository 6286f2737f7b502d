"""An LLM that needs no weights, for benchmarks of what is ours: it answers at once, from the seed."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.config import DecodingConfig
from generation.engines import Candidate

WORDS = (
    *("the", "a", "red", "blue", "small", "old", "fox", "dog", "house", "river"),
    *("runs", "sleeps", "sees", "under", "over", "near", "quickly", "never", "often", "today"),
)


def text(seed: int) -> str:
    """Return eight words; seeds that differ by less than the vocabulary's size give different ones."""
    return " ".join(WORDS[(seed // (place + 1) + place * place) % len(WORDS)] for place in range(8))


class SyntheticLLM:
    """`generation.engines.LLM` without an engine."""

    dead = False

    def __init__(self, _: Any) -> None:
        pass

    def encode(self, turns: Any, form: str, room: int) -> list[int]:
        return [len(turn["content"]) for turn in turns]

    def most(self, prompt: Any, decoding: DecodingConfig) -> float:
        return 0.0

    def bill(self, request_id: str) -> float:
        return 0.0

    async def sample(self, prompt: Any, decoding: DecodingConfig, seed: int, request_id: str) -> list[Candidate]:
        await asyncio.sleep(0)
        return [
            Candidate(response=text(seed + draw), decoding=decoding.name, tokens=9, finish_reason="stop", logprob=-1.0)
            for draw in range(decoding.n)
        ]
