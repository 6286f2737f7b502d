"""Settings of `scorer`, `training` and `adapt`: the encoder, the objective, the optimizer and adaptation to tasks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cluster.config.base import Section


class ScorerConfig(Section):
    """The scorer as a model."""

    encoder: str = "minilm-l6"
    """The pretrained encoder the scorer is built on: an embedded name, a hub name, a local folder or an s3:// folder."""
    max_length: int = Field(512, ge=16)
    """Tokens of instruction plus response; the middle of the instruction is cut before the response ever is."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of training and batch scoring; auto is bfloat16 where the hardware has it, else float32."""
    cpu_kernels: bool = True
    """Run BERT and RoBERTa scorers with faster kernels: only the first token in the last layer, and oneDNN on the CPU. False uses the
    plain modules of transformers. Scores are equal up to rounding."""

    @model_serializer(mode="wrap")
    def _without_default_kernels(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `cpu_kernels` out when it is True: runs of earlier versions keep their fingerprint."""
        tree: dict[str, Any] = write(self)
        return {name: value for name, value in tree.items() if name != "cpu_kernels" or not value}


class ObjectiveConfig(Section):
    """The loss: a weighted sum of terms, on labels or what is made of them. The default is the paper's: the squared error alone."""

    mse: float = Field(1.0, ge=0)
    """Weight of the mean squared error of the raw logit."""
    pairwise: float = Field(0.0, ge=0)
    """Weight of the logistic loss of score differences within an instruction, each weighted by the gap between the labels."""
    listwise: float = Field(0.0, ge=0)
    """Weight of the cross entropy within an instruction from the softmax of the labels to that of the scores."""
    temperature: float = Field(0.2, gt=0)
    """Scores and labels are divided by it in `pairwise` and `listwise`; a difference far above it counts as decided."""
    labels: Literal["plain", "power", "rank"] = "plain"
    """`power` trains towards label ** `power`, `rank` towards the label's rank within its instruction, from 0 to 1."""
    power: float = Field(0.5, gt=0)
    """Exponent of `labels: power`; below 1 it pulls low labels apart, above 1 high ones."""

    @property
    def grouped(self) -> bool:
        """Whether an instruction's candidates must stand in the same step."""
        return bool(self.pairwise or self.listwise or self.labels == "rank")

    @model_validator(mode="after")
    def _something(self) -> ObjectiveConfig:
        if not (self.mse or self.pairwise or self.listwise):
            raise ValueError("mse, pairwise and listwise are all 0, so nothing would be learned; give one of them a weight")
        return self


class TrainingConfig(Section):
    """How `cappy train` fits the scorer."""

    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(None, ge=1)
    """Go on with fewer workers, down to this many, where machines are lost, and with up to `workers` where they come; null waits
    for all of `workers`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp` gives each worker the whole model, `fsdp` a part of weights, gradients and optimizer state: less memory, more traffic."""
    gpus_per_worker: int | None = Field(None, ge=0, le=1)
    """Null takes one where the cluster has GPUs for all workers, else none."""
    epochs: int = Field(4, ge=1)
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step, summed over all workers."""
    batch_by: Literal["pairs", "tokens"] = "pairs"
    """What the steps of a window have alike: `pairs` gives each `batch_size` pairs; `tokens` gives as many steps about as many tokens
    each, so that a step of long pairs has fewer of them and takes no longer; every pair weighs the same either way."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Padded tokens a worker runs through the model at once; the rest of its share of a step is accumulated. Lower it where a GPU runs
    out of memory, raise it where one is idle."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the schedule."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to 0 after the warmup, counted in optimizer steps."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    objective: ObjectiveConfig = ObjectiveConfig()
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on attention probabilities; 0 lets attention take its fast kernels."""
    window: int = Field(4096, ge=1)
    """Pairs shuffled and sorted by length together before they are cut into steps."""
    validate_every: int | None = Field(None, ge=1)
    """Optimizer steps between validations; null is once an epoch. The end of the run has one too."""
    best_by: Literal["last", "selection", "mse", "spearman", "pairwise_accuracy", "accuracy"] = "last"
    """The figure by which one of the validated states is published, e.g. `selection`, the mean label of the best-scored sampled
    candidate. `last` publishes the last state: the validation rows have chosen nothing, so `cappy evaluate` may report on them."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations in a row without a better one; null trains to the end."""
    blend_rows: int = Field(500, ge=0)
    """Train instructions on which the weight of the LLM's log-probability in the choice is fitted; 0 fits none."""
    checkpoint_every: int = Field(200, ge=1)
    """Optimizer steps between checkpoints."""
    checkpoints_kept: int = Field(2, ge=1)
    max_failures: int = Field(3, ge=0)
    """Worker failures survived by going on from the last checkpoint."""
    tensorboard: str | None = None
    """Local folder below which TensorBoard's event files are written, a subfolder a run; needs the extra `watch`."""
    mlflow: str | None = None
    """MLflow tracking URI where the run is logged in experiment `cappy`; needs the extra `watch`."""

    @model_validator(mode="after")
    def _split_evenly(self) -> TrainingConfig:
        if self.batch_size < self.workers:
            raise ValueError(f"batch_size={self.batch_size} leaves some of workers={self.workers} without a pair; use a multiple")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is above workers={self.workers}; lower it")
        if self.batch_by == "tokens" and self.objective.grouped:
            raise ValueError("batch_by=tokens would part the candidates that the objective compares; use batch_by=pairs")
        if self.best_by == "last" and self.patience is not None:
            raise ValueError(f"patience={self.patience} needs a figure to get better, and best_by=last names none; set best_by")
        if self.window < self.batch_size:
            raise ValueError(f"window={self.window} is below batch_size={self.batch_size}; use several times the batch size")
        return self


class LoraConfig(Section):
    """Low-rank adapters: small matrices beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the linear layers that get adapters, e.g. `[query, value]`; null is every linear layer of the encoder's blocks."""


class AdaptConfig(Section):
    """How `cappy adapt` fits a scorer to each task. What is not here is as `training` says."""

    base: str | None = None
    """The published scorer to start from: a folder, a hub name or an s3:// folder; null starts from `scorer.encoder`."""
    by: Literal["dataset", "all"] = "dataset"
    """What a task is: each dataset of the source, or all of them together."""
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    """The datasets to adapt to; all of the set's when null."""
    method: Literal["full", "lora"] = "full"
    """`full` trains and publishes all weights, `lora` adapters to a base that all tasks share."""
    lora: LoraConfig = LoraConfig()
    pairs: int = Field(2048, ge=1)
    """Training pairs of an epoch: a task's distinct pairs, repeated or cut to so many. The paper's is 102,400."""
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step. The paper's is 128."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak of the schedule; null is the paper's 2e-5, for `lora` 5e-4."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the optimizer steps over which the learning rate rises; the paper's."""
    gate: bool = True
    """Publish an adapted scorer only where it beats the base on the task's validation rows; else always."""
    metric: Literal["selection", "pairwise_accuracy"] = "selection"
    """What the gate compares: the mean label of the scorer's pick (Rouge-L; accuracy where a row has answer choices), or the
    share of a row's candidates put in the right order."""
    min_gain: float = Field(0.0, ge=0)
    """Points (hundredths) by which the adapted scorer must be better; at 0 any gain will do."""
    gate_fraction: float = Field(0.5, gt=0, le=1)
    """Share of a task's validation rows, by hash, that the gate decides on; the figures are of the others, so that the choice
    does not flatter them. At 1 it decides on all, and the figures are of the same rows."""
    validation_rows: int = Field(1000, ge=1)
    """Validation rows of a task that are scored at most, by hash."""
    concurrency: int | None = Field(None, ge=1)
    """Tasks trained at once; null is as many as fit the machine, or the cluster as it grows."""
    cpus_per_task: int = Field(1, ge=1)
    """CPUs, and torch threads, of a task."""
    gpus_per_task: float | None = Field(None, ge=0, le=1)
    """GPU of a task; tasks share one below 1. Null is one where the cluster has any, else none."""
    max_retries: int = Field(2, ge=0)
    """Times a task is begun again after its process or node was lost."""

    @model_validator(mode="after")
    def _consistent(self) -> AdaptConfig:
        if self.method == "lora" and self.base is None:
            raise ValueError("method=lora needs a base whose weights the tasks share; give adapt.base, a published scorer")
        return self

    def training(self, training: TrainingConfig) -> TrainingConfig:
        """Return the settings of a task's training loop: those of `training` with this section's over them, on one worker."""
        changes = {
            "workers": 1,
            "min_workers": None,
            "parallel": "ddp",
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate or (2e-5 if self.method == "full" else 5e-4),
            "warmup": self.warmup,
            "window": max(training.window, self.batch_size),
        }
        return TrainingConfig.model_validate({**training.model_dump(), **changes})
