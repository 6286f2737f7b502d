"""`cappy generate`: the Ray Data plan from a source to a published regression set.

The work is cut into units of `generate.unit_rows` instructions. Below `{dataset}/_staging` stand

- `run.json`: the settings that decide the result; a run with others refuses to go on;
- `prepared/{split}-{number}.parquet`: a unit before sampling, `prepared.json` once all are there;
- `units/{split}-{number}.parquet`: a unit done, one object written at once, so that it is there whole or not at all.

Finished units are never sampled again: started again after any interruption the run goes on where it was. At the end the
units are merged into shards and the manifest is written, last; before that no reader accepts the folder. `_lease` keeps a
second run away: a run that lost it stops before it deletes or publishes anything. On SIGTERM the units in flight end, and
nothing else starts.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster import artifacts, folder_writer, lease, storage
from cluster.config import Config, differences, fingerprint
from cluster.errors import CappyError, Stopped, UsageError
from cluster.lease import Lease, LeaseLost
from cluster.progress import Bar, log
from cluster.runtime import code_version, on_sigterm, ray_session
from generation import dataset, dataset_card, engines, few_shot, labels, prometheus, shards, units
from generation.prometheus import GenerateMetrics
from generation.sampler import LoadLLM
from generation.schema import DATASET, PREPARED, SPLITS
from generation.sources import reader
from generation.sources.row import DeadLetter

# Rows after which the share of dead letters says something about the whole run.
_ERROR_RATE_ROWS = 200
# Blocks a plan is cut into at most: Ray Data's books in the driver grow with them, not with the rows.
_BLOCKS = 1000
_LEASE = "_lease"
_OWNED = artifacts.OwnedFiles("dataset", "generate", dataset.WORKING_FILES, r"_staging/(units|letters)/.+", dataset.RESULT_FILES)


def run_generate(config: Config, *, overwrite: bool = False, load: LoadLLM = engines.load_engine) -> dict[str, Any]:
    """Sample, label and publish the regression set; return its summary. `load` makes each sampling actor's LLM.

    Raises `UsageError` when the destination holds a finished run or one begun with other settings, `CappyError` when too
    many rows fail or another run is at work there, `Stopped` on SIGTERM.
    """
    start = time.monotonic()
    uri = storage.check_uri(config.dataset_uri, "dataset")
    if not overwrite:
        artifacts.refuse_published(uri, "dataset", "generate")
    artifacts.refuse_foreign(uri, "dataset", _OWNED, overwrite=overwrite)
    engines.check_sampler_config(config.sampler)
    with prometheus.serve_metrics(config.generate) as progress, lease.hold(storage.join(uri, _LEASE), f"dataset={uri}") as held:
        if overwrite:
            artifacts.withdraw(uri, "dataset", _OWNED, keep=_LEASE, check=held.check)
        artifacts.finish_withdrawal(uri, "dataset", _OWNED, keep=_LEASE, check=held.check)
        artifacts.refuse_published(uri, "dataset", "generate")
        artifacts.refuse_foreign(uri, "dataset", _OWNED, overwrite=False)
        staging = storage.join(uri, "_staging")
        held.check()
        _claim_destination(staging, config)
        prepared = _prepare(staging, config, held)
        stages = {"reading": time.monotonic() - start}
        try:
            with ray_session():
                rates = _sample(staging, prepared, config, load, held, progress)
                stages["sampling"] = time.monotonic() - start - sum(stages.values())
                merged = _merge(uri, staging, prepared, config, held)
                stages["merging"] = time.monotonic() - start - sum(stages.values())
            summary = _publish(uri, staging, merged, rates, config, stages, held)
        except LeaseLost:
            shards.remove_own(uri, held.run)
            raise
        held.finish()
    return summary


def result_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the set's content, as a plain tree; the others (replicas, sizes) may change on resume."""
    tree = config.model_dump(mode="json")
    sampler = {key: tree["sampler"][key] for key in ("model", "prompt", "decodings")}
    engine = {key: tree["sampler"]["engine"][key] for key in config.sampler.engine.decides}
    generate = {key: tree["generate"][key] for key in ("mismatched", "hard_mismatched", "max_per_bin", "unit_rows")}
    generate["label"] = labels.describe_metric(config.generate.label)
    source = {key: tree[key] for key in ("source", "decontaminate")}
    return {"seed": config.seed, **source, "sampler": {**sampler, "engine": engine}, "generate": generate}


