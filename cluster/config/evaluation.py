"""Settings of `evaluation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config.base import Section


class EvaluationConfig(Section):
    """What `cappy evaluate` measures and shows."""

    split: Literal["train", "validation"] = "validation"
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind each interval."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    examples: int = Field(24, ge=0)
    """Instructions shown with all their candidates in the report."""
    adapted: bool = False
    """Score a task's rows with the scorer `cappy adapt` published for it, and with `scorer_path` where it published none."""
