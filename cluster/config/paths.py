"""Local paths of a config, made absolute: a Ray worker or job runs in another folder."""

from __future__ import annotations

from typing import Any

from cluster import models, storage
from cluster.config import Config, FilesSource, HubSource, MixtureSource, RowsSource, Source


def absolute(config: Config) -> Config:
    """The config with its local paths absolute: the job runs in another folder."""
    paths: dict[str, Any] = {
        name: storage.absolute(value)
        for name in ("workspace", "dataset", "scorer_path", "adapted_path", "evaluation_path")
        if (value := getattr(config, name))
    }
    if config.sampler.engine.kind != "endpoint":  # whose model is a name there, whatever folder is called so here
        paths["sampler"] = config.sampler.model_copy(update={"model": models.absolute(config.sampler.model)})
    paths["scorer"] = config.scorer.model_copy(update={"encoder": models.absolute(config.scorer.encoder)})
    if config.adapt.base:
        paths["adapt"] = config.adapt.model_copy(update={"base": models.absolute(config.adapt.base)})
    scorers = tuple(each.model_copy(update={"path": models.absolute(each.path)}) for each in config.serving.scorers)
    paths["serving"] = config.serving.model_copy(update={"scorers": scorers})
    paths["source"] = _absolute_source(config.source)
    evaluation = tuple(map(storage.absolute, config.decontaminate.files))
    paths["decontaminate"] = config.decontaminate.model_copy(update={"files": evaluation})
    return config.model_copy(update=paths)


def _absolute_source(source: Source) -> Source:
    """The source with the local paths in it, its parts' too, absolute."""
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
