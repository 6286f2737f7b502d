"""Write and read checkpoints of a training run. No Ray, no pickle.

A checkpoint is a folder `{step:08d}-{writer}/` below the run's folder. It has the weights and the optimizer's moments as
safetensors (`weights-*.safetensors`, `optimizer-*.safetensors`), `state.json` and `metrics.jsonl`. `_MANIFEST.json` with the
SHA-256 of each file is written last. No file is overwritten: a kill leaves complete checkpoints and at most one incomplete
checkpoint, which readers skip. A checkpoint holds the whole model, so a run may resume with another number of workers.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cluster import artifacts, s3, storage
from cluster.errors import CappyError
from training.records import TrainerState

# Size limit of a file of tensors, unless one tensor is larger. Writing holds a file twice in memory.
_PIECE_BYTES = 256 << 20


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps, in host memory."""

    step: int
    """Optimizer steps taken."""
    weights: dict[str, Tensor]
    """By parameter name."""
    moments: dict[str, Tensor]
    """The optimizer's tensors by `kind/parameter`, such as `exp_avg/classifier.weight`."""
    trainer_state: TrainerState
    """The rest of the state, as JSON stores it."""
    lines: list[str]
    """`metrics.jsonl` so far."""


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, trainer_state: TrainerState, lines: list[str], keep: bool = True
) -> Checkpoint | None:
    """Copy the state of a run into host memory, so that training can continue while it is written.

    With sharded weights (FSDP) this is a collective operation. A worker with `keep=False` contributes its shards and returns None.
    """
    weights = copy_weights(model, keep)
    moments = {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    copied = _copy_tensors(moments, keep)
    # The caller changes its state afterwards; a round trip through JSON copies it.
    return Checkpoint(step, weights, copied, json.loads(json.dumps(trainer_state)), list(lines)) if keep else None


def copy_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Copy the whole weights of a model into host memory. `keep` as in `capture`; a collective operation with sharded weights."""
    return _copy_tensors(_distinct_state(model), keep)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load weights and, with `optimizer`, moments. Raises `CappyError` when they belong to another model."""
    restore_weights(checkpoint.weights, model, f"the checkpoint of step {checkpoint.step}")
    if optimizer is None:
        return
    parameters = dict(model.named_parameters())
    for key, value in checkpoint.moments.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # The fused kernel reads the step counter as a plain float32 scalar on the parameter's device.
        optimizer.state[parameter][kind] = _place_like(value, parameter) if value.ndim else value.to(parameter.device)


def restore_weights(weights: dict[str, Tensor], model: nn.Module, source: str) -> None:
    """Load whole weights into a model. Raises `CappyError`, which names `source`, when they belong to another model."""
    own = _distinct_state(model)
    different = {name for name, value in own.items() if name not in weights or weights[name].shape != value.shape}
    if different or len(own) != len(weights):
        raise CappyError(f"{source} belongs to another model ({min(different, default='')} differs); train again with --overwrite")
    # Not strict: tied weights are stored once.
    model.load_state_dict({name: _place_like(value, own[name]) for name, value in weights.items()}, strict=False)


def write(uri: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into an empty folder, its manifest last. Without the manifest a checkpoint is incomplete."""
    files = {}
    for kind, tensors in (("weights", checkpoint.weights), ("optimizer", checkpoint.moments)):
        for number, piece in enumerate(_pieces(tensors)):
            name = f"{kind}-{number:03d}.safetensors"
            files[name] = storage.write_bytes(storage.join(uri, name), save(piece))
    state = {"step": checkpoint.step, "books": checkpoint.trainer_state}  # the key is part of the stored format
    files["state.json"] = storage.write_json(storage.join(uri, "state.json"), state)
    lines = "".join(f"{line}\n" for line in checkpoint.lines)
    files["metrics.jsonl"] = storage.write_bytes(storage.join(uri, "metrics.jsonl"), lines.encode())
    storage.write_json(storage.join(uri, artifacts.MANIFEST), {"kind": "checkpoint", "version": 1, "files": files})


def read(uri: str) -> Checkpoint:
    """Read a checkpoint and check each file against its SHA-256.

    Raises `s3.Damaged` when it is incomplete or was changed, `CappyError` when the store does not answer.
    """
    tensors: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
    try:
        manifest = storage.read_json(storage.join(uri, artifacts.MANIFEST))
        for name in (name for name in manifest["files"] if name.endswith(".safetensors")):
            tensors[name.split("-")[0]].update(load(_read_checked(uri, name, manifest)))
        state = json.loads(_read_checked(uri, "state.json", manifest))
        lines = _read_checked(uri, "metrics.jsonl", manifest).decode().splitlines()
        return Checkpoint(state["step"], tensors["weights"], tensors["optimizer"], state["books"], lines)
    except FileNotFoundError as error:
        name = str(error.filename or error).rsplit("/", 1)[-1]
        reason = "it is incomplete" if name == artifacts.MANIFEST else f"{name} is missing"
        raise s3.Damaged(f"{uri}: {reason}") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise s3.Damaged(f"{uri}: its content was changed ({type(error).__name__})") from None


def read_newest(folder: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest valid checkpoint below a run's folder, or None. Calls `warn` for each newer one that is skipped."""
    for name in sorted(_list_checkpoints(folder), reverse=True):
        try:
            return read(storage.join(folder, name))
        except s3.Damaged as error:
            warn(f"checkpoint skipped: {error}")
    return None


def last_step(folder: str) -> int:
    """Return the step of the newest complete checkpoint below a run's folder without reading it; 0 when there is none."""
    return max((_step(name) for name, complete in _list_checkpoints(folder).items() if complete), default=0)


class CheckpointWriter:
    """Write checkpoints below a run's folder in a thread, one at a time, and keep the newest `kept` of them.

    It writes and deletes nothing once the file `successor` exists or `check` raises. Workers may run for some seconds after their
    driver ended, and another run may have started by then.
    """

    def __init__(self, folder: str, kept: int, successor: str, check: Callable[[], None] = lambda: None) -> None:
        self._folder, self._kept, self._successor, self._check = folder, kept, successor, check
        self._pool = ThreadPoolExecutor(1, "cappy-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Start to write a checkpoint after the previous one is written. Raises the error of the previous write."""
        self.finish()
        self._pending = self._pool.submit(self._write, checkpoint)

    def finish(self) -> None:
        """Wait for the pending write. Raises its error."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, checkpoint: Checkpoint) -> None:
        if storage.exists(self._successor):
            raise CappyError(f"{self._folder}: lease lost: another run took over; this run stops")
        self._check()
        written = f"{checkpoint.step:08d}-{uuid.uuid4().hex[:8]}"
        write(storage.join(self._folder, written), checkpoint)
        # A checkpoint of this or a later step is damaged or incomplete: the run resumed from before it.
        earlier = [name for name, complete in sorted(_list_checkpoints(self._folder).items()) if complete and _step(name) < checkpoint.step]
        kept = {written, *earlier[max(len(earlier) - self._kept + 1, 0) :]}
        for name in _list_checkpoints(self._folder).keys() - kept:
            self._check()
            storage.delete(storage.join(self._folder, name))


def _list_checkpoints(folder: str) -> dict[str, bool]:
    """Return the names of the checkpoints below a folder, with True for each checkpoint that has a manifest."""
    files = storage.list_files(folder)
    names = {path.split("/")[0] for path in files if "/" in path}
    return {name: f"{name}/{artifacts.MANIFEST}" in files for name in names if name[:8].isdigit()}


def _step(name: str) -> int:
    return int(name.split("-")[0])


def _read_checked(uri: str, name: str, manifest: dict[str, Any]) -> bytes:
    data = storage.read_bytes(storage.join(uri, storage.check_relative_path(name, uri)))
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
        raise s3.Damaged(f"{uri}: {name} does not match its SHA-256")
    return data


def _distinct_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state; a tensor with several names is in it once."""
    state = model.state_dict()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: state[name] for name, _ in named if name in state}


def _is_sharded(value: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`. An `isinstance` check would import a module that takes a second."""
    return hasattr(value, "full_tensor")


def _copy_tensors(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    copies = {}
    for name, value in tensors.items():
        whole = value.detach().full_tensor() if _is_sharded(value) else value.detach()
        if keep:
            copies[name] = whole.to("cpu", copy=True).contiguous()
    return copies


def _place_like(value: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor on the device of `other`, sharded as `other` is."""
    if not _is_sharded(other):
        return value.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    # All workers have read the whole tensor, so nothing has to be sent.
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def _pieces(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in groups of at most `_PIECE_BYTES`; a larger tensor is its own group."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, value in tensors.items():
        if piece and size + value.nbytes > _PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = value
        size += value.nbytes
    if piece:
        yield piece
