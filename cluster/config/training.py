"""Settings of `scorer`, `training` and `adapt`: encoder, objective, optimizer and adaptation to tasks. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cluster.config.base import ExtendedSection, Section


class ScorerConfig(ExtendedSection):
    """The scorer model."""

    added: ClassVar = ("cpu_kernels", "format")

    encoder: str = "minilm-l6"
    """The pretrained model of the scorer, an encoder or a decoder: an embedded name, a hub name, a local folder or an s3:// folder."""
    format: Literal["auto", "pair", "chat"] = "auto"
    """Form of the input. `pair`: the tokenizer joins instruction and response. `chat`: the tokenizer's chat template, with the instruction
    as the turn of the user and the response as that of the assistant, as public reward models read it. `auto` is the form that a scorer
    was trained with, else `chat` for decoders with a chat template, else `pair`."""
    max_length: int = Field(512, ge=16)
    """Largest length of instruction plus response, in tokens. The middle of the instruction is cut first, the response last."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type of training and batch scoring; `auto` is bfloat16 on hardware that supports it, else float32."""
    cpu_kernels: bool = True
    """Run BERT and RoBERTa scorers with faster kernels: only the first token in the last layer, and oneDNN on the CPU. False uses the
    plain modules of transformers. Scores are equal up to rounding."""


class ObjectiveConfig(Section):
    """The loss: a weighted sum of terms, on the labels or on transformed labels. The default is the loss of the paper: squared error."""

    mse: float = Field(1.0, ge=0)
    """Weight of the mean squared error of the raw logit."""
    pairwise: float = Field(0.0, ge=0)
    """Weight of the logistic loss of score differences within an instruction. Each difference is weighted by the label difference."""
    listwise: float = Field(0.0, ge=0)
    """Weight of the cross entropy between the softmax of the labels and the softmax of the scores within an instruction."""
    temperature: float = Field(0.2, gt=0)
    """Divisor of scores and labels in `pairwise` and `listwise`. Differences far above it have almost no gradient."""
    labels: Literal["plain", "power", "rank"] = "plain"
    """Target of the training: the label (`plain`), label ** `power`, or the rank of the label within its instruction in [0, 1]."""
    power: float = Field(0.5, gt=0)
    """Exponent of `labels: power`. Below 1 it spreads low labels, above 1 high labels."""

    @property
    def grouped(self) -> bool:
        """Return whether all candidates of an instruction must be in the same step."""
        return bool(self.pairwise or self.listwise or self.labels == "rank")

    @model_validator(mode="after")
    def _something(self) -> ObjectiveConfig:
        if not (self.mse or self.pairwise or self.listwise):
            raise ValueError("mse, pairwise and listwise are all 0, so there is no loss; give one of them a weight")
        return self