def _claim_destination(staging: str, config: Config) -> None:
    """Write down what this destination is being made from, or check that it is the same as before."""
    mine = result_settings(config)
    place = storage.join(staging, "run.json")
    if storage.create_json(place, {"fingerprint": fingerprint(mine), "settings": mine}):
        return
    begun = storage.read_json(place)
    if begun["fingerprint"] != fingerprint(mine):
        if not storage.exists(storage.join(staging, "prepared.json")):  # e.g. its source could not be read: nothing is lost
            storage.write_json(place, {"fingerprint": fingerprint(mine), "settings": mine})
            return
        changes = "; ".join(differences(begun["settings"], mine))
        raise UsageError(
            f"dataset={staging.removesuffix('/_staging')} was begun with other settings ({changes}); "
            f"set them back to go on, choose another dataset, or start afresh with --overwrite"
        )


def _prepare(staging: str, config: Config, held: Lease) -> dict[str, Any]:
    """Write the units before sampling, unless an earlier run did; return their counts."""
    place = storage.join(staging, "prepared.json")
    if storage.exists(place):
        return dict(storage.read_json(place))
    waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    numbers = dict.fromkeys(SPLITS, 0)
    counts = dict.fromkeys(SPLITS, 0)
    failed = 0

    def flush(split: str) -> None:
        held.check(look=False)
        units.write_unit(
            units.unit_uri(staging, "prepared", f"{split}-{numbers[split]:06d}"), pa.Table.from_pylist(waiting[split], PREPARED)
        )
        numbers[split] += 1
        counts[split] += len(waiting[split])
        bar.advance(len(waiting[split]), note=f"{failed} dead letters" if failed else "")
        waiting[split].clear()

    with _dead_letter_file() as letters, Bar(f"reading {describe_source(config)}", None, "instructions") as bar:
        evaluation = few_shot.load_contamination(config)
        for each in few_shot.prepare_rows(config, evaluation):
            if isinstance(each, DeadLetter):
                letters.write(each.to_json() + "\n")
                failed += 1
                continue
            split, row = each
            waiting[split].append(row)
            if len(waiting[split]) == config.generate.unit_rows:
                flush(split)
        for split in SPLITS:
            if waiting[split]:
                flush(split)
        letters.flush()
        held.check()
        storage.upload_file(Path(letters.name), storage.join(staging, "prepared", "dead_letters.jsonl"))
    _check_error_rate(failed, failed + sum(counts.values()), config)
    storage.write_json(storage.join(staging, "prepared", "decontamination.json"), evaluation.report())
    result = {"units": numbers, "counts": counts, "rows": sum(counts.values()), "dead_letters": failed}
    held.check()
    storage.write_json(place, result)
    return result


def _dead_letter_file() -> Any:
    """A local file for dead letters on their way to the destination: there may be too many to hold."""
    return tempfile.NamedTemporaryFile("w+", prefix="cappy-dead-letters-", suffix=".jsonl", encoding="utf-8")


def describe_source(config: Config) -> str:
    """One phrase for where the instructions come from."""
    source = config.source
    if source.kind == "mixture":
        return f"a mixture of {len(source.parts)} sources"
    return f"BIG-bench ({', '.join(source.tasks)})" if source.kind == "bigbench" else reader.part_name(source)


def _unit_names(prepared: dict[str, Any]) -> list[str]:
    return [f"{split}-{number:06d}" for split in SPLITS for number in range(prepared["units"][split])]


