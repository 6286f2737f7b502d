"""`cappy generate`: the Ray Data plan from a source to a published regression set.

The work is cut into units of `generate.unit_rows` instructions. Below `{dataset}/_staging` stand

- `run.json`: the settings that decide the result; a run with others refuses to go on;
- `prepared/{split}-{number}.parquet`: a unit before sampling, `prepared.json` once all are there;
- `units/{split}-{number}.parquet`: a unit done, one object written at once, so that it is there whole or not at all.

Finished units are never sampled again: started again after any interruption the run goes on where it was. At the end the
units are merged into shards and the manifest is written, last; before that no reader accepts the folder.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import models, storage
from cluster.config import Config, differences, fingerprint
from cluster.errors import CappyError, UsageError
from cluster.progress import Bar, say
from cluster.runtime import code_version, ray_session
from generation import annotate, dataset, instructions
from generation.instructions import DeadLetter
from generation.sampler import LoadLLM, Sampler, load_engine
from generation.schema import DATASET, PREPARED, SPLITS

_DEAD_LETTERS = b"cappy.dead_letters"
_ROW_GROUP_ROWS = 8192
# Rows after which the share of dead letters says something about the whole run.
_ERROR_RATE_ROWS = 200


def run(config: Config, *, overwrite: bool = False, load: LoadLLM = load_engine) -> dict[str, Any]:
    """Sample, label and publish the regression set; return its summary. `load` makes each sampling actor's LLM.

    Raises `UsageError` when the destination holds a finished run or one begun with other settings, `CappyError` when too
    many rows fail.
    """
    start = time.monotonic()
    uri = storage.check(config.dataset_uri, "dataset")
    if overwrite:
        storage.withdraw(uri)
    storage.refuse_published(uri, "dataset", "generate")
    models.check(config.sampler.model, "sampler.model")
    staging = storage.join(uri, "_staging")
    _claim(staging, config)
    prepared = _prepare(staging, config)
    with ray_session():
        _sample(staging, prepared, config, load)
        say("merging units into shards")
        shards = _merge(uri, staging, config)
    sampled_badly = sum(len(shard["dead_letters"]) for shard in shards)
    _stop_above_error_rate(prepared["dead_letters"] + sampled_badly, prepared["dead_letters"] + prepared["rows"], config)
    return _publish(uri, staging, shards, config, time.monotonic() - start)


def identity(config: Config) -> dict[str, Any]:
    """The settings that decide the set's content, as a plain tree; the others (replicas, sizes) may change on resume."""
    tree = config.model_dump(mode="json")
    sampler = {key: tree["sampler"][key] for key in ("model", "prompt", "decodings")}
    engine = {key: tree["sampler"]["engine"][key] for key in ("dtype", "max_model_len")}
    generate = {key: tree["generate"][key] for key in ("mismatched", "hard_mismatched", "unit_rows")}
    source = {key: tree[key] for key in ("source", "decontaminate")}
    return {"seed": config.seed, **source, "sampler": {**sampler, "engine": engine}, "generate": generate}


def _claim(staging: str, config: Config) -> None:
    """Write down what this destination is being made from, or check that it is the same as before."""
    mine = identity(config)
    place = storage.join(staging, "run.json")
    if storage.create_json(place, {"fingerprint": fingerprint(mine), "settings": mine}):
        return
    begun = storage.read_json(place)
    if begun["fingerprint"] != fingerprint(mine):
        changes = "; ".join(differences(begun["settings"], mine))
        raise UsageError(
            f"dataset={staging.removesuffix('/_staging')} was begun with other settings ({changes}); "
            f"set them back to go on, choose another dataset, or start afresh with --overwrite"
        )


def _prepare(staging: str, config: Config) -> dict[str, Any]:
    """Write the units before sampling, unless an earlier run did; return their counts."""
    place = storage.join(staging, "prepared.json")
    if storage.exists(place):
        return dict(storage.read_json(place))
    say(f"reading instructions from {describe_source(config)}")
    waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    numbers = dict.fromkeys(SPLITS, 0)
    counts = dict.fromkeys(SPLITS, 0)
    letters: list[str] = []

    def flush(split: str) -> None:
        table = pa.Table.from_pylist(waiting[split], PREPARED)
        storage.write_bytes(_unit(staging, "prepared", f"{split}-{numbers[split]:06d}"), _parquet(table))
        numbers[split] += 1
        waiting[split].clear()

    evaluation = instructions.contamination(config)
    for each in instructions.prepared(config, evaluation):
        if isinstance(each, DeadLetter):
            letters.append(each.to_json())
            continue
        split, row = each
        waiting[split].append(row)
        counts[split] += 1
        if len(waiting[split]) == config.generate.unit_rows:
            flush(split)
    for split in SPLITS:
        if waiting[split]:
            flush(split)
    storage.write_bytes(storage.join(staging, "prepared", "dead_letters.jsonl"), "".join(f"{line}\n" for line in letters).encode())
    _stop_above_error_rate(len(letters), len(letters) + sum(counts.values()), config)
    storage.write_json(storage.join(staging, "prepared", "decontamination.json"), evaluation.report())
    result = {"units": numbers, "counts": counts, "rows": sum(counts.values()), "dead_letters": len(letters)}
    storage.write_json(place, result)
    return result


