"""Compare pools per second of vLLM's engine on CPU: a prompt's end prefilled once for all candidates, or once for each candidate.

    python -m benchmarks.siblings --json -

The prompts are those of `benchmarks.serving`, with `--candidates` candidates each and `--clients` concurrent prompts. An engine with
prefill sharing and an engine without it alternate, with the same settings (`--set`). They never run at the same time. A rate is
measured while all clients are busy.

- `speedup`: rate with prefill sharing divided by the rate without it in the same turn, median over the turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import serving
from benchmarks.load import Answer, closed_loop_rate
from cluster.config import Config, VLLMConfig
from cluster.progress import log
from generation.engines.vllm import VLLMEngine

_WARM = 24


async def pools_per_second(config: Config, bodies: Sequence[dict[str, Any]], clients: int, candidates: int) -> float:
    """Start an engine and return the pools per second that it samples for the bodies, after a warm-up."""
    assert isinstance(config.sampler.engine, VLLMConfig)
    engine = VLLMEngine(config.sampler.model, config.sampler.engine)
    decoding = config.sampler.decodings[0].model_copy(
        update={"n": candidates, "temperature": bodies[0]["temperature"], "max_tokens": bodies[0]["max_tokens"], "top_k": None}
    )
    answers: list[Answer] = []

    async def client(waiting: Iterator[tuple[int, list[int]]]) -> None:
        for number, ids in waiting:
            due = time.perf_counter()
            await engine.sample(ids, decoding, None, str(number), logprobs=False)
            answers.append(Answer(due, time.perf_counter() - due, 200))

    try:
        prompts = [engine.encode(body["messages"], config.sampler.prompt.form, decoding.max_tokens) for body in bodies]
        for some in (prompts[:_WARM], prompts[_WARM:]):
            answers.clear()
            waiting = iter(enumerate(some))
            await asyncio.gather(*(client(waiting) for _ in range(clients)))
        return closed_loop_rate(answers, clients)
    finally:
        engine.close()


def main() -> int:
    made = serving.parser()
    made.description = __doc__.splitlines()[0] if __doc__ else None
    made.add_argument("--turns", type=int, default=3)
    options: argparse.Namespace = made.parse_args()
    rates: dict[str, list[float]] = {"each": [], "once": []}
    with tempfile.TemporaryDirectory(prefix="cappy-siblings-") as name:
        config, prompts = serving.prepare(options, Path(name))
        bodies = prompts.ours(_WARM + options.requests)
    for turn in range(options.turns):
        for side, shared in (("each", False), ("once", True)):
            engine = config.sampler.engine.model_copy(update={"share_prefill": shared})
            shared_config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"engine": engine})})
            rates[side].append(asyncio.run(pools_per_second(shared_config, bodies, options.clients, options.candidates)))
            log(f"turn {turn + 1} of {options.turns}, prefilled {side}: {rates[side][-1]:.2f} pools/s")
    result = {
        "speedup": round(statistics.median(once / each for once, each in zip(rates["once"], rates["each"], strict=True)), 3),
        "pools_per_second": {side: [round(value, 3) for value in values] for side, values in rates.items()},
        **{name: getattr(options, name) for name in ("answers", "candidates", "clients", "requests")},
    }
    serving.show(result, bool(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
