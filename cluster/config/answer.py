"""Settings of `answer`: the candidates, the selection limits and the scorer stage of batch answers."""

from __future__ import annotations

from pydantic import Field

from cluster.config.base import Section


class AnswerConfig(Section):
    """Batch answers of `cappy answer`.

    The LLM and its decodings are in `sampler`. The selection is that of `cappy serve`: `serving.selection`, `serving.fallback`,
    `serving.adaptive` and `serving.scorer_dtype` apply. Units, shards and the limit of dead letters are those of `generate`.
    """

    candidates: int | None = Field(None, ge=1, le=256)
    """Candidates of a row. Greedy decodings give one each, and the others share the rest, as in a server. null takes `n` of each
    decoding."""
    min_score: float | None = Field(None, allow_inf_nan=False)
    """Smallest score of an answer. A row whose best candidate has a lower score has no `response`, and `abstained` is true. null answers
    every row."""
    keep_candidates: bool = False
    """Add the column `candidates`: all candidates of a row with their scores, in the order of sampling."""
    scorers: int = Field(1, ge=1)
    """Number of scoring actors. Scoring is a separate stage, so sampling continues meanwhile."""
    scorer_gpus: float | None = Field(None, ge=0, le=1)
    """GPUs of a scoring actor, mostly a fraction of one. null takes a quarter of a GPU if the sampling actors leave one free. Otherwise,
    and with 0, a scoring actor shares a visible GPU with other processes, or uses the CPU."""
    scorer_threads: int = Field(1, ge=1)
    """Compute threads of a scoring actor on a machine without a GPU."""
