"""Typed records of training and adaptation: checkpoints, `metrics.jsonl`, manifests, `results.json` and messages of workers. Types only.

Except for `Job` and `Event`, the keys are part of a stored format: files of an earlier version have the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from cluster.lease import Claim
    from training.batch_plan import Size

Metrics = dict[str, float | None]
"""Metrics by name, as `validation.ValidationSums.metrics` returns them; None if no row allows the metric."""


class CalibrationGroup(TypedDict):
    """Pairs with a score in the same interval."""

    count: int
    score: float
    """Mean score of the group."""
    label: float
    """Mean label of the group, in [0, 1]."""


class BestRecord(TypedDict):
    """The best validation so far. All values are None before the first validation and with `training.best_by: last`."""

    metric: str | None
    value: float | None
    step: int | None
    sha256: str | None
    """Of the file with the weights."""
    stale: int
    """Validations since the best one."""


class PublishedBest(TypedDict):
    """The part of `BestRecord` that the manifest of a scorer has."""

    metric: str | None
    value: float | None
    step: int | None


class BlendRecord(TypedDict):
    """The fitted weight of the LLM's log-probability and the mean labels with it on the train rows of the fit."""

    logprob_weight: float
    """In units of score per nat."""
    rows: int
    selection_train: float | None
    """Mean label of the picks by score alone, in [0, 1]."""
    selection_train_blend: float | None
    """Mean label of the picks with the log-probability, in [0, 1]."""


class SelectionSummary(TypedDict):
    """The main variant of a fitted selection (`training.selection`)."""

    rows: int
    """Number of pools that it was fitted on."""
    l2: float | None
    weights: dict[str, float]
    """Weight of each standardised signal."""
    cross_validated: dict[str, float]
    """Mean label of the picks on held-out pools, in [0, 1]: `fitted`, each single signal, `random` and `oracle`."""


class Progress(TypedDict):
    """The counters and results of a run so far."""

    step: int
    """Optimizer steps taken."""
    pairs: int
    """Pairs of the train split."""
    trained: int
    """Pairs trained on, over all epochs."""
    seconds: float
    """Time spent in optimizer steps."""
    cut_pairs: int
    """Pairs cut to the length limit, counted in the first epoch."""
    epoch_errors: float
    """Sum of squared errors of the current epoch."""
    epoch_pairs: int
    """Pairs of the current epoch."""
    train_mse: float | None
    """Mean squared error over the last whole epoch, during training."""
    validation: Metrics
    """Metrics of the weights to publish."""
    calibration: list[CalibrationGroup]
    best: BestRecord
    blend: BlendRecord | None
    selection: NotRequired[dict[str, Any] | None]
    """The content of `selection.json`; None without one. Absent in checkpoints of earlier versions."""
    finished: bool
    """True once the weights to publish are in the model."""


class Position(TypedDict):
    """The place of the next step in the data and in the schedule."""

    epoch: int
    window: int
    step_in_window: int
    total: int
    """Steps of the whole run."""


class TrainerState(TypedDict):
    """The part of a checkpoint that is not tensors."""

    progress: Progress
    position: Position


class MetricsLine(TypedDict, total=False):
    """A line of `metrics.jsonl`: the means of some steps or, with `validation`, the metrics of the model after a step."""

    step: int
    """Optimizer steps taken."""
    epoch: int
    loss: float
    """Mean over the pairs of the steps."""
    gradient_norm: float | None
    """Mean over the steps of the gradient's global norm before clipping; None when it is not finite."""
    learning_rate: float
    """Of the last step."""
    pairs_per_second: float
    tokens_per_second: float
    padding_share: float
    """Share of padding in the tokens of the model's inputs, in [0, 1]."""
    mfu: float
    """Model FLOP utilisation, in [0, 1]; on GPUs with a known peak."""
    validation: Metrics


