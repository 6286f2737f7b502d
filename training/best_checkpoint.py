"""The best weights of a run so far, by a figure of its validation, and when to stop for want of better ones. No Ray.

The weights are a file of their own beside the checkpoints, named by its step and never written over; the books, which the
checkpoints keep, say which file and its SHA-256. So a run that goes on from any checkpoint has the best weights of just that point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from cluster import storage
from cluster.config import TrainingConfig
from cluster.errors import CappyError
from training.validation import is_better

FOLDER = "best"


class BestWeights:
    """What validation found so far. All workers call it alike with the same figures; the first one writes."""

    def __init__(self, checkpoints: str, training: TrainingConfig, writes: bool) -> None:
        self.folder = storage.join(checkpoints, FOLDER)
        self.training, self.writes = training, writes
        self.books: dict[str, Any] = {"metric": None, "value": None, "step": None, "sha256": None, "stale": 0}
        """`stale` is the number of validations since the best; all null before the first, and where the last weights are wanted."""

    def enter(self, metrics: Mapping[str, float | None], step: int, weights: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Take note of a validation after `step`; keep the weights, asked for only then, where it is the best. Return whether it was.

        Raises `CappyError` where the validation rows do not give the figure wanted.
        """
        metric = self.training.best_by
        if metric == "last" or not metrics:
            return False
        if metrics[metric] is None:
            known = ", ".join(name for name, value in metrics.items() if value is not None and name != "pairs")
            raise CappyError(f"training.best_by={metric}: the validation rows do not give it; choose last or one of {known}")
        if not is_better(metric, metrics[metric], self.books["value"]):
            self.books = {**self.books, "stale": self.books["stale"] + 1}
            return False
        data = save(dict(weights()))
        self.books = {"metric": metric, "value": metrics[metric], "step": step, "sha256": hashlib.sha256(data).hexdigest(), "stale": 0}
        if self.writes:
            storage.write_bytes(self._place(step), data)
            # A checkpoint follows each of these files, so the last checkpoints point to no older ones.
            for name in sorted(storage.list_files(self.folder))[: -(self.training.checkpoints_kept + 1)]:
                storage.delete(storage.join(self.folder, name))
        return True

    def out_of_patience(self) -> bool:
        """Whether the last `training.patience` validations brought nothing better."""
        return self.training.patience is not None and self.books["stale"] >= self.training.patience

    def weights(self) -> dict[str, Tensor] | None:
        """Return the best weights, None where the last ones are wanted. Raises `CappyError` when the file is lost or damaged."""
        if self.books["step"] is None:
            return None
        place = self._place(self.books["step"])
        try:
            data = storage.read_bytes(place)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != self.books["sha256"]:
            raise CappyError(f"{place}, the best weights of the run, is lost or damaged; train again with --overwrite")
        return load(data)

    def _place(self, step: int) -> str:
        return storage.join(self.folder, f"{step:08d}.safetensors")
