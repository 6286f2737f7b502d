"""An LLM whose engine is a separate process that a prompt, or a plan, kills with SIGKILL. Its answers are those of `FixedLLM`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

from tests.generation.fixed_llm import FixedLLM

# Answers each line with a line; ends itself at a line with KILL, and at each request whose number over all engines is in the plan.
_ENGINE = """
import os, signal, sys
log, plan = sys.argv[1], set(sys.argv[2].split(","))
for line in sys.stdin:
    with open(log, "a") as file:
        file.write(line)
    with open(log) as file:
        number = sum(1 for _ in file)
    if "KILL" in line or "all" in plan or str(number) in plan:
        os.kill(os.getpid(), signal.SIGKILL)
    print("done", flush=True)
"""


class ProcessLLM(FixedLLM):
    """Implements `contract.LLM`. `log` gets a line for each request; `plan` has the numbers of the requests that end the engine."""

    def __init__(self, config, log, plan=()):
        super().__init__(config)
        command = [sys.executable, "-c", _ENGINE, str(log), ",".join(map(str, plan))]
        self._engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()

    @property
    def dead(self):
        return self._engine.poll() is not None

    async def sample(self, token_ids, decoding, seed, request_id):
        text = bytes(token_ids).decode().replace("\n", " ")
        if not await asyncio.to_thread(self._request, text):
            self._engine.wait()
            raise RuntimeError("the engine process ended")
        return await super().sample(token_ids, decoding, seed, request_id)

    def _request(self, text):
        with self._lock:
            try:
                self._engine.stdin.write(f"{text}\n")
                self._engine.stdin.flush()
            except BrokenPipeError:
                return False
            return bool(self._engine.stdout.readline())


def requests(log):
    """Return the prompts of all requests, in order."""
    return [line.strip() for line in Path(log).read_text().splitlines()]
