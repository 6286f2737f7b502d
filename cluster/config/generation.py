"""Settings of `generate` and `plan`: labels, mismatched references, shards, and the assumptions of a cost estimate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config.base import Section


class LabelConfig(Section):
    """How a sampled response is labelled against the references."""

    metric: Literal["rouge_l", "token_f1", "chrf", "exact_match"] = "rouge_l"
    mode: Literal["paper", "unicode"] = "paper"
    """What a word is to `rouge_l` and `token_f1`: `paper` knows Latin letters and digits only, `unicode` every script."""

    @model_validator(mode="after")
    def _has_words(self) -> LabelConfig:
        if self.mode != "paper" and self.metric not in ("rouge_l", "token_f1"):
            raise ValueError(f"mode={self.mode} is for rouge_l and token_f1; metric={self.metric} compares no words, leave mode out")
        return self


class GenerateConfig(Section):
    """How `cappy generate` assembles and writes the regression set."""

    label: LabelConfig = LabelConfig()
    mismatched: int = Field(1, ge=0, le=16)
    """References of other instructions of the same dataset added with label 0.0, for each reference."""
    hard_mismatched: int = Field(0, ge=0, le=16)
    """The same, of other instructions of the same dataset and template."""
    max_per_bin: int | None = Field(None, ge=1)
    """Balances the labels: of a train instruction's samples at most this many different ones in each tenth of the label stay in the
    set, drawn by seed; null keeps all. Validation instructions keep theirs, or nothing could be compared on them."""
    unit_rows: int = Field(32, ge=1)
    """Instructions in a unit of work: what one sampling call takes, what is saved at once and never sampled again."""
    shard_mib: int = Field(128, ge=1)
    """Size the published Parquet shards are filled to, in MiB."""
    row_group_rows: int = Field(8192, ge=1)
    """Instructions in a row group of a shard: what a training reader takes at once."""
    max_error_rate: float = Field(0.5, ge=0, le=1)
    """Stop before publishing when more than this share of the rows went to the dead-letter file."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port where the driver tells Prometheus how far the run is (`/metrics`); null is none."""
    metrics_host: str = "127.0.0.1"
    """Address it listens on; 0.0.0.0 lets other machines look."""
    license: str | None = None
    """Licence of the set for its card, e.g. `apache-2.0`; null says unknown: it is the sources' and the LLM's to decide."""


class PlanConfig(Section):
    """What `cappy plan` takes for granted. It decides nothing about the set."""

    gpus: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 8, 64, 512), min_length=1)
    """Numbers of GPUs to give the wall time for."""
    gpu_dollars_per_hour: float = Field(4.0, ge=0)
    """Price of one GPU hour."""
    rates_from: str | None = None
    """A published set, or a JSON file with `tokens_per_second` (a benchmark's result), whose measured rate is taken; local or s3://."""
    sampled_tokens_per_second: float | None = Field(None, gt=0)
    """Tokens one replica samples in a second; null takes `rates_from`, else a calculation from the LLM's size."""
    prompt_tokens_per_second: float | None = Field(None, gt=0)
    """Prompt tokens one replica reads in a second; null says that the rate above has the reading in it."""
    bytes_per_pair: float | None = Field(None, gt=0)
    """Size of a published pair, in bytes; null takes `rates_from`, else a measured default."""
    sample_rows: int = Field(2000, ge=1)
    """Rows of each dataset whose tokens are counted; the others' bytes are, and their tokens follow from the ratio."""

    @model_validator(mode="after")
    def _together(self) -> PlanConfig:
        if self.prompt_tokens_per_second and not self.sampled_tokens_per_second:
            raise ValueError(
                f"prompt_tokens_per_second={self.prompt_tokens_per_second:g} stands alone; give sampled_tokens_per_second with it"
            )
        return self
