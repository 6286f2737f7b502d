"""Read a pipeline file: its steps, each a verb with its config. Reads no outputs, and imports no Ray and no torch.

A file has a common config and a list of steps. The config of a step is, each on top of the one before: its `config` or the common
`config`, the common `settings`, its `settings`, and `--set`.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, WithJsonSchema, field_validator, model_validator

from cappy.pipeline_verbs import COPYING, VERBS, Step, export_options
from cluster import storage
from cluster.config import Config, Section
from cluster.config import schema as config_schema
from cluster.config.loading import load_tree, merge, read_yaml
from cluster.errors import UsageError

PIPELINES = Path(__file__).resolve().parent / "pipelines"

VerbName = Annotated[str, WithJsonSchema({"type": "string", "enum": list(VERBS)})]
Tree = Annotated[dict[str, Any], Field(default_factory=dict)]


class StepSection(Section):
    """A step of a pipeline: a verb and its settings. A step without settings can be written as the name of its verb."""

    verb: VerbName
    """The verb that the step runs."""
    name: str | None = Field(None, min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the step, for `--redo`, `after` and `src`; null is the verb. Two steps have different names."""
    config: str | None = None
    """A YAML file, or the name of a file in `cappy/configs/`, instead of the common config."""
    settings: Tree
    """Settings on top of the common ones, by section as in a config file."""
    src: str | None = None
    """annotate, score and export: the folder or s3:// prefix to read. It can be the name of the step that writes it. score also reads a
    file or a glob. null is the regression set."""
    dst: str | None = None
    """annotate, score and export: the folder or s3:// prefix to write; null is the name of the step, below the workspace."""
    options: Tree
    """export: the options of the command, e.g. `{as: dpo, margin: 0.2}`."""
    after: tuple[str, ...] = ()
    """Names of steps that must be finished before this one starts, beside the steps whose output it reads."""

    @field_validator("verb")
    @classmethod
    def _known(cls, verb: str) -> str:
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.7)
            raise ValueError(f"no such verb; did you mean {close[0]!r}?" if close else f"no such verb; use one of {', '.join(VERBS)}")
        return verb

    @model_validator(mode="after")
    def _places_of_the_verb(self) -> StepSection:
        for setting in ("src", "dst"):
            if getattr(self, setting) is not None and self.verb not in COPYING:
                raise ValueError(
                    f"{setting}={getattr(self, setting)} is for {', '.join(COPYING)}; {self.verb} takes its paths from its config"
                )
        if self.options and self.verb != "export":
            raise ValueError(f"`options` is for export; put the settings of {self.verb} in `settings`")
        return self


class PipelineFile(Section):
    """A pipeline: steps that `cappy run` runs in the order of their data."""

    config: str | None = None
    """The common config of the steps: a YAML file, or the name of a file in `cappy/configs/`; null is a config of defaults."""
    settings: Tree
    """Common settings on top of the config, by section as in a config file."""
    steps: tuple[StepSection, ...] = Field(min_length=1)
    """The steps. A step that reads the output of another one runs after it."""

    @field_validator("steps", mode="before")
    @classmethod
    def _plain_verbs(cls, steps: Any) -> Any:
        return [{"verb": step} if isinstance(step, str) else step for step in steps] if isinstance(steps, list | tuple) else steps


def read_pipeline(source: str | Path, settings: Sequence[str] | Mapping[str, Any] = ()) -> list[Step]:
    """Return the steps of a pipeline file, in the order of the file.

    Args:
        source: The path of a YAML file, or the name of a file in `cappy/pipelines/`.
        settings: Changes of the configs of all steps, as for `cluster.config.load`.

    Raises:
        UsageError: If a file cannot be read or a value is invalid. The message names the file, the step, the value and the fix.
    """
    tree = read_yaml(source, PIPELINES, "pipeline file")
    try:
        pipeline = PipelineFile.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"{source}: {_explain(error)}") from None
    names = [step.name or step.verb for step in pipeline.steps]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{source}: two steps are named {repeated[0]}; give one of them another `name`")
    for name, step in zip(names, pipeline.steps, strict=True):
        if unknown := next((other for other in step.after if other not in names or other == name), None):
            raise UsageError(f"{source}: step {name}: after={unknown}: no such other step; the steps are {', '.join(names)}")
    configs = [_config_of(pipeline, step, settings, f"{source}, step {name}") for name, step in zip(names, pipeline.steps, strict=True)]
    return _with_places(names, pipeline.steps, configs)


def _config_of(pipeline: PipelineFile, step: StepSection, settings: Sequence[str] | Mapping[str, Any], where: str) -> Config:
    file = step.config or pipeline.config
    tree = merge(merge(read_yaml(file) if file else {}, pipeline.settings), step.settings)
    config = load_tree(copy.deepcopy(tree), settings, where)
    if step.verb == "evaluate" and config.suite is not None:
        raise UsageError(f"{where}: a suite cannot be a step, because it samples its own set; run it with `cappy evaluate --suite`")
    return config


def _with_places(names: Sequence[str], sections: Sequence[StepSection], configs: Sequence[Config]) -> list[Step]:
    """Return the steps with the folders that annotate, score and export read and write."""
    steps: dict[str, Step] = {}
    for name, section, config in zip(names, sections, configs, strict=True):
        dst = (section.dst or storage.join(config.workspace, name)) if section.verb in COPYING else ""
        steps[name] = Step(name, section.verb, config, "", dst, section.options, section.after)
    for name, section in zip(names, sections, strict=True):
        if section.verb in COPYING:
            source = steps[section.src].uri if section.src in steps else section.src or steps[name].config.dataset_uri
            steps[name] = replace(steps[name], src=source)
        if section.verb == "export":
            export_options(steps[name])
    return list(steps.values())


def _explain(error: ValidationError) -> str:
    """Return the first error of pydantic as one line: the key, the value and the fix."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = sorted((StepSection if first["loc"][0] == "steps" else PipelineFile).model_fields)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(known)}"
        if first["loc"][-1] in Config.model_fields:
            hint = "settings of a config belong below `settings`"
        return f"unknown key {path}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{path}: it is missing; a pipeline has `steps`, and a step has a `verb`"
    return f"{path}: {message}" if isinstance(first["input"], dict | list) else f"{path}={first['input']!r}: {message}"


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of pipeline files, with that of the settings in it."""
    tree = PipelineFile.model_json_schema()
    config = config_schema.schema()
    definitions = {**config.pop("$defs"), **tree.pop("$defs"), "Config": {name: config[name] for name in config if name != "$schema"}}
    items = tree["properties"]["steps"]["items"]
    tree["properties"]["steps"]["items"] = {"anyOf": [{"type": "string", "enum": list(VERBS)}, items]}
    for model in (tree, definitions["StepSection"]):
        for name, setting in model["properties"].items():
            setting.pop("title", None)
            if name == "settings":
                model["properties"][name] = {"$ref": "#/$defs/Config", "description": setting["description"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "Cappy pipeline", "$defs": definitions}


def schema_text() -> str:
    """Return the schema as `cappy config schema --pipeline` prints it."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
