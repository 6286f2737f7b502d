"""Settings of `evaluation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config.base import Section


class EvaluationConfig(Section):
    """Settings of `cappy evaluate`."""

    split: Literal["train", "validation"] = "validation"
    """The split whose rows are evaluated. The scorer is trained on `train`, so its figures there are optimistic."""
    resamples: int = Field(2000, ge=100)
    """Number of bootstrap resamples for each interval."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    examples: int = Field(24, ge=0)
    """Number of instructions that the report shows with all their candidates."""
    adapted: bool = False
    """Score a task's rows with the scorer `cappy adapt` published for it, and with `scorer_path` where it published none."""
