"""The verbs of a pipeline: the paths of a step, and the settings and inputs that decided a published output.

`VERBS` has one entry for each verb. The manifests of the verbs record all facts, so outputs of single commands are recognised too.
Imports the module of a verb when it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from pydantic import ValidationError

from cluster import artifacts, models, storage, versions
from cluster.config import Config, fingerprint
from cluster.config.paths import absolute, source_files
from cluster.errors import CappyError, UsageError
from cluster.redaction import redact_tree


@dataclass(frozen=True)
class Step:
    """A step of a pipeline, with its resolved config."""

    name: str
    verb: str
    config: Config
    src: str = ""
    """The folder that annotate and export read, or the files that score reads."""
    dst: str = ""
    """The folder that annotate, score and export write."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of an export."""
    after: tuple[str, ...] = ()
    """Names of steps that run before, beside those whose output the step reads."""

    @property
    def uri(self) -> str:
        """Return the folder that the step writes, absolute."""
        return storage.absolute(self.dst or getattr(self.config, VERBS[self.verb].output))

    def reads(self) -> dict[str, str]:
        """Return the paths that the step reads, absolute, by setting. The name of a model becomes a path that does not exist."""
        return {setting: storage.absolute(path) for setting, path in VERBS[self.verb].reads(self).items()}

    def to_json(self) -> dict[str, Any]:
        """Return the step with absolute paths, for a process that runs in another folder."""
        places = {"src": storage.absolute(self.src), "dst": storage.absolute(self.dst)} if self.dst else {}
        config = absolute(self.config).model_dump(mode="json")
        return {"name": self.name, "verb": self.verb, "config": config, **places, "options": dict(self.options), "after": list(self.after)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Step:
        """Return the step of `to_json`."""
        return cls(**{**tree, "config": Config.model_validate(tree["config"]), "after": tuple(tree["after"])})


class Record(NamedTuple):
    """The settings and inputs that decide an output."""

    settings: dict[str, Any]
    inputs: dict[str, Any]
    """Version of each input, by the setting of `Step.reads`."""


class Found(NamedTuple):
    """The records of the outputs and the work at the destination of a step."""

    done: Record | None
    """Of a published output."""
    started: tuple[Record, ...] = ()
    """Of work that an unfinished run left and the same settings would continue."""


class Verb(NamedTuple):
    """How a pipeline plans a verb."""

    output: str
    """The property of `Config` with the destination; empty if the step has `dst`."""
    reads: Callable[[Step], dict[str, str]]
    """Returns the paths that a step reads, by setting."""
    expected: Callable[[Step], Record]
    """Returns the record of an output with the config of a step and the inputs as they are now."""
    recorded: Callable[[Mapping[str, Any]], Record]
    """Returns the record in the manifest of a published output."""
    needs: tuple[str, ...] = ()
    """The settings of `reads` whose folder must be published."""
    find: Callable[[Step, Record], Found] | None = None
    """Returns the records at the destination; None reads the manifest, or the record of an unfinished run."""
    run: Callable[[Step, bool], dict[str, Any]] | None = None
    """Runs a step, with `overwrite`; None runs the verb of `cappy.jobs`."""


def find(step: Step, expected: Record) -> Found:
    """Return the records of the outputs and the work at the destination of a step. `expected` is the record of its config and inputs."""
    verb = VERBS[step.verb]
    if verb.find:
        return verb.find(step, expected)
    if storage.exists(storage.join(step.uri, artifacts.MANIFEST)):
        return Found(_plain(verb.recorded(artifacts.read_any_manifest(step.uri, f"step {step.name}"))))
    staging = storage.join(step.uri, "_staging")
    try:
        run = storage.read_json(storage.join(staging, "run.json"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return Found(None)
    if "settings" in run and storage.exists(storage.join(staging, "prepared.json")):
        # An unfinished run of score has no filters yet: it applies those of the command that finishes it.
        return Found(None, (_plain(verb.recorded({"lineage": run["settings"], "filters": expected.settings.get("filters")})),))
    if "relabelled_from" in run:
        return Found(None, (_plain(verb.recorded(run)),))
    return Found(None)


def expected(step: Step) -> list[Record]:
    """Return the records of a step: with the paths as given, and with absolute paths. A manifest can have either."""
    steps = (step, Step(step.name, step.verb, absolute(step.config), step.src, step.dst, step.options, step.after))
    return [_plain(VERBS[step.verb].expected(each)) for each in steps]


def _plain(record: Record) -> Record:
    """Return a record as JSON has it, without credentials, as manifests have none."""
    settings, inputs = json.loads(json.dumps(list(record)))
    return Record(redact_tree(settings), inputs)


def _lineage(manifest: Mapping[str, Any]) -> Record:
    """Return the record of generate, answer and score, whose manifest has the settings, the scorer and the inputs as `lineage`."""
    settings = dict(manifest.get("lineage") or {})
    if filters := manifest.get("filters"):
        settings["filters"] = filters
    inputs = dict(settings.pop("inputs", {}))
    if scorer := settings.pop("scorer", None):
        inputs["scorer"] = scorer["version"] or scorer["uri"]
    return Record(settings, inputs)


def _of_config(manifest: Mapping[str, Any], result_settings: Callable[[Config], dict[str, Any]]) -> Record:
    """Return the record of a manifest that has the whole config and the versions of its inputs."""
    try:
        settings = result_settings(Config.model_validate(manifest["config"]))
    except (KeyError, ValidationError):
        settings = {"config": "written by another version"}
    return Record(settings, dict(manifest.get("inputs") or {}))


def _expect_generate(step: Step) -> Record:
    from generation.generate import result_settings

    return _lineage({"lineage": result_settings(step.config)})


def _read_generate(step: Step) -> dict[str, str]:
    from generation.generate import read_files

    return read_files(step.config)


def _expect_annotate(step: Step) -> Record:
    from generation.labels import describe_metric

    return Record({"metric": describe_metric(step.config.generate.label)}, {"src": versions.version(step.src)})


def _recorded_annotate(manifest: Mapping[str, Any]) -> Record:
    return Record({"metric": manifest.get("metric")}, {"src": (manifest.get("relabelled_from") or {}).get("writer")})


def _expect_train(step: Step) -> Record:
    from training import train

    config = absolute(step.config)
    return Record(train.result_settings(config), train.read_inputs(config))


def _recorded_train(manifest: Mapping[str, Any]) -> Record:
    from training import train

    record = _of_config(manifest, train.result_settings)
    # Scorers of earlier versions have only the version of the set.
    return record if record.inputs else Record(record.settings, {"dataset": (manifest.get("dataset") or {}).get("writer")})


def _read_train(step: Step) -> dict[str, str]:
    return {"dataset": step.config.dataset_uri, "scorer.encoder": step.config.scorer.encoder}


def _expect_adapt(step: Step) -> Record:
    from training import adapt

    config = absolute(step.config)
    base = config.adapt.base
    # An encoder is known by its name, as in the identity of a task.
    version = config.scorer.encoder if base is None else versions.version(base) or base
    inputs = {"dataset": versions.version(config.dataset_uri), "adapt.base": version}
    return Record({**adapt.result_settings(config), "tasks": config.adapt.tasks}, inputs)


def _recorded_adapt(identity: Mapping[str, Any]) -> Record:
    """Return the record of `results.json`, or of the identity of one task."""
    settings = {name: identity.get(name) for name in ("seed", "scorer", "training", "adapt", "tasks")}
    base = identity.get("base") or {}
    return Record(settings, {"dataset": identity.get("dataset"), "adapt.base": base.get("writer") or base.get("name")})


def _find_adapt(step: Step, expected: Record) -> Found:
    """Return the records of the results and of the published tasks. The results count only if they are complete and up to date."""
    try:
        results = storage.read_json(storage.join(step.uri, "results.json"))
        names = storage.list_files(step.uri)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        results, names = {}, storage.list_files(step.uri) if storage.exists(step.uri) else {}
    manifests = [name for name in names if name.count("/") == 1 and name.endswith(f"/{artifacts.MANIFEST}")]
    identities = [storage.read_json(storage.join(step.uri, name)).get("identity") or {} for name in manifests]
    # `adapt.tasks` may change between runs: finished tasks are kept.
    started = tuple(_plain(_recorded_adapt({**each, "tasks": expected.settings.get("tasks")})) for each in identities)
    done = _plain(_recorded_adapt(results["identity"])) if "identity" in results and not results.get("failed") else None
    complete = done == expected and results.get("published", 0) <= len(manifests)
    return Found(done if complete else None, started)


def _read_adapt(step: Step) -> dict[str, str]:
    return {"dataset": step.config.dataset_uri, "adapt.base": step.config.adapt_base or step.config.scorer.encoder}


def _expect_evaluate(step: Step) -> Record:
    from evaluation.evaluate import read_inputs, result_settings

    return Record(result_settings(step.config), read_inputs(step.config))


def _recorded_evaluate(manifest: Mapping[str, Any]) -> Record:
    from evaluation.evaluate import result_settings

    return _of_config(manifest, result_settings)


def _read_evaluate(step: Step) -> dict[str, str]:
    adapted = {"adapted": step.config.adapted_uri} if step.config.evaluation.adapted else {}
    return {"dataset": step.config.dataset_uri, "scorer": step.config.scorer_uri, **adapted}


def _expect_answer(step: Step) -> Record:
    from serving.answer import result_settings

    return _lineage({"lineage": result_settings(_with_chosen_scorer(step.config))})


def _read_answer(step: Step) -> dict[str, str]:
    return {**source_files(step.config.source), "scorer": step.config.scorer_uri}


def _with_chosen_scorer(config: Config) -> Config:
    from training.main_scorer import choose_scorer

    return config.model_copy(update={"scorer_path": models.absolute(choose_scorer(config))})


def _expect_score(step: Step) -> Record:
    from serving.score import result_filters, result_settings

    settings = result_settings(_with_chosen_scorer(step.config), storage.absolute(step.src))
    return _lineage({"lineage": settings, "filters": result_filters(step.config)})


def _read_score(step: Step) -> dict[str, str]:
    return {"src": step.src, "scorer": step.config.scorer_uri}


def export_options(step: Step) -> Any:
    """Return the `ExportOptions` of a step, checked. Raises `UsageError` for an unknown or invalid option."""
    from pydantic import TypeAdapter

    from generation.export import ExportOptions, check_options

    renamed = {"form": "as", "sources": "source"}
    names = {renamed.get(each.name, each.name): each.name for each in fields(ExportOptions)}
    if unknown := next((name for name in step.options if name not in names), None):
        raise UsageError(f"step {step.name}: options.{unknown}: no such option; the options are {', '.join(names)}")
    try:
        options = TypeAdapter(ExportOptions).validate_python({names[name]: value for name, value in step.options.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = renamed.get(str(first["loc"][0]), str(first["loc"][0]))
        problem = "it is missing" if first["type"] == "missing" else f"{first['msg']}, not {first['input']!r}"
        raise UsageError(f"step {step.name}: options.{name}: {problem}") from None
    check_options(options)
    return options


def _expect_export(step: Step) -> Record:
    from generation.export import result_settings

    options = export_options(step)
    settings = result_settings(options)
    try:
        files = artifacts.read_any_manifest(step.src, "src")["files"]
    except CappyError:
        return Record(settings, {"src": None})
    return Record(settings, {"src": fingerprint(files) if options.duplicates else fingerprint(files, settings)})


def _recorded_export(manifest: Mapping[str, Any]) -> Record:
    pairs = {"form": "pairs", "prompt": "instruction", "response": "response", "duplicates": True}
    settings = pairs if manifest.get("kind") == "pairs" else manifest.get("config", {}).get("export", {})
    return Record(settings, {"src": (manifest.get("made_from") or {}).get("fingerprint")})


def _run_export(step: Step, overwrite: bool) -> dict[str, Any]:
    from generation.export import run_export

    return run_export(step.src, step.dst, export_options(step), overwrite=overwrite)


def _read_src(step: Step) -> dict[str, str]:
    return {"src": step.src}


VERBS: dict[str, Verb] = {
    "generate": Verb("dataset_uri", _read_generate, _expect_generate, _lineage),
    "annotate": Verb("", _read_src, _expect_annotate, _recorded_annotate, ("src",)),
    "train": Verb("scorer_uri", _read_train, _expect_train, _recorded_train, ("dataset",)),
    "adapt": Verb("adapted_uri", _read_adapt, _expect_adapt, _recorded_adapt, find=_find_adapt),
    "evaluate": Verb("evaluation_uri", _read_evaluate, _expect_evaluate, _recorded_evaluate, ("dataset",)),
    "answer": Verb("answers_uri", _read_answer, _expect_answer, _lineage),
    "score": Verb("", _read_score, _expect_score, _lineage),
    "export": Verb("", _read_src, _expect_export, _recorded_export, ("src",), run=_run_export),
}
COPYING = tuple(verb for verb, each in VERBS.items() if not each.output)
"""The verbs that read `src` and write `dst`."""
