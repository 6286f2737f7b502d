"""For those who watch a run: how well the hardware is used, and the lines of `metrics.jsonl` in TensorBoard and MLflow. No Ray."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cluster.config import TrainingConfig
from cluster.errors import UsageError
from cluster.progress import say

Line = dict[str, Any]
"""A line of `metrics.jsonl`: `step`, `epoch`, and figures of the steps before it or, under `validation`, of the model."""

# Dense bfloat16 FLOP/s by the makers' data sheets, in what `torch.cuda.get_device_name` says; the first that matches counts.
_PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
}


def peak(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU, or None where they are not known."""
    return next((flops for name, flops in _PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def peak_of(device: torch.device) -> float | None:
    """Return `peak` of a device; None for anything but a GPU."""
    return peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Flops:
    """The floating-point operations of a forward and backward pass of an encoder, padding left out."""

    def __init__(self, model: Any) -> None:
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._matrices = sum(int(each.numel()) for each in model.parameters() if each.ndim >= 2 and id(each) not in tables)
        self._attention = int(getattr(model.config, "num_hidden_layers", 0)) * int(getattr(model.config, "hidden_size", 0))

    def __call__(self, tokens: float, attended: float) -> float:
        """`tokens` of all pairs, and the sum of the squares of their lengths: what attention looks at."""
        return 6.0 * self._matrices * tokens + 12.0 * self._attention * attended


def scalars(line: Line) -> dict[str, float]:
    """The figures of a line by the names TensorBoard and MLflow show them under, e.g. `train/loss`, `validation/mse`."""
    figures = {f"train/{name}": value for name, value in line.items() if name not in ("step", "epoch", "validation")}
    figures |= {f"validation/{name}": value for name, value in line.get("validation", {}).items()}
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


class Watchers:
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
                say(f"{setting}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; the run goes on without it")


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
