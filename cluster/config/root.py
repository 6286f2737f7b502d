"""The root of the config tree."""

from __future__ import annotations

import yaml
from pydantic import Field, model_validator

from cluster.config.base import Section
from cluster.config.evaluation import EvaluationConfig
from cluster.config.generation import GenerateConfig, PlanConfig
from cluster.config.sampler import SamplerConfig
from cluster.config.serving import ServingConfig
from cluster.config.sources import BigBenchSource, DecontaminationConfig, Source
from cluster.config.training import AdaptConfig, ScorerConfig, TrainingConfig


class Config(Section):
    """The whole tree. One file describes a run; its verbs find each other's output through `workspace`."""

    workspace: str = Field("runs/default", min_length=1)
    """Folder or s3:// prefix under which every verb writes, each to its own folder."""
    dataset: str | None = None
    """The regression set `generate` writes and the others read; null is `{workspace}/dataset`."""
    scorer_path: str | None = None
    """The scorer `train` writes and the others read; null is `{workspace}/scorer`."""
    adapted_path: str | None = None
    """Where `adapt` writes a scorer for each task; null is `{workspace}/adapted`."""
    evaluation_path: str | None = None
    """Where `evaluate` writes; null is `{workspace}/evaluation`."""
    seed: int = Field(20261121, ge=0, lt=2**31)
    """Behind every draw, together with the row or step it is for."""
    source: Source = BigBenchSource()
    decontaminate: DecontaminationConfig = DecontaminationConfig()
    sampler: SamplerConfig = SamplerConfig()
    generate: GenerateConfig = GenerateConfig()
    plan: PlanConfig = PlanConfig()
    scorer: ScorerConfig = ScorerConfig()
    training: TrainingConfig = TrainingConfig()
    adapt: AdaptConfig = AdaptConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _one_endpoint(self) -> Config:
        if self.sampler.engine.kind == "endpoint" and self.serving.llm_replicas.max > 1:
            raise ValueError(
                f"serving.llm_replicas={self.serving.llm_replicas.max} would each keep rates of their own to the endpoint; "
                f"use one and raise sampler.engine.concurrency"
            )
        return self

    @property
    def dataset_uri(self) -> str:
        return self.dataset or f"{self.workspace.rstrip('/')}/dataset"

    @property
    def scorer_uri(self) -> str:
        return self.scorer_path or f"{self.workspace.rstrip('/')}/scorer"

    @property
    def adapted_uri(self) -> str:
        return self.adapted_path or f"{self.workspace.rstrip('/')}/adapted"

    @property
    def evaluation_uri(self) -> str:
        return self.evaluation_path or f"{self.workspace.rstrip('/')}/evaluation"

    def to_yaml(self) -> str:
        """The resolved tree as YAML that `load` reads back to an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
