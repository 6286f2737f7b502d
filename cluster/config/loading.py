"""Load a config: YAML file, then `--set section.key=value`; also fingerprints and differences of configs.

Each layer overrides the one before. Every error names the file or the key, its value and the fix."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config.base import Section
from cluster.config.root import Config
from cluster.config.sampler import EndpointConfig, Seq2SeqConfig, VLLMConfig
from cluster.config.sources import BigBenchSource, FilesSource, HubSource, MixtureSource
from cluster.errors import UsageError

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "cappy" / "configs"


def load(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a YAML file (a path, or a name in `cappy/configs/`) with `section.key=value` overrides on top.

    Raises `UsageError` naming the file or the key, its value and what would be right.
    """
    tree: dict[str, Any] = _read_yaml(source) if source else {}
    for override in overrides:
        _set(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error, source)) from None


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change with any value in `parts` (sections, or anything JSON can hold)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Each leaf that differs between two plain trees, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted(old.keys() | new.keys()):
            changes += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return changes
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def _read_yaml(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.exists() and not path.suffix and (CONFIG_FOLDER / f"{source}.yaml").exists():
        path = CONFIG_FOLDER / f"{source}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml")))
        raise UsageError(f"config file {source} does not exist; give a path or one of: {names}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {source} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"config file {source} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"config file {source} holds a {type(tree).__name__}; it must hold `section: ...` keys")
    return tree


def _set(tree: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into a plain tree; the value is read as YAML (`3`, `true`, `[a, b]`, `null`)."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {override}: write it as section.key=value, e.g. --set training.epochs=2")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    *parents, leaf = path.strip().split(".")
    node: Any = tree
    for parent in parents:
        node = _child(node, parent, override)
    if isinstance(node, list):
        node[_index(node, leaf, override)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise UsageError(f"--set {override}: {'.'.join(parents)} holds a plain value, so it has no key {leaf!r}")


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if not isinstance(node, dict):
        raise UsageError(f"--set {override}: the part before {key!r} holds a plain value, so it has no key {key!r}")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UsageError(f"--set {override}: {key!r} is not a position in a list of {len(node)} (counted from 0)")
    return int(key)


# Where a key holds one of several sections, pydantic puts the chosen kind into an error's path, after the key.
_KINDS: dict[Any, dict[Any, type[Section]]] = {
    "source": {"bigbench": BigBenchSource, "files": FilesSource, "hub": HubSource, "mixture": MixtureSource},
    "engine": {"vllm": VLLMConfig, "transformers": Seq2SeqConfig, "endpoint": EndpointConfig},
}


def _explain(error: ValidationError, source: str | Path | None) -> str:
    """Turn pydantic's first error into one line: file, key path, value, and what would be right."""
    errors = [each for each in error.errors(include_url=False) if each["type"] != "default_factory_not_called"]
    first = errors[0]
    location = _without_kinds(first["loc"])
    path = ".".join(str(part) for part in location)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    where = f"{source}: " if source else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(tuple(first["loc"]))
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{where}unknown key {path}; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict | list) or not path:
        return f"{where}{path or 'config'}: {message}{more}"
    return f"{where}{path}={first['input']!r}: {message}{more}"


def _without_kinds(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The location as the file writes it."""
    return tuple(part for before, part in zip((None, *location), location, strict=False) if part not in _KINDS.get(before, ()))


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """The keys the section at `location` (whose last part is the unknown key) does know."""
    model: Any = Config
    for before, part in zip((None, *location), location[:-1], strict=False):
        if isinstance(part, int):
            continue
        if part in _KINDS.get(before, ()):
            model = _KINDS[before][part]
            continue
        annotation = model.model_fields[str(part)].annotation if str(part) in getattr(model, "model_fields", {}) else None
        model = next((each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")), model)
    return sorted(model.model_fields)
