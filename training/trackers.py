"""Send the lines of `metrics.jsonl` to TensorBoard and MLflow. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster.config import TrainingConfig
from cluster.errors import UsageError, first_line, typed_first_line
from cluster.progress import log
from training.records import MetricsLine


def scalars(line: MetricsLine) -> dict[str, float]:
    """Return the numbers of a line by their names in TensorBoard and MLflow, such as `train/loss` and `validation/mse`."""
    values: dict[str, Any] = {f"train/{name}": value for name, value in line.items() if name not in ("step", "epoch", "validation")}
    values |= {f"validation/{name}": value for name, value in line.get("validation", {}).items()}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


class Trackers:
    """The trackers that the config names: TensorBoard, MLflow, both or none.

    `run` is the name of the run; a resumed run has the same name. A tracker that fails during training is switched off, with a
    log line, and training continues. Raises `UsageError` when a package is missing or MLflow does not answer at the start.
    """

    def __init__(self, config: TrainingConfig, run: str) -> None:
        self._write: dict[str, Callable[[MetricsLine], None]] = {}
        if config.tensorboard:
            self._write["training.tensorboard"] = _tensorboard(config.tensorboard, run)
        if config.mlflow:
            self._write["training.mlflow"] = _mlflow(config.mlflow, run)

    def write(self, line: MetricsLine) -> None:
        """Send one line to each tracker."""
        for setting, write in list(self._write.items()):
            try:
                write(line)
            except Exception as error:
                del self._write[setting]
                log(f"{setting}: {typed_first_line(error)}; training continues without it")


def _tensorboard(folder: str, run: str) -> Callable[[MetricsLine], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", folder) from None
    writer = SummaryWriter(f"{folder.rstrip('/')}/{run}")

    def write(line: MetricsLine) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _mlflow(uri: str, run: str) -> Callable[[MetricsLine], None]:
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
    except ImportError:
        raise _missing("mlflow", uri) from None
    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("cappy")
        experiment_id = experiment.experiment_id if experiment else client.create_experiment("cappy")
        found = client.search_runs([experiment_id], f"tags.cappy = '{run}'")
        run_id = (found[0] if found else client.create_run(experiment_id, tags={"cappy": run}, run_name=run)).info.run_id
    except Exception as error:
        raise UsageError(f"training.mlflow={uri}: {first_line(error)}; start the server, or set training.mlflow=null") from None

    def write(line: MetricsLine) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, [Metric(name, value, now, line["step"]) for name, value in scalars(line).items()])

    return write


def _missing(package: str, value: str) -> UsageError:
    return UsageError(f"training.{package}={value}: the package is not installed; pip install 'cappy-ray[watch]', or set it to null")
