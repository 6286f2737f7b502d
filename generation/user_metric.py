"""Label functions of users: `generate.label.metric: package.module:function`. No Ray, no files.

A label function takes a batch of responses and returns their labels:

    def labels(responses: list[str], references: list[list[str]], instructions: list[str]) -> list[float]

All lists have the same length B. `references[i]` are the correct responses to the instruction of response i. The parameter
`instructions` is optional. The labels are B numbers in [0, 1]. The version of the function is its attribute `VERSION`, else that of its
module, else the version of its installed package, else a hash of its source. It is in the manifest of a set, and a run is resumed only
with the same version.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cluster.errors import CappyError, UsageError, first_line


@dataclass(frozen=True)
class UserMetric:
    """A label function, imported."""

    name: str
    """`package.module:function`."""
    function: Callable[..., Any]
    takes_instructions: bool
    version: str


def is_user_metric(name: str) -> bool:
    """Return whether the name of a metric is that of a label function."""
    return ":" in name


@lru_cache(maxsize=8)
def load_metric(name: str) -> UserMetric:
    """Import a label function. A module in the working directory is found too.

    Raises `UsageError` if the module cannot be imported, if it has no such function, or if its signature has other parameters.
    """
    module_name, _, function_name = name.partition(":")
    module = _import_module(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"generate.label.metric={name}: {module_name} has no function {function_name}; give package.module:function")
    try:
        parameters = inspect.signature(function).parameters
        takes_instructions = "instructions" in parameters
        inspect.signature(function).bind([], [], **({"instructions": []} if takes_instructions else {}))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"generate.label.metric={name}: the function cannot be called with (responses, references): {first_line(error)}; "
            f"its parameters are responses, references and, if it needs them, instructions"
        ) from None
    return UserMetric(name, function, takes_instructions, _find_version(module, function))


def compute_user_labels(
    metric: UserMetric, responses: Sequence[str], references: Sequence[Sequence[str]], instructions: Sequence[str]
) -> np.ndarray:
    """Return the labels of B responses, float64 (B,). All sequences have length B.

    Raises `CappyError` with the reason if the function raises, or returns another number of labels, something else than numbers, NaN,
    or a number outside [0, 1].
    """
    if not responses:
        return np.empty(0)
    texts = (list(responses), [list(each) for each in references])
    try:
        returned = metric.function(*texts, instructions=list(instructions)) if metric.takes_instructions else metric.function(*texts)
        labels = np.asarray(returned if isinstance(returned, np.ndarray) else list(returned), np.float64)
    except (Exception, SystemExit) as error:  # the code of a user can raise anything
        raise CappyError(f"generate.label.metric={metric.name} raised {type(error).__name__}: {first_line(error)}") from None
    if labels.shape != (len(responses),):
        raise CappyError(
            f"generate.label.metric={metric.name} returned labels of shape {labels.shape} for {len(responses)} responses; "
            f"it must return one number for each"
        )
    wrong = np.flatnonzero(~((labels >= 0) & (labels <= 1)))  # NaN too
    if len(wrong):
        raise CappyError(
            f"generate.label.metric={metric.name} returned {labels[wrong[0]]:g} for {responses[wrong[0]][:80]!r}; labels are in [0, 1]"
        )
    return labels


def _import_module(module_name: str, name: str) -> ModuleType:
    # The `cappy` command has the folder of its script first on the path, not the working directory.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the code of a user
        raise UsageError(
            f"generate.label.metric={name}: cannot import {module_name} ({type(error).__name__}: {first_line(error)}) on "
            f"{os.uname().nodename}; install it on each machine of the cluster, or run the command in its folder"
        ) from None


def _find_version(module: ModuleType, function: Callable[..., Any]) -> str:
    for owner in (function, module):
        if (version := getattr(owner, "VERSION", None)) is not None:
            return str(version)
    package = module.__name__.partition(".")[0]
    for distribution in importlib.metadata.packages_distributions().get(package, ()):
        return f"{distribution} {importlib.metadata.version(distribution)}"
    source = getattr(module, "__file__", None)
    return f"sha256 {hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]}" if source else "unknown"
