"""The root of the config tree. Imports the sections and no other part of Cappy."""

from __future__ import annotations

from typing import ClassVar

import yaml
from pydantic import Field, model_validator

from cluster.config.answer import AnswerConfig
from cluster.config.base import DEFAULT_SCORER, ExtendedSection
from cluster.config.evaluation import EvaluationConfig
from cluster.config.generation import GenerateConfig, PlanConfig
from cluster.config.sampler import SamplerConfig
from cluster.config.score import ScoreConfig
from cluster.config.serving import ServingConfig
from cluster.config.sources import BigBenchSource, DecontaminationConfig, Source
from cluster.config.suite import SuiteConfig
from cluster.config.training import AdaptConfig, ScorerConfig, TrainingConfig
from cluster.redaction import redact_tree


class Config(ExtendedSection):
    """All settings of a run. Each verb finds the output of the other verbs below `workspace`."""

    added: ClassVar = ("suite", "answer", "answers_path", "score")

    workspace: str = Field("runs/default", min_length=1)
    """Folder or s3:// prefix of the outputs. Each verb writes to its own folder below it."""
    dataset: str | None = None
    """The regression set, written by `generate` and read by the other verbs; null is `{workspace}/dataset`."""
    scorer_path: str | None = None
    """The scorer, written by `train` and read by the other verbs; null is `{workspace}/scorer`."""
    adapted_path: str | None = None
    """Folder of the scorers that `adapt` publishes, one for each task; null is `{workspace}/adapted`."""
    evaluation_path: str | None = None
    """Folder that `evaluate` writes; null is `{workspace}/evaluation`."""
    answers_path: str | None = None
    """Folder that `answer` writes; null is `{workspace}/answers`."""
    seed: int = Field(20261121, ge=0, lt=2**31)
    """Seed of all random choices. Each choice is a function of the seed and of its row or step."""
    source: Source = BigBenchSource()
    """Origin of the instructions."""
    decontaminate: DecontaminationConfig = DecontaminationConfig()
    """Evaluation rows whose text must not occur in train rows."""
    sampler: SamplerConfig = SamplerConfig()
    """The LLM, its engine, its prompt and its decodings."""
    generate: GenerateConfig = GenerateConfig()
    """Labels, unit size and shards of the regression set."""
    plan: PlanConfig = PlanConfig()
    """Assumptions of the cost estimate."""
    scorer: ScorerConfig = ScorerConfig()
    """The scorer model."""
    training: TrainingConfig = TrainingConfig()
    """Training of the scorer."""
    adapt: AdaptConfig = AdaptConfig()
    """Fine-tuning of the scorer for single tasks."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Comparison of the scorer with the baselines."""
    serving: ServingConfig = ServingConfig()
    """The server."""
    answer: AnswerConfig = AnswerConfig()
    """Batch answers."""
    score: ScoreConfig = ScoreConfig()
    """Scores of given pairs."""
    suite: SuiteConfig | None = None
    """An evaluation over many tasks, for `cappy evaluate`; null evaluates the rows of one set."""

    @model_validator(mode="after")
    def _one_endpoint(self) -> Config:
        if self.sampler.engine.kind == "endpoint" and self.serving.llm_replicas.max > 1:
            raise ValueError(
                f"serving.llm_replicas={self.serving.llm_replicas.max} would each have separate rate limits for the endpoint; "
                f"use 1 and raise sampler.engine.concurrency"
            )
        return self

    @model_validator(mode="after")
    def _base_of_adapters(self) -> Config:
        if self.adapt.method == "lora" and self.adapt_base is None:
            raise ValueError(
                "adapt.method=lora with base=null: adapters need a base that all tasks share; set adapt.base to a published scorer"
            )
        return self

    @property
    def adapt_base(self) -> str | None:
        """Return `adapt.base`, or the scorer of the package if neither it nor `scorer.encoder` is given.

        A dumped config gives every setting. So `paths.absolute` writes this value into `adapt.base`.
        """
        given = "base" in self.adapt.model_fields_set or "encoder" in self.scorer.model_fields_set
        return self.adapt.base if given else self.adapt.base or DEFAULT_SCORER

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

    @property
    def answers_uri(self) -> str:
        return self.answers_path or f"{self.workspace.rstrip('/')}/answers"

    def to_yaml(self) -> str:
        """Return the resolved tree as YAML; `load` reads it back to an equal tree. Credentials in URLs are replaced."""
        return yaml.safe_dump(redact_tree(self.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
