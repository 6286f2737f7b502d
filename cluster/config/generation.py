"""Settings of `generate` and `plan`: labels, mismatched references, shards, and the assumptions of a cost estimate."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from cluster.config.base import ExtendedSection, Section

_METRICS = ("rouge_l", "token_f1", "chrf", "exact_match")
_FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


def _check_metric(name: str) -> str:
    if name not in _METRICS and not re.match(_FUNCTION, name):
        raise ValueError(f"Input should be {', '.join(map(repr, _METRICS))} or a function package.module:function")
    return name


LabelMetric = Annotated[
    str, AfterValidator(_check_metric), WithJsonSchema({"type": "string", "anyOf": [{"enum": list(_METRICS)}, {"pattern": _FUNCTION}]})
]
"""The name of a label metric or of a function."""


GPUName = Literal["B200", "H100 PCIe", "H100 NVL", "H100", "H200", "GH200", "A100", "L40S", "L4", "A10G", "RTX A6000", "RTX 4090"]
"""The GPUs in the table of `cluster.hardware`."""


class LabelConfig(Section):
    """The label of a sampled response: a metric against the references."""

    metric: LabelMetric = "rouge_l"
    """The metric, in [0, 1]: `rouge_l`, `token_f1`, `chrf` or `exact_match`; the best value over the references is the label. Or a function
    of yours, `package.module:function`, for example a verifier or unit tests: see "Label with a function of yours" in the guide."""
    mode: Literal["paper", "unicode"] = "paper"
    """Words of `rouge_l` and `token_f1`: `paper` has Latin letters and digits only, `unicode` has words of every script."""

    @model_validator(mode="after")
    def _has_words(self) -> LabelConfig:
        if self.mode != "paper" and self.metric not in ("rouge_l", "token_f1"):
            raise ValueError(f"mode={self.mode} is for rouge_l and token_f1; metric={self.metric} compares no words; leave mode out")
        return self


class GenerateConfig(ExtendedSection):
    """How `cappy generate` assembles and writes the regression set."""

    added: ClassVar = ("reuse", "reuse_only", "extend")

    label: LabelConfig = LabelConfig()
    """The metric that labels sampled responses."""
    mismatched: int = Field(1, ge=0, le=16)
    """For each reference, this many references of other instructions of the same dataset are added with label 0."""
    hard_mismatched: int = Field(0, ge=0, le=16)
    """As `mismatched`, but from other instructions of the same dataset and template."""
    max_per_bin: int | None = Field(None, ge=1)
    """Balances the labels of train instructions. At most this many different samples of an instruction are kept in each tenth of
    the label range, drawn by seed. null keeps all. Validation instructions keep all samples, because methods are compared on them."""
    reuse: tuple[str, ...] = ()
    """Published sets, or candidate files of `python -m generation.candidate_file`, local or s3://. If one has all candidates of a row and
    a decoding, they are not sampled. The row id, `sampler.model` and the name of the decoding must be the same. Their labels are computed
    again. The first set with them decides."""
    reuse_only: bool = False
    """Leave out the rows that would be sampled because `reuse` does not have all their candidates; no LLM is loaded."""
    extend: str | None = Field(None, min_length=1)
    """A published set, local or s3://, that this set extends: `cappy extend` sets it. Its rows, their splits and their sampled candidates
    of all LLMs and decodings are kept, beside the rows of `source`. Only the candidates that a row does not have are sampled."""
    unit_rows: int = Field(32, ge=1)
    """Instructions in a unit of work. A unit is sampled by one call, saved in one write, and never sampled again."""
    shard_mib: int = Field(128, ge=1)
    """Target size of a published Parquet shard, in MiB."""
    row_group_rows: int = Field(8192, ge=1)
    """Instructions in a row group of a shard. A training reader loads one row group at a time."""
    max_error_rate: float = Field(0.5, ge=0, le=1)
    """Largest share of the rows in the dead-letter file. Above it the run stops before it publishes."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port of the driver's Prometheus endpoint (`/metrics`), which reports the progress; null turns it off."""
    metrics_host: str = "127.0.0.1"
    """Address of that endpoint; 0.0.0.0 makes it reachable from other machines."""
    license: str | None = None
    """Licence of the set for its card, e.g. `apache-2.0`. null writes unknown; the licences of the sources and the LLM decide it."""


class PlanConfig(ExtendedSection):
    """Assumptions of `cappy plan`. They do not change the set."""

    added: ClassVar[tuple[str, ...]] = ("gpu",)

    gpus: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 8, 64, 512), min_length=1)
    """Numbers of GPUs for which the wall time is estimated."""
    gpu: GPUName | None = None
    """The GPU of the estimate; null is the GPU of this machine, or an H200 on a machine without a known GPU. Such a machine gets an
    estimate for its CPU too."""
    gpu_dollars_per_hour: float = Field(4.0, ge=0)
    """Price of one GPU-hour, in dollars."""
    rates_from: str | None = None
    """Source of a measured rate: a published set, or the JSON result of a benchmark with `tokens_per_second`; local or s3://."""
    sampled_tokens_per_second: float | None = Field(None, gt=0)
    """Sampled tokens per second of one replica; null takes `rates_from`, else an estimate from the size of the LLM and the memory
    bandwidth of the device."""
    prompt_tokens_per_second: float | None = Field(None, gt=0)
    """Prompt tokens per second of one replica; null means that the rate above includes the prompts."""
    bytes_per_pair: float | None = Field(None, gt=0)
    """Size of a published pair, in bytes; null takes `rates_from`, else a default from a measurement."""
    sample_rows: int = Field(2000, ge=1)
    """Rows of each dataset whose tokens are counted. The tokens of the other rows are estimated from their bytes."""

    @model_validator(mode="after")
    def _together(self) -> PlanConfig:
        if self.prompt_tokens_per_second and not self.sampled_tokens_per_second:
            raise ValueError(
                f"prompt_tokens_per_second={self.prompt_tokens_per_second:g} is given alone; give sampled_tokens_per_second with it"
            )
        return self
