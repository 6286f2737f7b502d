"""Absolute local paths in a config: a Ray worker or job runs in another working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster import models, storage
from cluster.config import Config, FilesSource, HubSource, MixtureSource, RowsSource, Source


def absolute(config: Config) -> Config:
    """Return the config with absolute local paths."""
    paths: dict[str, Any] = {
        name: value if value in models.EMBEDDED else storage.absolute(value)
        for name in ("workspace", "dataset", "scorer_path", "adapted_path", "evaluation_path", "answers_path")
        if (value := getattr(config, name))
    }
    if config.sampler.engine.kind != "endpoint":  # the model of an endpoint is a name there, never a local folder
        paths["sampler"] = config.sampler.model_copy(update={"model": models.absolute(config.sampler.model)})
    paths["scorer"] = config.scorer.model_copy(update={"encoder": models.absolute(config.scorer.encoder)})
    if base := config.adapt_base:
        paths["adapt"] = config.adapt.model_copy(update={"base": models.absolute(base)})
    scorers = tuple(each.model_copy(update={"path": models.absolute(each.path)}) for each in config.serving.scorers)
    logged = config.serving.log_candidates
    paths["serving"] = config.serving.model_copy(update={"scorers": scorers, "log_candidates": logged and storage.absolute(logged)})
    paths["source"] = _absolute_source(config.source)
    reuse = tuple(map(storage.absolute, config.generate.reuse))
    extended = config.generate.extend and storage.absolute(config.generate.extend)
    paths["generate"] = config.generate.model_copy(update={"reuse": reuse, "extend": extended})
    evaluation = tuple(map(storage.absolute, config.decontaminate.files))
    paths["decontaminate"] = config.decontaminate.model_copy(update={"files": evaluation})
    return config.model_copy(update=paths)


def source_files(source: Source, setting: str = "source") -> dict[str, str]:
    """Return the files and folders, local or s3://, that a source reads, by setting."""
    if isinstance(source, MixtureSource):
        parts = [source_files(part.source, f"{setting}.parts.{number}.source") for number, part in enumerate(source.parts)]
        return {name: path for part in parts for name, path in part.items()}
    if not isinstance(source, RowsSource):
        return {}
    found = {f"{setting}.templates": source.templates} if source.templates else {}
    if isinstance(source, FilesSource):
        found[f"{setting}.path"] = source.path
    if isinstance(source, HubSource) and Path(source.name).expanduser().is_dir():
        found[f"{setting}.name"] = source.name
    return found


def _absolute_source(source: Source) -> Source:
    """Return the source with absolute local paths, also in the parts of a mixture."""
    if isinstance(source, MixtureSource):
        parts = tuple(part.model_copy(update={"source": _absolute_source(part.source)}) for part in source.parts)
        return source.model_copy(update={"parts": parts})
    if not isinstance(source, RowsSource):
        return source
    changes: dict[str, Any] = {"templates": storage.absolute(source.templates)} if source.templates else {}
    if isinstance(source, FilesSource):
        changes["path"] = storage.absolute(source.path)
    if isinstance(source, HubSource):
        changes["name"] = models.absolute(source.name)
    return source.model_copy(update=changes)