def describe_source(config: Config) -> str:
    """One phrase for where the instructions come from."""
    source = config.source
    if source.kind == "mixture":
        return f"a mixture of {len(source.parts)} sources"
    return f"BIG-bench ({', '.join(source.tasks)})" if source.kind == "bigbench" else instructions.part_name(source)


def _sample(staging: str, prepared: dict[str, Any], config: Config, load: LoadLLM) -> None:
    """Run every unit that is not done yet through sampling and labelling."""
    names = [f"{split}-{number:06d}" for split in SPLITS for number in range(prepared["units"][split])]
    finished = {name.removesuffix(".parquet") for name in storage.list_files(storage.join(staging, "units"))}
    pending = [name for name in names if name not in finished]
    size = config.generate.unit_rows
    total = prepared["rows"]
    done = total - _rows(pending, prepared, size)
    if finished:
        say(f"{len(finished)} of {len(names)} units are done already; going on")
    if not pending:
        return
    say(f"starting {config.sampler.model} on vLLM, {config.sampler.replicas} replica(s)")
    failed = 0
    with Bar("sampling", total, "instructions", done=done) as bar:
        for result in plan(staging, pending, config, load).iter_rows():
            failed += result["dead_letters"]
            bar.advance(
                result["rows"], note=f"{failed} dead letters" if failed else "", candidates=result["candidates"], tokens=result["tokens"]
            )
            if bar.done - done >= _ERROR_RATE_ROWS:
                _stop_above_error_rate(failed, bar.done - done, config)


def plan(staging: str, units: Sequence[str], config: Config, load: LoadLLM = load_engine) -> Any:
    """Return the Ray Data plan: a row a unit in, a row a finished unit out (`unit`, `rows`, `candidates`, `tokens`, `dead_letters`)."""
    import ray.data

    # Its own bars would stand beside ours; it sets its logger up on import, so this comes after.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    gpus = config.sampler.engine.tensor_parallel if ray.cluster_resources().get("GPU", 0) else 0
    return (
        ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        .map_batches(_read_unit, fn_kwargs={"staging": staging}, batch_size=1, batch_format="pyarrow")
        .map_batches(
            Sampler,
            fn_constructor_args=(config.sampler, config.seed, load),
            batch_size=None,
            batch_format="pyarrow",
            # Several units at once in an actor, so that one unit's tail does not leave the engine idle.
            compute=ray.data.ActorPoolStrategy(
                size=config.sampler.replicas, max_concurrent_calls_per_actor=4, max_tasks_in_flight_per_actor=8
            ),
            num_gpus=gpus,
            num_cpus=1,
        )
        .map_batches(
            _save_unit,
            fn_kwargs={"staging": staging, "model": config.sampler.model},
            batch_size=None,
            batch_format="pyarrow",
        )
    )


def _read_unit(batch: pa.Table, staging: str) -> pa.Table:
    """The rows of one unit before sampling, each with the unit's name and size."""
    (unit,) = batch["unit"].to_pylist()
    table = pq.read_table(io.BytesIO(storage.read_bytes(_unit(staging, "prepared", unit))))
    return table.append_column("unit", pa.array([unit] * len(table))).append_column("unit_rows", pa.array([len(table)] * len(table)))


def _save_unit(batch: pa.Table, staging: str, model: str) -> pa.Table:
    """Label a sampled unit and save it as one object; return its counts."""
    unit, size = batch["unit"][0].as_py(), batch["unit_rows"][0].as_py()
    if set(batch["unit"].to_pylist()) != {unit} or len(batch) != size:
        raise CappyError(f"unit {unit} of {size} rows came as {len(batch)} rows; a block was cut or merged on its way")
    rows, letters = label(batch.to_pylist(), model)
    table = pa.Table.from_pylist(rows, DATASET)
    storage.write_bytes(
        _unit(staging, "units", unit),
        _parquet(table.replace_schema_metadata({_DEAD_LETTERS: json.dumps(letters).encode()})),
    )
    sampled = [candidate for row in rows for candidate in row["candidates"] if candidate["source"] == "sampled"]
    return pa.table(
        {
            "unit": [unit],
            "rows": [size],
            "candidates": [len(sampled)],
            "tokens": [sum(candidate["tokens"] for candidate in sampled)],
            "dead_letters": [len(letters)],
        }
    )


