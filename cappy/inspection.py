"""`cappy inspect`: read the manifest and the first rows of a published folder and check its files. Prints nothing."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from cluster import artifacts, storage
from cluster.errors import CappyError, first_line
from training import adapted_index, selection

_DEAD_LETTERS = "dead_letters.jsonl"
_NUMBER = r"\b\d[\d.,]*\b"


def run_inspect(uri: str, *, samples: int = 2, verify: bool = True) -> dict[str, Any]:
    """Return kind, summary and further facts of a published folder, its `problems` (with `verify`) and its first rows.

    The folder of `cappy adapt` has no manifest: the facts are those of the scorers of its tasks together.

    Raises `CappyError` if nothing is published at `uri`.
    """
    uri = storage.check_uri(uri, "URI")
    if not storage.exists(storage.join(uri, artifacts.MANIFEST)) and (results := _read_adapted(uri)):
        return _inspect_adapted(uri, results, verify)
    manifest: Mapping[str, Any] = artifacts.read_any_manifest(uri, "URI")
    result = {
        "uri": uri,
        "kind": manifest["kind"],
        "created": manifest["created"],
        "code_version": manifest["code_version"],
        "summary": manifest["summary"],
        "files": len(manifest["files"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "problems": artifacts.verify(uri, manifest) if verify else [],
        "verified": verify,
    }
    if selection.FILE in manifest["files"] and not result["problems"]:
        result["selection"] = selection.summarise(selection.read(uri))
    if manifest["kind"] in ("dataset", "pairs", "answers", "scores"):
        result |= {key: manifest[key] for key in ("metric", "lineage", "schema") if key in manifest}
        result |= {key: manifest[key] for key in ("rates", "cost", "copied_from", "made_from") if key in manifest}
        if not result["problems"]:
            first = min((name for name in manifest["files"] if name.startswith("data/")), default=None)
            if first and samples and not verify:  # a damaged footer can end the process that reads it
                _verify_file(uri, first, manifest)
            try:
                result["dead_letters"] = _reasons(storage.join(uri, _DEAD_LETTERS)) if _DEAD_LETTERS in manifest["files"] else {}
                result["samples"] = []
                if first and samples:
                    result["samples"] = _first_rows(artifacts.file_uri(uri, first, manifest["files"][first]), samples)
            except (OSError, ValueError) as error:
                raise CappyError(f"{uri} is damaged ({first_line(error)}); copy or make it again") from None
    return result


def _read_adapted(uri: str) -> dict[str, Any] | None:
    """Return the `results.json` of a run of `cappy adapt` over its tasks; None for any other folder."""
    try:
        found = storage.read_json(storage.join(uri, "results.json"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"tasks", "published", "identity"} <= found.keys() else None


def _inspect_adapted(uri: str, results: Mapping[str, Any], verify: bool) -> dict[str, Any]:
    """Return the result of `run_inspect` for the folder of `cappy adapt`; `results` is its `results.json`."""
    published = adapted_index.read_published(uri, "URI")
    manifests = {each.uri: artifacts.read_manifest(each.uri, "scorer", "adapt") for each in published}
    latest = max(manifests.values(), key=lambda manifest: manifest["created"], default=None)
    found = {scorer: artifacts.verify(scorer, manifest) if verify else [] for scorer, manifest in manifests.items()}
    return {
        "uri": uri,
        "kind": "adapted",
        "created": latest["created"] if latest else None,
        "code_version": latest["code_version"] if latest else None,
        "summary": {key: value for key, value in results.items() if key != "identity"},
        "files": sum(len(manifest["files"]) for manifest in manifests.values()),
        "bytes": sum(entry["bytes"] for manifest in manifests.values() for entry in manifest["files"].values()),
        "problems": [f"{scorer.rsplit('/', 1)[-1]}: {problem}" for scorer, problems in found.items() for problem in problems],
        "verified": verify,
    }


def _verify_file(uri: str, name: str, manifest: Mapping[str, Any]) -> None:
    problems = artifacts.verify(uri, {"files": {name: manifest["files"][name]}})
    if problems:
        raise CappyError(f"{uri} is damaged ({problems[0]}); copy or make it again")


def _first_rows(shard: str, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a shard."""
    fs, path = storage.filesystem(shard)
    with fs.open_input_file(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        return list(next(parquet.iter_batches(batch_size=count)).to_pylist())


def _reasons(uri: str) -> dict[str, int]:
    """Return the number of dead letters per reason, the most frequent first. Numbers in a reason are replaced by `N`."""
    fs, path = storage.filesystem(uri)
    counts: Counter[str] = Counter()
    with fs.open_input_stream(path, compression=None) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            letter = json.loads(line)
            counts[f"{letter['stage']}: {re.sub(_NUMBER, 'N', letter['reason'])}"] += 1
    return dict(counts.most_common())
