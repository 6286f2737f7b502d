"""Load a config: a YAML file, then single settings on top of it. Also fingerprints and differences of configs.

Imports no Ray and no model library. Every error names the file or the key, its value and the fix.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
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


def load(config: str | Path | Config | None = None, settings: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Return a config with single settings changed.

    Args:
        config: The path of a YAML file, the name of a file in `cappy/configs/`, a `Config`, or None for the defaults.
        settings: Changes by dotted key, either `{"training.epochs": 2}` or `["training.epochs=2"]`. The value in such a text is
            read as YAML.

    Raises:
        UsageError: If the file cannot be read or a value is invalid. The message names the file or the key, the value and the fix.

    Example: `load("demo", {"training.epochs": 2})`
    """
    if isinstance(config, Config):
        return load_tree(config.model_dump(mode="json"), settings)
    return load_tree(read_yaml(config) if config else {}, settings, config)


def load_tree(tree: dict[str, Any], settings: Sequence[str] | Mapping[str, Any] = (), source: str | Path | None = None) -> Config:
    """Return the config of a plain tree with single settings changed, as `load` does. `source` names the tree in errors."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            _assign(tree, key, value, f"{key}={value}")
    else:
        for override in settings:
            _assign(tree, *_parse_override(override), f"--set {override}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error, source)) from None


def merge(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain tree with the values of another one on top, section by section. A section with another `kind` is replaced."""
    merged = dict(tree)
    for key, value in changes.items():
        before = merged.get(key)
        same = isinstance(before, Mapping) and isinstance(value, Mapping) and value.get("kind", before.get("kind")) == before.get("kind")
        merged[key] = merge(before, value) if same else value  # type: ignore[arg-type]
    return merged


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that change with any value in `parts` (sections, or any JSON value)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return each value that differs between two plain trees, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = []
        for key in sorted(old.keys() | new.keys()):
            changes += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return changes
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def read_yaml(source: str | Path, folder: Path = CONFIG_FOLDER, what: str = "config file") -> dict[str, Any]:
    """Return the tree of a YAML file, or of a file in `folder` by its name without `.yaml`. Raises `UsageError`."""
    path = Path(source)
    if not path.exists() and not path.suffix and (folder / f"{source}.yaml").exists():
        path = folder / f"{source}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UsageError(f"{what} {source} does not exist; give a path or one of: {names}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {source} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{what} {source} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{what} {source} holds a {type(tree).__name__}; it must hold `section: ...` keys")
    return tree


def _parse_override(override: str) -> tuple[str, Any]:
    """Return the key and the value of `a.b=value`. The value is read as YAML (`3`, `true`, `[a, b]`, `null`)."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {override}: write it as section.key=value, e.g. --set training.epochs=2")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    return key.strip(), value


def _assign(tree: dict[str, Any], key: str, value: Any, shown: str) -> None:
    """Set a dotted key of a plain tree. `shown` is the start of an error message: the change as the user wrote it."""
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = _child(node, parent, shown)
    if isinstance(node, list):
        node[_index(node, leaf, shown)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise UsageError(f"{shown}: {'.'.join(parents)} holds a plain value, so it has no key {leaf!r}")


def _child(node: Any, key: str, shown: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, shown)]
    if not isinstance(node, dict):
        raise UsageError(f"{shown}: the part before {key!r} holds a plain value, so it has no key {key!r}")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, shown: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UsageError(f"{shown}: {key!r} is not a position in a list of {len(node)} (counted from 0)")
    return int(key)


# For a key with one of several sections, pydantic puts the chosen kind after the key in the location of an error.
_KINDS: dict[Any, dict[Any, type[Section]]] = {
    "source": {"bigbench": BigBenchSource, "files": FilesSource, "hub": HubSource, "mixture": MixtureSource},
    "engine": {"vllm": VLLMConfig, "transformers": Seq2SeqConfig, "endpoint": EndpointConfig},
}


def _explain(error: ValidationError, source: str | Path | None) -> str:
    """Return pydantic's first error as one line: the file, the key, the value and the fix."""
    errors = [each for each in error.errors(include_url=False) if each["type"] != "default_factory_not_called"]
    first = errors[0]
    location = _without_kinds(first["loc"])
    path = ".".join(str(part) for part in location)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    where = f"{source}: " if source else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(tuple(first["loc"]))
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(known)}"
        return f"{where}unknown key {path}; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict | list) or not path:
        return f"{where}{path or 'config'}: {message}{more}"
    return f"{where}{path}={first['input']!r}: {message}{more}"


def _without_kinds(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Return the location as it is in the file."""
    return tuple(part for before, part in zip((None, *location), location, strict=False) if part not in _KINDS.get(before, ()))


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the valid keys of the section at `location`, whose last part is the unknown key."""
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