class TrainSummary(TypedDict):
    """The result of `cappy train`, as the manifest of the scorer has it."""

    uri: str
    steps: int
    pairs: int
    epochs: int
    seconds: float
    pairs_per_second: float
    train_mse: float | None
    validation: Metrics
    calibration: list[CalibrationGroup]
    best: PublishedBest
    blend: BlendRecord | None
    selection: SelectionSummary | None
    """None without a fitted selection."""
    cut_pairs: int


class Job(TypedDict):
    """The arguments of a worker."""

    config: dict[str, Any]
    """The `Config` as a plain tree."""
    size: Size
    """Pairs and instructions of the train split."""
    checkpoints: str
    """Folder of the run's checkpoints."""
    claim: Claim
    """The driver's lease."""
    channel: Any
    """Handle of the `RunChannel` actor."""
    threads: int | None
    """Torch threads of a worker; None gives each worker an equal share of the machine's cores."""


class Event(TypedDict, total=False):
    """One message from a worker to the driver. It has `log`, `line`, or `step` with the keys that follow it."""

    log: str
    """A line for the terminal."""
    line: MetricsLine
    """A line of `metrics.jsonl`."""
    step: int
    """Optimizer steps taken."""
    note: str
    """Text at the end of the progress bar."""
    pairs: int
    """Pairs trained on since the message before."""
    tokens: int
    """Tokens trained on since the message before."""


class GateDecision(TypedDict):
    """The comparison and the decision of the gate. Values are in points (0 to 100)."""

    metric: str
    before: float | None
    """Of the base."""
    after: float | None
    """Of the adapted scorer."""
    gain: float | None
    """None when the rows have no candidates with different labels."""
    passed: bool
    rows: NotRequired[int]
    """Rows that the gate decided on."""
    split: NotRequired[Literal["train", "validation"]]
    """Split of these rows: `train` with cross-validation. Absent in files of earlier versions, which have `validation`."""
    folds: NotRequired[int]
    """Folds of the cross-validation."""
    low: NotRequired[float | None]
    """Lower end of the interval of the cross-validated gain."""
    high: NotRequired[float | None]
    confidence: NotRequired[float]
    """Of the interval, in [0, 1]."""
    weights: NotRequired[Literal["base"]]
    """`base` if the comparison is of the base with a fitted selection, because the adapted weights were not better."""


class TaskPoints(TypedDict):
    """The results of a task on its validation rows, in points (0 to 100): mean label of the picks of each method."""

    before: float | None
    """Picks of the base."""
    after: float | None
    """Picks of the adapted scorer."""
    fitted: NotRequired[float | None]
    """Picks of the published selection; None without one. Absent in files of earlier versions."""
    random: float | None
    self: float | None
    """Picks by mean log-probability of the LLM."""
    oracle: float | None
    pairwise_accuracy: dict[str, float | None]
    """`before` and `after`: the share of candidate pairs in the right order."""
    rows: NotRequired[int]
    apart: NotRequired[bool]
    """True when the gate did not use these rows."""


class OutcomeState(TypedDict):
    """The part of an outcome that every task has."""

    task: str
    state: Literal["published", "rejected", "failed"]
    uri: str | None
    """The published scorer; None when there is none."""
    use: str | None
    """The scorer to use for the task: its own, else the base; None when the base is a plain encoder."""


class Outcome(OutcomeState, total=False):
    """The result of a task, as `results.json` stores it."""

    error: str
    """The reason of a failure."""
    dataset: str | None
    base: dict[str, Any]
    """`Base` as a plain tree."""
    method: str
    train_rows: int
    distinct_pairs: int
    steps: int
    pairs: int
    cut_pairs: int
    learning_rate: float
    train_mse: float
    trained_parameters: int
    pairs_per_second: float
    gate: GateDecision | None
    """None without cross-validation and without validation rows."""
    selection: SelectionSummary | None
    """None without a fitted selection."""
    figures: TaskPoints | None
    """None without validation rows."""
    label: str
    """Name of the label's metric, such as `rouge_l`."""
    seconds: float
    bytes: int
    """Size of the published weights."""
    identity: dict[str, Any]
