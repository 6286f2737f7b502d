"""Compact candidate files: the sampled candidates of sets as one Parquet file without source texts, for `generate.reuse`.

    python -m generation.candidate_file OUT.parquet SET [SET ...]

A SET is a published regression set, an unfinished one (its finished units are read), or another candidate file. All must have the same
LLM. A row that is in several of them is taken from the first. The file has one line per row: the row's id and its candidates, in the
order in which they were drawn. Its metadata has the settings of the sampling. Equal inputs give equal bytes. Imports no Ray.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import artifacts, storage
from cluster.errors import CappyError, UsageError, first_line
from generation import units
from generation.dataset import RegressionSet
from generation.schema import SAMPLED

_METADATA = b"cappy.candidates"
_VERSION = 1
_SCHEMA = pa.schema([pa.field("id", pa.binary(16), nullable=False), pa.field("candidates", SAMPLED, nullable=False)])
_FIELDS = SAMPLED.value_type.names
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class SampledRows:
    """The sampled rows of a set or of a candidate file."""

    uri: str
    model: str
    """The LLM, as in `sampler.model`."""
    settings: list[dict[str, Any]]
    """The settings of the sampling of each set: seed, prompt and decodings."""
    rows: Iterator[tuple[str, list[dict[str, Any]]]]
    """The id and the candidates (fields of `schema.SAMPLED`) of each row with sampled candidates."""


def open_sampled(uri: str, setting: str, model: str | None = None) -> SampledRows:
    """Open a published set or a candidate file (`*.parquet`). Of a set with several LLMs the candidates of `model` are read, if it has any.

    Raises `CappyError` naming `setting` if it is neither. Reading the rows raises `CappyError` if a file is damaged.
    """
    if uri.endswith(".parquet"):
        return _open_file(storage.check_uri(uri, setting), setting)
    if not storage.exists(storage.join(storage.check_uri(uri, setting), artifacts.MANIFEST)):
        raise CappyError(f"{setting}={uri} is not a published set; give its folder, or a candidate file (*.parquet)")
    opened = RegressionSet(uri, setting)
    sampler = opened.manifest["config"]["sampler"]
    records = opened.manifest.get("sampling") or [{**sampler, "seed": opened.manifest["config"]["seed"]}]
    llm: str = sampler["model"]
    if model is not None and any(each["model"] == model for each in records):
        llm = model
    tables = (table for split in opened.manifest["counts"] for table in opened.batches(split, _BATCH_ROWS, ["id", "candidates"]))
    settings = [_describe(each, each["seed"]) for each in records if each["model"] == llm]
    return SampledRows(opened.uri, llm, settings, _sampled_rows(tables, llm))


def write_candidate_file(out: str, sets: Sequence[str]) -> dict[str, Any]:
    """Write the sampled candidates of `sets` to the file `out`; return its counts.

    Raises `UsageError` if the sets have different LLMs or `out` is not a Parquet path, and `CappyError` if a set cannot be read.
    """
    if not out.endswith(".parquet"):
        raise UsageError(f"OUT={out}: a candidate file must end with .parquet; rename it")
    opened = [_open_unfinished(uri) or open_sampled(uri, "SET") for uri in sets]
    models = {each.model for each in opened}
    if len(models) != 1:
        raise UsageError(f"SET: the sets have candidates of {', '.join(sorted(models))}; write one file for each LLM")
    found: dict[bytes, list[dict[str, Any]]] = {}
    for each in opened:
        for row_id, candidates in each.rows:
            found.setdefault(bytes.fromhex(row_id), candidates)
    header = {
        "version": _VERSION,
        "model": models.pop(),
        "sets": list({json.dumps(settings, sort_keys=True): settings for each in opened for settings in each.settings}.values()),
    }
    table = pa.table([pa.array(list(found), pa.binary(16)), pa.array(list(found.values()), SAMPLED)], schema=_SCHEMA)
    table = table.replace_schema_metadata({_METADATA: json.dumps(header, ensure_ascii=False).encode()})
    path = "candidates.list.element."
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=19,
        use_dictionary=[f"{path}{name}" for name in ("decoding", "finish_reason", "tokens", "response")],
        column_encoding={f"{path}logprob": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,
    )
    storage.write_bytes(storage.check_uri(out, "OUT"), sink.getvalue())
    return {"uri": out, "rows": len(found), "candidates": sum(map(len, found.values())), "bytes": len(sink.getvalue())}


def _open_file(uri: str, setting: str) -> SampledRows:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), page_checksum_verification=True)
        header = json.loads((table.schema.metadata or {})[_METADATA])
        rows = table.select(_SCHEMA.names).cast(_SCHEMA)
    except FileNotFoundError:
        raise CappyError(f"{setting}={uri}: no such file; write it with `python -m generation.candidate_file`") from None
    except KeyError:
        raise CappyError(f"{setting}={uri} is not a candidate file; write one with `python -m generation.candidate_file`") from None
    except (OSError, ValueError) as error:
        raise CappyError(f"{setting}={uri} is damaged ({first_line(error)}); copy or write it again") from None
    if header["version"] != _VERSION:
        raise CappyError(f"{setting}={uri} has format version {header['version']}, and this code reads {_VERSION}; use newer code")
    return SampledRows(uri, header["model"], header["sets"], ((row["id"].hex(), row["candidates"]) for row in _iterate_rows([rows])))


def _open_unfinished(uri: str) -> SampledRows | None:
    """Open the finished units of a set without a manifest; return None if there are none."""
    staging = storage.join(uri, "_staging")
    if uri.endswith(".parquet") or storage.exists(storage.join(uri, artifacts.MANIFEST)) or not storage.exists(f"{staging}/run.json"):
        return None
    started = storage.read_json(f"{staging}/run.json")["settings"]
    names = sorted(name for name in storage.list_files(storage.join(staging, "units")) if name.endswith(".parquet"))
    tables = (units.read_unit(storage.join(staging, "units", name)).select(["id", "candidates"]) for name in names)
    model = started["sampler"]["model"]
    return SampledRows(uri, model, [_describe(started["sampler"], started["seed"])], _sampled_rows(tables, model))


def _describe(sampler: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"seed": seed, "prompt": sampler["prompt"], "decodings": sampler["decodings"]}


def _sampled_rows(tables: Iterator[pa.Table], model: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for row in _iterate_rows(tables):
        sampled = [
            {name: each[name] for name in _FIELDS} for each in row["candidates"] if each["source"] == "sampled" and each["model"] == model
        ]
        if sampled:
            yield row["id"], sampled


def _iterate_rows(tables: Any) -> Iterator[dict[str, Any]]:
    for table in tables:
        for batch in table.to_batches(_BATCH_ROWS):
            yield from batch.to_pylist()


def main() -> None:
    """Parse the arguments, write the file and print its counts as JSON."""
    parser = argparse.ArgumentParser(prog="python -m generation.candidate_file", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", metavar="OUT.parquet", help="the file to write")
    parser.add_argument("sets", metavar="SET", nargs="+", help="a published or unfinished set, or a candidate file")
    arguments = parser.parse_args()
    try:
        print(json.dumps(write_candidate_file(arguments.out, arguments.sets)))
    except CappyError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