class TrainingConfig(ExtendedSection):
    """Settings of `cappy train`."""

    added: ClassVar = ("selection_share", "dropout", "frozen_layers")

    workers: int = Field(1, ge=1)
    """Number of data-parallel training processes."""
    min_workers: int | None = Field(None, ge=1)
    """Elastic training: continue with down to this many workers after machines are lost, and with up to `workers` when machines join.
    null always waits for all of `workers`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp` keeps the whole model on each worker. `fsdp` splits weights, gradients and optimizer state: less memory, more traffic."""
    gpus_per_worker: int | None = Field(None, ge=0, le=1)
    """GPUs of a worker. null is 1 if the cluster has a GPU for each worker, else 0."""
    epochs: int = Field(4, ge=1)
    """Number of epochs over the training pairs."""
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step, summed over all workers."""
    batch_by: Literal["pairs", "tokens"] = "pairs"
    """`pairs` puts `batch_size` pairs into each step. `tokens` makes the same number of steps with about equal numbers of tokens, so
    that a step with long pairs has fewer pairs and takes no longer. Each pair has the same weight in both cases."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Largest number of padded tokens in a forward pass of a worker; gradients are accumulated over its part of a step. Lower it if a
    GPU runs out of memory, raise it if a GPU is not fully used."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of the schedule."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Decay of the learning rate to 0 after the warmup, counted in optimizer steps."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the optimizer steps in which the learning rate rises linearly."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest global norm of the gradient; a larger gradient is scaled down to it."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on attention probabilities. With 0, attention can use its fast kernels."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout on embeddings and hidden states. null keeps the value of the encoder, which is 0.1 for most. On a CPU, 0 saves
    the time to draw random numbers."""
    frozen_layers: int = Field(0, ge=0)
    """Number of lower layers of the encoder whose weights are not trained; above 0 the embeddings are not trained either. Frozen layers
    need no backward pass, and no memory for gradients and moments. 0 trains all weights. `adapt.method: lora` ignores it."""
    window: int = Field(4096, ge=1)
    """Number of pairs that are shuffled, sorted by length and cut into steps together."""
    validate_every: int | None = Field(None, ge=1)
    """Optimizer steps between validations; null validates once per epoch. The end of the run is always validated."""
    best_by: Literal["last", "selection", "mse", "spearman", "pairwise_accuracy", "accuracy"] = "last"
    """Metric that selects which validated state is published, e.g. `selection`, the mean label of the sampled candidate with the best
    score. `last` publishes the last state: then no choice depends on the validation rows, and `cappy evaluate` can report on them."""
    patience: int | None = Field(None, ge=1)
    """Early stopping: stop after this many validations in a row without improvement; null trains to the end."""
    blend_rows: int = Field(500, ge=0)
    """Number of train instructions on which the weight of the log-probability in `serving.selection: blend` is fitted; 0 fits none."""
    selection_share: float = Field(0.0, ge=0, le=0.5)
    """Share of the train instructions, by hash, that are held out of the training. A selection of several signals is fitted on their
    sampled candidates and published as `selection.json`. 0 trains on all rows and fits none."""
    checkpoint_every: int = Field(200, ge=1)
    """Optimizer steps between checkpoints."""
    checkpoints_kept: int = Field(2, ge=1)
    """Number of the latest checkpoints that are kept."""
    max_failures: int = Field(3, ge=0)
    """Largest number of worker failures; after each, training resumes from the last checkpoint."""
    tensorboard: str | None = None
    """Local folder of TensorBoard event files, with one subfolder for each run; needs the extra `watch`."""
    mlflow: str | None = None
    """MLflow tracking URI. The run is logged in experiment `cappy`; needs the extra `watch`."""

    @model_validator(mode="after")
    def _split_evenly(self) -> TrainingConfig:
        if self.batch_size < self.workers:
            raise ValueError(f"batch_size={self.batch_size} is below workers={self.workers}; use a multiple of it")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is above workers={self.workers}; lower it")
        if self.batch_by == "tokens" and self.objective.grouped:
            raise ValueError("batch_by=tokens would separate the candidates that the objective compares; use batch_by=pairs")
        if self.best_by == "last" and self.patience is not None:
            raise ValueError(f"patience={self.patience} needs a metric, and best_by=last has none; set best_by")
        if self.window < self.batch_size:
            raise ValueError(f"window={self.window} is below batch_size={self.batch_size}; use several times the batch size")
        return self


class LoraConfig(Section):
    """Low-rank adapters: small matrices beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(8, ge=1)
    """Rank of the adapter matrices."""
    alpha: float = Field(16.0, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapters."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the linear layers with adapters, e.g. `[query, value]`; null is every linear layer of the blocks of the encoder."""


class AdaptConfig(ExtendedSection):
    """Settings of `cappy adapt`. All other settings of the training come from `training`."""

    added: ClassVar = ("folds",)

    base: str | None = None
    """The published scorer to start from: a folder, a hub name or an s3:// folder. null starts from `scorer.encoder`. If neither this
    setting nor `scorer.encoder` is given, it is `cappy-minilm`, the scorer of the package."""
    by: Literal["dataset", "all"] = "dataset"
    """Definition of a task: each dataset of the source, or all datasets together."""
    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    """The datasets to adapt to; null is all datasets of the set."""
    method: Literal["full", "lora"] = "full"
    """`full` trains and publishes all weights. `lora` trains and publishes adapters to one base for all tasks."""
    lora: LoraConfig = LoraConfig()
    """The adapters, with method `lora`."""
    pairs: int = Field(2048, ge=1)
    """Training pairs per epoch: the distinct pairs of a task, repeated or cut to this number. The paper has 102,400."""
    epochs: int = Field(1, ge=1)
    """Number of epochs over the `pairs` of a task."""
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step. The paper has 128."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the schedule; null is 2e-5 as in the paper, and 5e-4 for `lora`."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the optimizer steps in which the learning rate rises; 0.1 as in the paper."""
    folds: int = Field(2, ge=0, le=20)
    """Folds of the cross-validation on the train rows of a task; the gate decides on it. Each fold is scored by a training on the
    others, which takes (folds - 1) times the time of the published training, and the rows are scored. 0 turns it off."""
    gate: bool = True
    """Publish an adapted scorer only if it is better than the base; false always publishes it. The comparison is the cross-validation
    on the train rows of the task. With `folds: 0` it is on a share of its validation rows (`gate_fraction`)."""
    metric: Literal["selection", "pairwise_accuracy"] = "selection"
    """Metric of the gate. `selection` is the mean label of the candidate with the best score: Rouge-L, or accuracy for rows with
    answer choices. `pairwise_accuracy` is the share of correctly ordered pairs of candidates of a row."""
    min_gain: float = Field(0.0, ge=0)
    """Smallest gain for publication, in points (hundredths); with 0 every gain is enough."""
    gate_fraction: float = Field(0.5, gt=0, le=1)
    """Only with `folds: 0`: share of the validation rows of a task that the gate uses, by hash. The reported figures are of the other
    rows, so that the decision does not bias them. With 1 the gate uses all rows, and the figures are of the same rows."""
    validation_rows: int = Field(1000, ge=1)
    """Largest number of scored validation rows of a task, selected by hash; also of the train rows that cross-validation scores."""
    concurrency: int | None = Field(None, ge=1)
    """Largest number of tasks trained concurrently; null is as many as the machine or the growing cluster has resources for."""
    cpus_per_task: int = Field(1, ge=1)
    """CPUs and torch threads of a task."""
    gpus_per_task: float | None = Field(None, ge=0, le=1)
    """GPUs of a task; below 1, tasks share a GPU. null is 1 if the cluster has a GPU, else 0."""
    max_retries: int = Field(2, ge=0)
    """Largest number of restarts of a task after its process or node was lost."""

    @model_validator(mode="after")
    def _consistent(self) -> AdaptConfig:
        if self.folds == 1:
            raise ValueError("folds=1: one fold leaves no rows to train on; use 2 or more, or 0 for no cross-validation")
        return self

    def training(self, training: TrainingConfig) -> TrainingConfig:
        """Return the settings of the training loop of a task: `training`, changed by this section, on one worker."""
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
