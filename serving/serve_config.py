"""The Serve application as a config file, for `serve deploy`, `serve run` and KubeRay's RayService (`serveConfigV2`).

The file holds every setting that serving reads, and no secret. API keys are in it as hashes, and an endpoint's key as the name of an
environment variable. Credentials for object stores stay on the machines. The file imports `serving.app:application`, so this package
must be installed where it runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from cluster import models, progress, runtime, storage
from cluster.config import Config, paths
from serving import app, serve

_OTHER_SECTIONS = {"source", "decontaminate", "generate", "plan", "scorer", "training", "adapt", "evaluation"}


def export_serve_config(config: Config, file: str) -> dict[str, Any]:
    """Write the Serve config of `config` to `file`; return `{"uri": path}`.

    Raises `UsageError` for a config that `serve.check_access_and_limits` refuses.
    """
    serve.check_access_and_limits(config)
    path = Path(file).absolute()
    path.write_text(yaml.safe_dump(serve_config_tree(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    if not storage.is_s3(config.scorer_uri):
        progress.log(f"note: the scorer {config.scorer_uri} is not an s3:// prefix; every machine of the cluster must have it")
    return {"uri": str(path)}


def serve_config_tree(config: Config) -> dict[str, Any]:
    """Return the content of the file as plain dicts, in the schema `ray.serve.schema.ServeDeploySchema`."""
    scorer = models.absolute(config.scorer_path) if config.scorer_path else None  # it may be a name on the hub
    config = paths.absolute(config).model_copy(update={"scorer_path": scorer})
    serving = config.serving
    replicas = {"Gateway": serving.gateway_replicas, "LLM": serving.llm_replicas, "Scorer": serving.scorer_replicas}
    return {
        "proxy_location": "EveryNode",
        "http_options": app.http_options(serving),
        "applications": [
            {
                "name": app.APPLICATION,
                "route_prefix": "/",
                "import_path": "serving.app:application",
                "runtime_env": {"env_vars": {name: os.environ[name] for name in runtime.FORWARDED_VARIABLES if name in os.environ}},
                "args": config.model_dump(mode="json", exclude=_OTHER_SECTIONS),
                # A change here keeps the running replicas; a change in `args` replaces them.
                "deployments": [{"name": name, **app.replica_options(each)} for name, each in replicas.items()],
            }
        ],
    }
