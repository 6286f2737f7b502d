"""A resolved config with the origin of each value: the default, a line of the YAML file, or `--set`.

Imports `cluster.config` and `cluster.redaction` only. Hashes of API keys and credentials in URLs are replaced by `REDACTED`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster import config as configuration
from cluster.redaction import REDACTED, redact_text

Keys = tuple[str, ...]
"""The keys and list positions that lead to a value, from the root of the tree."""

_SECRET_KEYS = {"sha256"}


def show(source: str | Path | None, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the resolved config as a plain tree without secrets, and the origin of each of its values by dotted path.

    A list of plain values is one value.

    Raises:
        UsageError: If the config is not valid.
    """
    tree = redact(configuration.load(source, overrides).model_dump(mode="json"))
    given = origins(source, overrides)
    return tree, {".".join(keys): _origin(given, keys) for keys, _ in leaves(tree)}


def origins(source: str | Path | None, overrides: Sequence[str]) -> dict[Keys, tuple[str, bool]]:
    """Return (origin, whether it is a plain value) for everything the file and the overrides of a valid config give."""
    given: dict[Keys, tuple[str, bool]] = {}
    if source is not None:
        path = Path(source) if Path(source).exists() else configuration.CONFIG_FOLDER / f"{source}.yaml"
        name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        given = {keys: (f"{name}:{line}", plain) for keys, line, plain in _nodes(root, ())}
    for override in overrides:
        path_text, _, text = override.partition("=")
        keys = tuple(path_text.strip().split("."))
        given = {known: origin for known, origin in given.items() if known[: len(keys)] != keys}
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            root = None  # `load` takes such a text as it is
        given[keys] = ("--set", not isinstance(root, yaml.CollectionNode))
        given.update({inner: ("--set", plain) for inner, _, plain in _nodes(root, keys)})
    return given


def redact(value: Any) -> Any:
    """Return a plain tree with its secrets replaced."""
    if isinstance(value, dict):
        return {key: REDACTED if key in _SECRET_KEYS and inner else redact(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield the plain values of a tree with their keys; a list of plain values and an empty section count as plain."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*keys, str(key)))
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*keys, str(index)))
    else:
        yield keys, value


def to_yaml(tree: dict[str, Any], origin: dict[str, str]) -> str:
    """Return a tree as YAML that `load` reads, with the origin of each value as a comment behind it."""
    lines = list(_lines(tree, (), origin))
    width = min(max((len(text) for text, comment in lines if comment), default=0), 70)
    return "".join(f"{text:{width}}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def _origin(given: dict[Keys, tuple[str, bool]], keys: Keys) -> str:
    """Return the origin of a value, which may be a plain value given for its whole section (`llm_replicas: 2`)."""
    if keys in given:
        return given[keys][0]
    above = (given[keys[:length]] for length in range(len(keys) - 1, 0, -1) if keys[:length] in given)
    return next((origin for origin, plain in above if plain), "default")


def _nodes(node: yaml.Node | None, keys: Keys) -> Iterator[tuple[Keys, int, bool]]:
    """Yield (keys, line, whether it is a plain value) of all nodes below a YAML node; a later one replaces an earlier one."""
    if isinstance(node, yaml.MappingNode):
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != "tag:yaml.org,2002:merge"):
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                    yield from _nodes(merged, keys)
                continue
            yield (*keys, key.value), key.start_mark.line + 1, isinstance(value, yaml.ScalarNode)
            yield from _nodes(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*keys, str(index)), value.start_mark.line + 1, isinstance(value, yaml.ScalarNode)
            yield from _nodes(value, (*keys, str(index)))


def _lines(value: Any, keys: Keys, origin: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (text, comment) for each line of a section or a list of sections, indented from its own level."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        below = (*keys, str(key))
        comment = origin.get(".".join(below), "")
        mark = f"{key}:" if isinstance(value, dict) else "-"
        if comment:
            yield f"{mark} {_scalar(inner)}", comment
            continue
        indented = [("  " + text, each) for text, each in _lines(inner, below, origin)]
        if mark == "-":  # the first key follows the dash
            indented[0] = ("-" + indented[0][0][1:], indented[0][1])
        else:
            yield mark, ""
        yield from indented


def _scalar(value: Any) -> str:
    """Return a plain value or a list of them as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf")).removesuffix("...\n").strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
