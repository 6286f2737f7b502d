"""All settings of a run as one typed, frozen tree, which is checked before the run starts.

A config is made of the defaults, then a YAML file, then `--set section.key=value`; a later source overrides an earlier one.
A rule for several fields is a validator of their section. Imports no Ray and no model library, so that the command line starts fast.
"""

from cluster.config.answer import AnswerConfig
from cluster.config.base import DEFAULT_SCORER, Section
from cluster.config.evaluation import EvaluationConfig
from cluster.config.generation import GenerateConfig, LabelConfig, PlanConfig
from cluster.config.loading import CONFIG_FOLDER, differences, fingerprint, load
from cluster.config.root import Config
from cluster.config.sampler import (
    GREEDY,
    PAPER_DECODINGS,
    DecodingConfig,
    EndpointConfig,
    EngineConfig,
    PromptConfig,
    SamplerConfig,
    Seq2SeqConfig,
    VLLMConfig,
)
from cluster.config.serving import (
    AdaptiveConfig,
    ApiKeyConfig,
    Fallback,
    NamedScorer,
    Replicas,
    Scaling,
    SelectionMode,
    ServingConfig,
    check_names,
)
from cluster.config.sources import (
    DEMO_TASKS,
    BigBenchSource,
    DecontaminationConfig,
    FilesSource,
    HubSource,
    MixturePart,
    MixtureSource,
    PlainSource,
    RowsSource,
    Source,
)
from cluster.config.suite import Question, SuiteConfig
from cluster.config.training import AdaptConfig, LoraConfig, ObjectiveConfig, ScorerConfig, TrainingConfig

__all__ = [
    "CONFIG_FOLDER",
    "DEFAULT_SCORER",
    "DEMO_TASKS",
    "GREEDY",
    "PAPER_DECODINGS",
    "AdaptConfig",
    "AdaptiveConfig",
    "AnswerConfig",
    "ApiKeyConfig",
    "BigBenchSource",
    "Config",
    "DecodingConfig",
    "DecontaminationConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvaluationConfig",
    "Fallback",
    "FilesSource",
    "GenerateConfig",
    "HubSource",
    "LabelConfig",
    "LoraConfig",
    "MixturePart",
    "MixtureSource",
    "NamedScorer",
    "ObjectiveConfig",
    "PlainSource",
    "PlanConfig",
    "PromptConfig",
    "Question",
    "Replicas",
    "RowsSource",
    "SamplerConfig",
    "Scaling",
    "ScorerConfig",
    "Section",
    "SelectionMode",
    "Seq2SeqConfig",
    "ServingConfig",
    "Source",
    "SuiteConfig",
    "TrainingConfig",
    "VLLMConfig",
    "check_names",
    "differences",
    "fingerprint",
    "load",
]
