"""The settings with which the candidates of a set were sampled, one record for each LLM and group of decodings. Reads no files.

A record has `seed`, and the keys of `SamplerConfig.result_settings`: `model`, `prompt`, `engine`, `decodings`, .... The manifest of an
extended or combined set has its records as `sampling`. The config of any other set is its only record.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cluster.config import Config, SamplerConfig, differences
from cluster.errors import CappyError, UsageError

# The address of a server, and limits that reject a prompt, do not change a candidate.
_NOT_DECISIVE = ("base_url", "max_model_len", "max_prompt_tokens")


def of_config(config: Config) -> dict[str, Any]:
    """Return the record of a run with this config."""
    return {"seed": config.seed, **config.sampler.result_settings()}


def of_manifest(manifest: Mapping[str, Any], uri: str) -> list[dict[str, Any]]:
    """Return the records of a published set. Raises `CappyError` if another version wrote settings that this code cannot read."""
    if "sampling" in manifest:
        return list(manifest["sampling"])
    tree = manifest["config"]
    try:
        return [{"seed": tree["seed"], **SamplerConfig.model_validate(tree["sampler"]).result_settings()}]
    except ValidationError as error:
        raise CappyError(
            f"{uri}: the settings of its sampler cannot be read ({error.errors()[0]['msg']}); use the code that wrote it"
        ) from None


def unite_records(sets: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the different records of several sets, in order."""
    united: list[dict[str, Any]] = []
    for record in itertools.chain.from_iterable(sets):
        if record not in united:
            united.append(dict(record))
    return united


def unite_decodings(sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the decodings of several sets, each name once with its largest `n`; `sets` has the decodings of each set by its URI.

    Raises `UsageError` if two sets have a decoding with the same name and other settings.
    """
    united: dict[str, tuple[str, dict[str, Any]]] = {}
    for uri, decodings in sets.items():
        for each in decodings:
            first, known = united.setdefault(each["name"], (uri, dict(each)))
            if changes := differences({**known, "n": 0}, {**each, "n": 0}):
                raise UsageError(
                    f"the decoding {each['name']!r} has other settings in {uri} than in {first} ({'; '.join(changes)}), and an evaluation "
                    f"finds the settings by the name; generate one of the sets with another name"
                )
            known["n"] = max(known["n"], each["n"])
    return [known for _, known in united.values()]


def drawn_candidates(records: Sequence[Mapping[str, Any]], model: str) -> dict[str, int]:
    """Return the number of candidates that each decoding of an LLM drew for a row, by the name of the decoding."""
    return {each["name"]: each["n"] for record in records if record["model"] == model for each in record["decodings"]}


def refuse_other_settings(records: Sequence[Mapping[str, Any]], config: Config, uri: str) -> None:
    """Raise `UsageError` if the LLM of `config` sampled one of its decodings with other settings for the set at `uri`.

    `n` may grow, except for a beam search, whose candidates cannot be continued.
    """
    now = of_config(config)
    for record in records:
        for decoding in record["decodings"] if record["model"] == now["model"] else ():
            new = next((each for each in now["decodings"] if each["name"] == decoding["name"]), None)
            if new is None:
                continue
            changes = differences(_decisive(record, decoding), _decisive(now, new))
            if new["beams"] > 1 and new["n"] > decoding["n"]:
                changes.append(f"n: {decoding['n']} -> {new['n']} with beams={new['beams']}")
            if changes:
                raise UsageError(
                    f"sampler.decodings: {uri} has candidates of {now['model']} with decoding {decoding['name']!r} and other settings "
                    f"({'; '.join(changes)}); give the decoding another name, or use the same settings"
                )


def merge_records(records: Sequence[Mapping[str, Any]], config: Config) -> list[dict[str, Any]]:
    """Return the records of a set with the candidates of `records` and of a run with `config`; the record of the run is first."""
    now = of_config(config)
    drawn = drawn_candidates(records, now["model"])
    now["decodings"] = [{**each, "n": max(each["n"], drawn.get(each["name"], 0))} for each in now["decodings"]]
    names = {each["name"] for each in now["decodings"]}
    kept = []
    for record in records:
        decodings = [each for each in record["decodings"] if record["model"] != now["model"] or each["name"] not in names]
        if decodings:
            kept.append({**record, "decodings": decodings})
    return [now, *kept]


def _decisive(record: Mapping[str, Any], decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the candidates of one decoding, apart from their number."""
    engine = {name: value for name, value in record["engine"].items() if name not in _NOT_DECISIVE}
    kept = {name: value for name, value in decoding.items() if name not in ("name", "n")}
    return {name: value for name, value in record.items() if name not in ("model", "decodings")} | {"engine": engine} | kept
