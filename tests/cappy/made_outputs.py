"""Steps that publish small outputs with the manifests of their verbs, without running the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cappy import pipeline_verbs
from cappy.pipeline_verbs import Step
from cluster import artifacts, storage, versions
from cluster.config.paths import absolute
from generation.export import result_settings

KINDS = {"generate": "dataset", "train": "scorer", "evaluate": "evaluation", "answer": "answers", "annotate": "dataset", "export": "export"}


class Killed(BaseException):
    """The end of the process."""


class Recorder:
    """Runs steps by `publish_step` and keeps their names. `before` and `after` name the steps at which the process ends."""

    def __init__(self, before: str = "", after: str = "") -> None:
        self.ran: list[str] = []
        self._before, self._after = before, after

    def __call__(self, step: Step, overwrite: bool) -> dict[str, Any]:
        self.ran.append(step.name)
        if step.name == self._before:
            if overwrite:
                storage.delete(step.uri)  # the verb began to replace its output
            raise Killed
        publish_step(step, overwrite)
        if step.name == self._after:
            raise Killed
        return {"uri": step.uri}


def publish_step(step: Step, overwrite: bool) -> None:
    """Publish the output of a step, as its verb records it."""
    if storage.exists(f"{step.uri}/{artifacts.MANIFEST}"):
        assert overwrite, f"{step.name} would have been refused"
    storage.delete(step.uri)
    record = pipeline_verbs.VERBS[step.verb].expected(step)
    config = absolute(step.config) if step.verb == "train" else step.config
    settings, inputs = record
    facts: dict[str, Any] = {
        "generate": lambda: {"lineage": {**settings, "inputs": inputs}},
        "answer": lambda: {"lineage": {**settings, "scorer": {"uri": "", "version": inputs["scorer"]}}},
        "annotate": lambda: {"metric": settings["metric"], "relabelled_from": {"writer": versions.version(step.src)}},
        "export": lambda: {"made_from": {"fingerprint": inputs["src"]}},
    }.get(step.verb, lambda: {"inputs": inputs})()
    files = {"data.txt": storage.write_bytes(f"{step.uri}/data.txt", repr(record).encode())}
    tree = {"export": result_settings(pipeline_verbs.export_options(step))} if step.verb == "export" else config
    artifacts.publish_folder(step.uri, KINDS[step.verb], files=files, summary={}, config=tree, **facts)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder with their content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
