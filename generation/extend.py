"""`cappy extend`: publish a set with the rows and candidates of another set, and with new rows, decodings or another LLM.

It is `cappy generate` with the config of the earlier set and `generate.extend`; see `generation.earlier_set`. The earlier set is never
changed. A run is resumed without it once its rows are prepared, because the staging folder has them and the config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster import artifacts, storage
from cluster.config import Config
from cluster.config.loading import load_tree
from cluster.errors import CappyError, UsageError
from cluster.redaction import REDACTED
from generation import engines, generate
from generation.sampler import LoadLLM

_SECTIONS = ("workspace", "seed", "source", "decontaminate", "sampler", "generate")
"""The settings of the earlier set that its extension takes."""
_NOT_TAKEN = ("reuse", "reuse_only", "extend")
"""Settings of `generate` that name other sets: their candidates are in the earlier set."""


def run_extend(config: Config, *, src: str, dst: str, overwrite: bool = False, load: LoadLLM = engines.load_engine) -> dict[str, Any]:
    """Publish the set of `config` at `dst` as an extension of the set at `src`; return its summary.

    Raises as `run_generate` does, and `UsageError` if the candidates of `src` cannot be in one set with those of `config`.
    """
    section = config.generate.model_copy(update={"extend": src})
    config = config.model_copy(update={"dataset": dst, "generate": section})
    return generate.run_generate(config, overwrite=overwrite, load=load)


def read_config(src: str, dst: str, settings: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Return the config of the set at `src` with single settings changed, as `cluster.config.load` changes them.

    If the set was deleted and an unfinished run at `dst` extends it, the config is that of the run. Raises `UsageError` for an invalid
    setting, and `CappyError` if there is no config.
    """
    uri = storage.check_uri(src, "SRC")
    recorded = _recorded_config(uri, storage.check_uri(dst, "DST"))
    tree = json.loads(json.dumps({name: recorded[name] for name in _SECTIONS if name in recorded}))
    for name in _NOT_TAKEN:
        tree.get("generate", {}).pop(name, None)
    config = load_tree(tree, settings, f"the config of SRC={src}")
    for name, given in (("dataset", config.dataset), ("generate.extend", config.generate.extend)):
        if given is not None:
            raise UsageError(f"{name}={given} beside SRC and DST; leave it out")
    hidden = next(_find_redacted(config.model_dump(mode="json")), None)
    if hidden:
        raise UsageError(f"{hidden} of SRC={src} was recorded without its credentials; give the whole value with --set {hidden}=...")
    return config


def _recorded_config(uri: str, dst: str) -> Mapping[str, Any]:
    try:
        return artifacts.read_manifest(uri, "dataset", "generate")["config"]
    except CappyError:
        try:
            prepared = storage.read_json(storage.join(dst, "_staging", "prepared.json"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            prepared = {}
        if prepared.get("extends", {}).get("uri") != uri:
            raise
        found: Mapping[str, Any] = prepared["extended_config"]
        return found


def _find_redacted(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of the texts in which a credential was replaced."""
    if isinstance(value, str) and REDACTED in value:
        yield path
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from _find_redacted(each, f"{path}.{key}" if path else str(key))
