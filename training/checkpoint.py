"""Checkpoints of a training run: weights and optimizer moments as safetensors, the books as JSON, a manifest last. No Ray, no pickle.

Below a run's folder a checkpoint is `{step:08d}-{writer}/`: `weights-*.safetensors` and `optimizer-*.safetensors` in pieces,
`state.json`, `metrics.jsonl`, and `_MANIFEST.json`, written last, with the SHA-256 of each. No file is ever written over, so a
kill at any moment leaves whole checkpoints and perhaps an unfinished one, which readers pass over. State is always that of
the whole model, however many workers share it, so the next run may have another number of them.
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

# A file of tensors holds at most this much (or one tensor): far below what an object store takes at once, and what is held twice.
_PIECE_BYTES = 256 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps, in host memory."""

    step: int
    """Optimizer steps taken."""
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    """The optimizer's tensors by `kind/parameter`, e.g. `exp_avg/classifier.weight`."""
    books: dict[str, Any]
    """What else the run must know to go on; anything JSON holds."""
    lines: list[str]
    """`metrics.jsonl` so far."""


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, books: dict[str, Any], lines: list[str], keep: bool = True
) -> Checkpoint | None:
    """Copy the state of a run into host memory, so that training can go on while it is written.

    Where workers share the weights (FSDP) all must call it, to gather them; without `keep` a worker only lends its part.
    """
    whole = copy_weights(model, keep)
    moments = {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    copied = _copies(moments, keep)
    # The books go on changing; as text they do not.
    return Checkpoint(step, whole, copied, json.loads(json.dumps(books)), list(lines)) if keep else None


def copy_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Copy the whole weights of a model into host memory; `keep` and the duty to call it as in `capture`."""
    return _copies(_distinct(model), keep)


def restore(state: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put weights and moments back. Raises `CappyError` where they are those of another model."""
    own = _distinct(model)
    different = {name for name, value in own.items() if name not in state.weights or state.weights[name].shape != value.shape}
    if different or len(own) != len(state.weights):
        raise CappyError(f"the checkpoint of step {state.step} is of another model ({min(different, default='')}); train with --overwrite")
    # Not strict: tied weights stand there once.
    model.load_state_dict({name: _like(value, own[name]) for name, value in state.weights.items()}, strict=False)
    if optimizer is None:
        return
    parameters = dict(model.named_parameters())
    for key, value in state.moments.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # The step counter is read as a plain float32 scalar on the parameter's device by the fused kernel.
        optimizer.state[parameter][kind] = _like(value, parameter) if value.ndim else value.to(parameter.device)


def write(uri: str, state: Checkpoint) -> None:
    """Write a checkpoint into an empty folder; it counts once its manifest is there, last."""
    files = {}
    for kind, tensors in (("weights", state.weights), ("optimizer", state.moments)):
        for number, piece in enumerate(_pieces(tensors)):
            name = f"{kind}-{number:03d}.safetensors"
            files[name] = storage.write_bytes(storage.join(uri, name), save(piece))
    files["state.json"] = storage.write_json(storage.join(uri, "state.json"), {"step": state.step, "books": state.books})
    lines = "".join(f"{line}\n" for line in state.lines)
    files["metrics.jsonl"] = storage.write_bytes(storage.join(uri, "metrics.jsonl"), lines.encode())
    storage.write_json(storage.join(uri, artifacts.MANIFEST), {"kind": "checkpoint", "version": 1, "files": files})


def read(uri: str) -> Checkpoint:
    """Read a checkpoint, each file against its SHA-256.

    Raises `s3.Damaged` where it is unfinished or not what was written, `CappyError` where the store does not answer.
    """
    tensors: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
    try:
        manifest = storage.read_json(storage.join(uri, artifacts.MANIFEST))
        for name in (name for name in manifest["files"] if name.endswith(".safetensors")):
            tensors[name.split("-")[0]].update(load(_checked(uri, name, manifest)))
        state = json.loads(_checked(uri, "state.json", manifest))
        lines = _checked(uri, "metrics.jsonl", manifest).decode().splitlines()
        return Checkpoint(state["step"], tensors["weights"], tensors["optimizer"], state["books"], lines)
    except FileNotFoundError as error:
        name = str(error.filename or error).rsplit("/", 1)[-1]
        reason = "it was not finished" if name == artifacts.MANIFEST else f"{name} is missing"
        raise s3.Damaged(f"{uri}: {reason}") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise s3.Damaged(f"{uri}: it is not what was written ({type(error).__name__})") from None


def read_newest(folder: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest sound checkpoint below a run's folder, or None; `warn` is told of each newer one that is passed over."""
    for name in sorted(_names(folder), reverse=True):
        try:
            return read(storage.join(folder, name))
        except s3.Damaged as error:
            warn(f"checkpoint passed over: {error}")
    return None


def last_step(folder: str) -> int:
    """The step of the newest finished checkpoint below a run's folder, unread; 0 where there is none."""
    return max((_step(name) for name, finished in _names(folder).items() if finished), default=0)


class CheckpointWriter:
    """Writes checkpoints below a run's folder, one at a time and beside the training, and keeps the newest `kept` of them.

    It writes and deletes nothing once the file `successor` exists or `check` raises: workers may outlive their driver by some
    seconds, and another run may have begun by then.
    """

    def __init__(self, folder: str, kept: int, successor: str, check: Callable[[], None] = lambda: None) -> None:
        self._folder, self._kept, self._successor, self._check = folder, kept, successor, check
        self._pool = ThreadPoolExecutor(1, "cappy-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: Checkpoint) -> None:
        """Begin to write `state`, once the one before is written. Raises what that one failed with."""
        self.finish()
        self._pending = self._pool.submit(self._write, state)

    def finish(self) -> None:
        """Wait until all is written. Raises what it failed with."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, state: Checkpoint) -> None:
        if storage.exists(self._successor):
            raise CappyError(f"{self._folder}: another run has taken over; it goes on, this one ends")
        self._check()
        mine = f"{state.step:08d}-{uuid.uuid4().hex[:8]}"
        write(storage.join(self._folder, mine), state)
        # What is not before this step is what a broken run left and readers passed over.
        before = [name for name, finished in sorted(_names(self._folder).items()) if finished and _step(name) < state.step]
        stay = {mine, *before[max(len(before) - self._kept + 1, 0) :]}
        for name in _names(self._folder).keys() - stay:
            self._check()
            storage.delete(storage.join(self._folder, name))


def _names(folder: str) -> dict[str, bool]:
    """The checkpoints below a folder, and whether each has its manifest."""
    files = storage.list_files(folder)
    names = {path.split("/")[0] for path in files if "/" in path}
    return {name: f"{name}/{artifacts.MANIFEST}" in files for name in names if name[:8].isdigit()}


def _step(name: str) -> int:
    return int(name.split("-")[0])


def _checked(uri: str, name: str, manifest: dict[str, Any]) -> bytes:
    data = storage.read_bytes(storage.join(uri, storage.check_relative_path(name, uri)))
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
        raise s3.Damaged(f"{uri}: {name} does not match its SHA-256")
    return data


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, a tensor that several names share once."""
    state = model.state_dict()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: state[name] for name, _ in named if name in state}


def _is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, whose module takes a second to import."""
    return hasattr(value, "full_tensor")


def _copies(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    copies = {}
    for name, value in tensors.items():
        whole = value.detach().full_tensor() if _is_sharded(value) else value.detach()
        if keep:
            copies[name] = whole.to("cpu", copy=True).contiguous()
    return copies


def _like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the device, and in the shards, of another."""
    if not _is_sharded(other):
        return value.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    # Every worker has read the whole, so nothing needs to be sent.
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def _pieces(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
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
