"""The main scorer of the verbs that score: `scorer_path`, else the scorer of the workspace, else the scorer of the package.

Imports neither Ray nor torch.
"""

from __future__ import annotations

from cluster import artifacts, models, storage
from cluster.config import DEFAULT_SCORER, Config
from cluster.progress import log

# Equal to `training.scorer.CHECKPOINTS`, whose module imports torch.
CHECKPOINTS_FOLDER = "_checkpoints"


def with_default_scorer(config: Config, verb: str = "serve") -> Config:
    """Return the config with the scorer of the package if `scorer_path` is not set and the workspace has no scorer."""
    uri = storage.check_uri(config.scorer_uri, "scorer_path")
    if choose_scorer(config) == config.scorer_uri:
        return config
    log(f"{verb}: {uri} has no scorer, and scorer_path is not set; using {DEFAULT_SCORER}, the scorer of the package")
    return config.model_copy(update={"scorer_path": DEFAULT_SCORER})


def choose_scorer(config: Config) -> str:
    """Return `scorer_path`, the scorer of the workspace if there is one, else the scorer of the package."""
    files = (artifacts.MANIFEST, CHECKPOINTS_FOLDER, "config.json")
    if config.scorer_path or any(storage.exists(storage.join(config.scorer_uri, name)) for name in files):
        return config.scorer_uri
    return DEFAULT_SCORER


def check_scorer(config: Config) -> None:
    """Raise `CappyError` unless the scorer is a finished output of `cappy train` or a model in the format of transformers."""
    uri = config.scorer_uri
    if config.scorer_path and not storage.is_s3(uri) and not storage.exists(uri):
        models.resolve(uri, "scorer_path")  # a name on the hub; otherwise the error lists the accepted values
        return
    storage.check_uri(uri, "scorer_path")
    from_train = any(storage.exists(storage.join(uri, name)) for name in (artifacts.MANIFEST, CHECKPOINTS_FOLDER))
    if from_train or not storage.exists(storage.join(uri, "config.json")):
        artifacts.read_manifest(uri, "scorer", "train")
    else:
        models.resolve(uri, "scorer_path")
