"""A scorer without weights for tests of `answer` and `score`: a score depends on the pair alone."""

from __future__ import annotations

import os
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np

from serving.scorer_cache import LoadedScorer


def score_of(instruction: str, response: str) -> float:
    """Return a number in [0, 1) for a pair."""
    return int.from_bytes(blake2b(f"{instruction}\0{response}".encode(), digest_size=4).digest(), "big") / 2**32


class NumberScorer:
    """Scores pairs with `score_of`. A pair with "NO SCORE" raises an error.

    `kill` is a folder: the first `kills` calls end their process there. `log` is a file that gets a line for each scored pair.
    """

    def __init__(
        self, kill: str | None = None, kills: int = 0, delay_s: float = 0.0, log: str | None = None, dtype: str = "float32"
    ) -> None:
        self.dtype, self.log = dtype, log
        self.kill, self.kills, self.delay_s = kill, kills, delay_s

    def score(self, instructions, responses):
        time.sleep(self.delay_s)
        if self.kill is not None:
            ended = len(list(Path(self.kill).iterdir()))
            if ended < self.kills:
                Path(self.kill, f"{ended}").touch()
                os._exit(1)
        if any("NO SCORE" in text for text in instructions):
            raise RuntimeError("out of memory")
        if self.log:
            with Path(self.log).open("a") as log:
                log.writelines(f"{instruction}\t{response}\n" for instruction, response in zip(instructions, responses, strict=True))
        return np.array([score_of(*pair) for pair in zip(instructions, responses, strict=True)], np.float32)


def load_number_scorer(config, selection=None, **options):
    """Load a `NumberScorer` as the main scorer."""
    return LoadedScorer(NumberScorer(**options), None, None, selection)  # type: ignore[arg-type]
