"""Keep the best weights of a run by a validation metric, and stop early. No Ray.

The weights are a file beside the checkpoints. Its name has the step, and it is not overwritten. The record in each checkpoint
has the step and the SHA-256 of the file. A run that resumes from any checkpoint therefore has the best weights as of that
checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from safetensors.torch import load, save
from torch import Tensor

from cluster import storage
from cluster.config import TrainingConfig
from cluster.errors import CappyError
from training.records import BestRecord
from training.validation import is_better

FOLDER = "best"


class BestWeights:
    """The best validation so far and its weights. All workers make the same calls; the one with `writes` writes the file."""

    def __init__(self, checkpoints: str, training: TrainingConfig, writes: bool) -> None:
        self.folder = storage.join(checkpoints, FOLDER)
        self.training, self.writes = training, writes
        self.record: BestRecord = {"metric": None, "value": None, "step": None, "sha256": None, "stale": 0}

    def add(self, metrics: Mapping[str, float | None], step: int, weights: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Add the metrics of a validation after `step`. Store the result of `weights` and return True when it is the best so far.

        `weights` is called only then. Raises `CappyError` when the validation rows do not give the metric of `training.best_by`.
        """
        metric = self.training.best_by
        if metric == "last" or not metrics:
            return False
        if metrics[metric] is None:
            known = ", ".join(name for name, value in metrics.items() if value is not None and name != "pairs")
            raise CappyError(f"training.best_by={metric}: the validation rows do not give it; choose last or one of {known}")
        if not is_better(metric, metrics[metric], self.record["value"]):
            self.record = {**self.record, "stale": self.record["stale"] + 1}
            return False
        data = save(dict(weights()))
        self.record = {"metric": metric, "value": metrics[metric], "step": step, "sha256": hashlib.sha256(data).hexdigest(), "stale": 0}
        if self.writes:
            storage.write_bytes(self._uri(step), data)
            # A checkpoint follows each of these files, so the checkpoints that are kept refer to none of the older files.
            for name in sorted(storage.list_files(self.folder))[: -(self.training.checkpoints_kept + 1)]:
                storage.delete(storage.join(self.folder, name))
        return True

    def patience_is_exhausted(self) -> bool:
        """Return whether the last `training.patience` validations were no better than the best one."""
        return self.training.patience is not None and self.record["stale"] >= self.training.patience

    def weights(self) -> dict[str, Tensor] | None:
        """Return the best weights, or None with `training.best_by: last`. Raises `CappyError` when the file is lost or damaged."""
        if self.record["step"] is None:
            return None
        uri = self._uri(self.record["step"])
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != self.record["sha256"]:
            raise CappyError(f"{uri}, the best weights of the run, is lost or damaged; train again with --overwrite")
        return load(data)

    def _uri(self, step: int) -> str:
        return storage.join(self.folder, f"{step:08d}.safetensors")
