"""Settings of `score`: the columns of the pairs, the filters of the result, and the number of scoring actors."""

from __future__ import annotations

from pydantic import Field

from cluster.config.base import Section


class ScoreConfig(Section):
    """Scores of given pairs by `cappy score`.

    `scorer_path`, `serving.scorer_dtype`, `answer.scorer_gpus` and `answer.scorer_threads` apply, and so do the shards and the limit of
    dead letters of `generate`.
    """

    prompt: str | None = Field(None, min_length=1)
    """The column with the prompt, which is scored as it is. null finds it by the names of public datasets."""
    response: str | None = Field(None, min_length=1)
    """The column with the response, which is scored as it is. null finds it by the names of public datasets."""
    keep_above: float | None = Field(None, allow_inf_nan=False)
    """Smallest score of a published row; the other rows are dropped and counted. null keeps all."""
    top_per_instruction: int | None = Field(None, ge=1)
    """Largest number of published rows of an instruction: the rows with the highest scores. null keeps all."""
    unit_rows: int = Field(2048, ge=1)
    """Pairs in a unit of work. They are sorted by length for their batches. A finished unit is never scored again."""
    scorers: int | None = Field(None, ge=1)
    """Number of scoring actors. null takes one per GPU. Without a GPU it takes one per CPU core, and at most one
    per 2 GiB of memory."""
