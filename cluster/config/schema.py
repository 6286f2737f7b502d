"""The JSON Schema of a config file, for editors: names, types, ranges, defaults and docs of all settings.

Needs `cluster.config` alone. `cappy/configs/schema.json` is this schema, so that the YAML files beside it can name it; after a change to
a setting run `cappy config schema > cappy/configs/schema.json`.
"""

from __future__ import annotations

import json
from typing import Any

from cluster import config as configuration


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `Config`, as a YAML file may write it."""
    tree = configuration.Config.model_json_schema()
    for model in (tree, *tree["$defs"].values()):
        for name, setting in model["properties"].items():
            setting.pop("title", None)  # the name of the setting again
            if isinstance(setting.get("default"), dict):
                del setting["default"]  # a section: each of its settings has a default
            if setting.get("$ref") == "#/$defs/Scaling":
                model["properties"][name] = _or_number(setting)
            _name_kinds(setting, tree["$defs"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "Cappy config"}


def text() -> str:
    """Return the schema as `cappy config schema` prints it."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def _or_number(setting: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a number of replicas: a section, or a plain number in its place."""
    rest = {key: value for key, value in setting.items() if key != "$ref"}
    return {"anyOf": [{"type": "integer", "minimum": 1}, {"$ref": setting["$ref"]}], **rest}


def _name_kinds(setting: dict[str, Any], models: dict[str, Any]) -> None:
    """Require `kind` in the models of a union. JSON Schema ignores pydantic's `discriminator`; without `kind`, an engine is vLLM."""
    for kind, reference in setting.pop("discriminator", {}).get("mapping", {}).items():
        model = models[reference.rsplit("/", 1)[-1]]
        if kind != "vllm" and "kind" not in model.get("required", []):
            model["required"] = ["kind", *model.get("required", [])]