def label(rows: Sequence[dict[str, Any]], model: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a sampled unit with their candidates labelled (columns of `schema.DATASET`), and its dead letters."""
    done, letters = [], []
    for row in rows:
        plain = {name: row[name] for name in DATASET.names if name != "candidates"}
        if row["error"] is not None:
            text = json.dumps(plain, ensure_ascii=False)[:500]
            letters.append(DeadLetter(where=row["id"], stage="sample", reason=row["error"], row=text).to_json())
        else:
            done.append({**plain, "candidates": annotate.assemble(row, row["sampled"], model)})
    return done, letters


def _stop_above_error_rate(letters: int, rows: int, config: Config) -> None:
    """Raise `CappyError` when more than `generate.max_error_rate` of `rows` rows went to the dead-letter file."""
    if rows and letters / rows > config.generate.max_error_rate:
        raise CappyError(
            f"{letters} of {rows} rows failed, above generate.max_error_rate={config.generate.max_error_rate}; "
            f"the reasons stand below {config.dataset_uri}/_staging: mend the source or raise the rate"
        )


def _merge(uri: str, staging: str, config: Config) -> list[dict[str, Any]]:
    """Merge the finished units into shards, each a Ray task; return per shard its name, size, hash and statistics."""
    import ray

    storage.delete(storage.join(uri, "data"))
    sizes = storage.list_files(storage.join(staging, "units"))
    merge = ray.remote(num_cpus=1)(_write_shard)
    tasks = []
    for split in SPLITS:
        units = {storage.join(staging, "units", name): size for name, size in sizes.items() if name.startswith(f"{split}-")}
        for number, shard in enumerate(fill(units, config.generate.shard_mib << 20)):
            tasks.append(merge.remote(shard, uri, f"data/{split}/part-{number:05d}.parquet"))
    return list(ray.get(tasks))


def fill(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Cut names in order into groups whose sizes (bytes) add up to at most `limit`; a larger one stands alone."""
    group: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


def _write_shard(units: list[str], uri: str, name: str) -> dict[str, Any]:
    statistics: dict[str, Any] = {}
    letters: list[str] = []
    with tempfile.TemporaryDirectory(prefix="cappy-shard-") as folder:
        file = Path(folder, "shard.parquet")
        with pq.ParquetWriter(file, DATASET, compression="zstd", write_page_checksum=True) as writer:
            waiting: list[pa.Table] = []
            for unit in units:
                table = pq.read_table(io.BytesIO(storage.read_bytes(unit)), page_checksum_verification=True)
                letters += json.loads((table.schema.metadata or {}).get(_DEAD_LETTERS, b"[]"))
                statistics = dataset.add_statistics(statistics, dataset.statistics(table))
                waiting.append(table.replace_schema_metadata(None).cast(DATASET))
                if sum(map(len, waiting)) >= _ROW_GROUP_ROWS:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
        entry = {"bytes": file.stat().st_size, "sha256": storage.sha256(str(file)), "rows": statistics["instructions"]}
        storage.upload_file(file, storage.join(uri, name))
    return {"name": name, "entry": entry, "statistics": statistics, "dead_letters": letters}


def _publish(uri: str, staging: str, shards: list[dict[str, Any]], config: Config, seconds: float) -> dict[str, Any]:
    letters = storage.read_bytes(storage.join(staging, "prepared", "dead_letters.jsonl")).decode()
    letters += "".join(f"{line}\n" for shard in shards for line in shard["dead_letters"])
    storage.write_bytes(storage.join(uri, "dead_letters.jsonl"), letters.encode())
    storage.write_bytes(storage.join(uri, "config.yaml"), config.to_yaml().encode())
    overlap = storage.read_json(storage.join(staging, "prepared", "decontamination.json"))
    storage.write_json(storage.join(uri, "decontamination.json"), overlap)
    counts: dict[str, Any] = {}
    total: dict[str, Any] = {}
    for shard in shards:
        split = shard["name"].split("/")[1]
        part = {key: shard["statistics"][key] for key in ("instructions", "pairs")}
        counts[split] = dataset.add_statistics(counts.get(split, {}), part)
        total = dataset.add_statistics(total, shard["statistics"])
    if not total.get("instructions"):
        raise CappyError(f"{uri}: every row failed, nothing is published; the reasons are in {uri}/dead_letters.jsonl")
    files = {shard["name"]: shard["entry"] for shard in shards} | storage.checksums(
        uri, ["config.yaml", "dead_letters.jsonl", "decontamination.json"]
    )
    left_out = {"dead_letters": letters.count("\n"), "decontaminated": overlap["train_rows_left_out"]}
    summary = {"uri": uri, **total, "splits": counts, **left_out, "seconds": round(seconds, 1)}
    storage.publish(
        uri,
        {
            "kind": "dataset",
            "version": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": code_version(),
            "counts": counts,
            "summary": summary,
            "schema": {field.name: str(field.type) for field in DATASET},
            "metric": annotate.METRIC,
            "lineage": identity(config),
            "config": config.model_dump(mode="json"),
            "files": files,
        },
    )
    storage.delete(staging)
    return summary


def _unit(staging: str, folder: str, unit: str) -> str:
    return storage.join(staging, folder, f"{unit}.parquet")


def _rows(units: Sequence[str], prepared: dict[str, Any], size: int) -> int:
    """Instructions in some of the units: all hold `size` but the last of each split."""
    last = {
        f"{split}-{number - 1:06d}": prepared["counts"][split] - (number - 1) * size
        for split, number in prepared["units"].items()
        if number
    }
    return sum(last.get(unit, size) for unit in units)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
