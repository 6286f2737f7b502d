"""An LLM without weights for tests of the sampling stage: each response depends only on the seed. It does not imitate vLLM."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from generation.engines.contract import PromptTooLong
from generation.prompts import raw_text


class FixedLLM:
    """Implements `contract.LLM`. A prompt with "TOO LONG" or "FAILS" raises an error.

    `delay_s` is the duration of a request in seconds. `log` is a file that gets a line for each request.
    """

    dead = False

    def __init__(self, config, delay_s=0.0, log=None):
        self.delay_s, self.log = delay_s, log

    def encode(self, turns, form, room):
        text = raw_text(turns)
        if "TOO LONG" in text:
            raise PromptTooLong("the prompt has 9000 tokens")
        if "FAILS" in text:
            raise ValueError("no such token")
        return list(text.encode())

    def max_cost(self, prompt, decoding):
        return 0.0

    def pop_cost(self, request_id):
        return 0.0

    async def sample(self, token_ids, decoding, seed, request_id):
        await asyncio.sleep(self.delay_s)
        if self.log:
            with Path(self.log).open("a") as log:
                log.write(f"{request_id.split('-')[0]} {decoding.name} {os.getpid()} {time.time()}\n")
        return [
            {
                "response": f"number {seed % 7} {draw}",
                "decoding": decoding.name,
                "tokens": 3,
                "finish_reason": "stop",
                "logprob": -float(draw),
            }
            for draw in range(decoding.n)
        ]