def _sample(
    staging: str, prepared: dict[str, Any], config: Config, load: LoadLLM, held: Lease, progress: GenerateMetrics
) -> dict[str, Any]:
    """Run every unit that is not done yet through sampling and labelling; return the rates of what was sampled."""
    names = _unit_names(prepared)
    finished = {name.removesuffix(".parquet") for name in storage.list_files(storage.join(staging, "units"))}
    pending = [name for name in names if name not in finished]
    total = prepared["rows"]
    done = total - _count_rows(pending, prepared, config.generate.unit_rows)
    progress.start(total, done)
    if finished:
        log(f"{len(finished)} of {len(names)} units are done already; going on")
    if not pending:
        return {}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    log(f"starting {config.sampler.model} on {config.sampler.engine.kind}, {config.sampler.replicas} replica(s)")
    ceiling = engines.cost_limit(config.sampler)
    spent = units.dollars_spent(staging, sorted(finished)) if ceiling is not None else 0.0
    # Beside the driver: on a worker node it would be lost with it, and the run with the gate.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    gate = ray.remote(num_cpus=0, scheduling_strategy=here)(units.BudgetGate).remote(ceiling, spent)
    failed = 0
    closing = on_sigterm("finishing the units in flight; the same command goes on afterwards", gate.close.remote)
    with closing as told, Bar("sampling", total, "instructions", done=done) as bar:
        for result in build_plan(staging, pending, config, load, gate).iter_rows():
            held.check(look=False)
            failed += result["dead_letters"]
            spent += result["cost"]
            progress.add(result)
            note = "  ".join([f"{failed} dead letters"] * bool(failed) + [f"${spent:,.4f}"] * bool(spent))
            bar.advance(result["rows"], note=note, candidates=result["candidates"], tokens=result["tokens"])
            if bar.done - done >= _ERROR_RATE_ROWS:
                _check_error_rate(failed, bar.done - done, config)
        state = f"{bar.done:,} of {total:,} instructions are done and saved"
        if told.is_set():
            raise Stopped(f"stopped on SIGTERM; {state}, the same command goes on")
        if ray.get(gate.exhausted.remote()):
            raise CappyError(
                f"sampler.engine.max_cost={ceiling:g}: the next unit of work could pass it, so none was begun (${spent:,.4f} spent); "
                f"{state}, with a higher max_cost the same command goes on"
            )
        return {f"{name}_per_second": rate for name, rate in bar.rates().items()}


def build_plan(staging: str, names: Sequence[str], config: Config, load: LoadLLM, gate: Any) -> Any:
    """Return the Ray Data plan: names of units in, a row a finished unit out (`units.COUNTS`)."""
    import ray.data

    # Its own bars would stand beside ours; it sets its logger up on import, so this comes after.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.from_items([{"unit": name} for name in names], override_num_blocks=min(len(names), _BLOCKS)).map_batches(
        units.UnitWorker,
        fn_constructor_args=(staging, config, load, gate),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.sampler.replicas, max_concurrent_calls_per_actor=4, max_tasks_in_flight_per_actor=8),
        **engines.actor_resources(config.sampler, ray.cluster_resources().get("GPU", 0)),
    )


def _check_error_rate(letters: int, rows: int, config: Config) -> None:
    """Raise `CappyError` when more than `generate.max_error_rate` of `rows` rows went to the dead-letter file."""
    if rows and letters / rows > config.generate.max_error_rate:
        raise CappyError(
            f"{letters} of {rows} rows failed, above generate.max_error_rate={config.generate.max_error_rate}; "
            f"the reasons stand below {config.dataset_uri}/_staging: mend the source or raise the rate"
        )


