"""For those who watch a run: the lines of `metrics.jsonl` in TensorBoard and MLflow. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster.config import TrainingConfig
from cluster.errors import UsageError
from cluster.progress import log

Line = dict[str, Any]
"""A line of `metrics.jsonl`: `step`, `epoch`, and figures of the steps before it or, under `validation`, of the model."""


def scalars(line: Line) -> dict[str, float]:
    """The figures of a line by the names TensorBoard and MLflow show them under, e.g. `train/loss`, `validation/mse`."""
    figures = {f"train/{name}": value for name, value in line.items() if name not in ("step", "epoch", "validation")}
    figures |= {f"validation/{name}": value for name, value in line.get("validation", {}).items()}
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


class Trackers:
    """TensorBoard and MLflow, as far as the config names them; `run` is the same whenever the same run goes on.

    One that fails while training goes on is left out from then on, with a line to the operator. Raises `UsageError` where a
    package is missing or MLflow does not answer at the start.
    """

    def __init__(self, config: TrainingConfig, run: str) -> None:
        self._write: dict[str, Callable[[Line], None]] = {}
        if config.tensorboard:
            self._write["training.tensorboard"] = _tensorboard(config.tensorboard, run)
        if config.mlflow:
            self._write["training.mlflow"] = _mlflow(config.mlflow, run)

    def write(self, line: Line) -> None:
        for setting, write in list(self._write.items()):
            try:
                write(line)
            except Exception as error:
                del self._write[setting]
                log(f"{setting}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; the run goes on without it")


def _tensorboard(folder: str, run: str) -> Callable[[Line], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", folder) from None
    writer = SummaryWriter(f"{folder.rstrip('/')}/{run}")

    def write(line: Line) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _mlflow(uri: str, run: str) -> Callable[[Line], None]:
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
    except ImportError:
        raise _missing("mlflow", uri) from None
    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("cappy")
        place = experiment.experiment_id if experiment else client.create_experiment("cappy")
        found = client.search_runs([place], f"tags.cappy = '{run}'")
        run_id = (found[0] if found else client.create_run(place, tags={"cappy": run}, run_name=run)).info.run_id
    except Exception as error:
        raise UsageError(f"training.mlflow={uri}: {str(error).splitlines()[0]}; start the server there, or leave it null") from None

    def write(line: Line) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, [Metric(name, value, now, line["step"]) for name, value in scalars(line).items()])

    return write


def _missing(package: str, value: str) -> UsageError:
    return UsageError(f"training.{package}={value}: the package is not installed; pip install 'cappy-ray[watch]', or leave it null")