def _merge(uri: str, staging: str, prepared: dict[str, Any], config: Config, held: Lease) -> dict[str, Any]:
    """Merge the finished units into shards, each a Ray task; return each shard's `entry`, `statistics` and `letters` by name."""
    import ray

    held.check()
    sizes = storage.list_files(storage.join(staging, "units"))
    merge = ray.remote(num_cpus=1)(shards.write_shard)
    tasks: dict[Any, str] = {}
    for split in SPLITS:
        # Named by what was prepared: a listing may lack one, and that must be noticed.
        mine = {name: sizes.get(f"{name}.parquet", 0) for name in _unit_names(prepared) if name.startswith(f"{split}-")}
        for number, names in enumerate(shards.group_by_size(mine, config.generate.shard_mib << 20)):
            name = shards.shard_path(split, number, held.run)
            target = storage.join(uri, name)
            tasks[merge.remote(names, staging, target, config.generate.row_group_rows, held.claim.check)] = name
    merged: dict[str, Any] = {}
    pending = list(tasks)
    with Bar("merging units into shards", len(tasks), "shards") as bar:
        while pending:
            ready, pending = ray.wait(pending)
            for task in ready:
                merged[tasks[task]] = ray.get(task)
                bar.advance()
    rows = sum(shard["entry"]["rows"] + shard["letters"] for shard in merged.values())
    if rows != prepared["rows"]:
        raise CappyError(f"{uri}: {prepared['rows']} instructions were prepared, the units hold {rows}; generate it again with --overwrite")
    sampled_badly = sum(shard["letters"] for shard in merged.values())
    _check_error_rate(prepared["dead_letters"] + sampled_badly, prepared["dead_letters"] + prepared["rows"], config)
    return dict(sorted(merged.items()))


def _publish(
    uri: str, staging: str, merged: dict[str, Any], rates: dict[str, Any], config: Config, stages: dict[str, float], held: Lease
) -> dict[str, Any]:
    """Write what stands beside the shards, then the manifest; `stages`: seconds each took, start-up of Ray and the LLM included."""
    counts: dict[str, Any] = {}
    total: dict[str, Any] = {}
    for name, shard in merged.items():
        split = name.split("/")[1]
        part = {key: shard["statistics"][key] for key in ("instructions", "pairs")}
        counts[split] = dataset.add_statistics(counts.get(split, {}), part)
        total = dataset.add_statistics(total, shard["statistics"])
    if not total.get("instructions"):
        raise CappyError(f"{uri}: every row failed, nothing is published; the reasons stand below {staging}")
    dead_letters = 0
    folder = folder_writer.FolderWriter(uri, held.check)
    with _dead_letter_file() as letters:
        for place in [
            storage.join(staging, "prepared", "dead_letters.jsonl"),
            *(shards.dead_letters_uri(staging, name) for name in merged),
        ]:
            text = storage.read_bytes(place).decode()
            letters.write(text)
            dead_letters += text.count("\n")
        letters.flush()
        files = {"dead_letters.jsonl": folder.upload_file(Path(letters.name), "dead_letters.jsonl")}
    files["config.yaml"] = folder.write_bytes("config.yaml", config.to_yaml().encode())
    overlap = storage.read_json(storage.join(staging, "prepared", "decontamination.json"))
    files["decontamination.json"] = folder.write_json("decontamination.json", overlap)
    files |= {name: shard["entry"] for name, shard in merged.items()}
    left_out = {"dead_letters": dead_letters, "decontaminated": overlap["train_rows_left_out"]}
    summary = {"uri": uri, **total, "splits": counts, **left_out, "seconds": round(sum(stages.values()), 1)}
    manifest = {
        "kind": "dataset",
        "version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
        "command": "cappy generate config.yaml",
        "counts": counts,
        "summary": summary,
        "rates": rates,
        "seconds": {stage: round(seconds, 1) for stage, seconds in stages.items()},
        "cost": {"dollars": round(sum(shard["cost"] for shard in merged.values()), 6)},
        "schema": {field.name: str(field.type) for field in DATASET},
        "metric": labels.describe_metric(config.generate.label),
        "lineage": result_settings(config),
        "config": config.model_dump(mode="json"),
        "files": files,
    }
    manifest = dataset_card.write_card(uri, manifest, held.check)
    shards.remove_superseded(uri, merged, held.check)
    held.check()
    artifacts.publish(uri, manifest)
    artifacts.cleanup(staging, held.check)
    return summary


def _count_rows(units: Sequence[str], prepared: dict[str, Any], size: int) -> int:
    """Instructions in some of the units: all hold `size` but the last of each split."""
    last = {
        f"{split}-{number - 1:06d}": prepared["counts"][split] - (number - 1) * size
        for split, number in prepared["units"].items()
        if number
    }
    return sum(last.get(unit, size) for unit in units)
