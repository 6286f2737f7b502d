"""`cappy generate`: run the Ray Data plan from a source to a published regression set.

The work is cut into units of `generate.unit_rows` instructions. The folder `{dataset}/_staging` has these files:

- `run.json`: the settings that determine the result; a run with other settings is refused;
- `prepared/{split}-{number}.parquet`: a unit before sampling; `prepared.json` is written after the last of them;
- `units/{split}-{number}.parquet`: a finished unit, written in one operation, so a partial file never exists.

Finished units are never sampled again: after any interruption the same command resumes the run. At the end the units are
merged into shards, and the manifest is written last. Readers refuse a folder without a manifest. A lease (`_lease`) excludes
a second run; a run that lost its lease stops before it deletes or publishes anything. After SIGTERM no unit starts, and the
units in progress are finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster import artifacts, folder_writer, storage, versions
from cluster.config import Config
from cluster.config.paths import source_files
from cluster.errors import CappyError
from cluster.lease import Lease, LeaseLost
from cluster.progress import log
from cluster.runtime import ray_session
from generation import dataset, dataset_card, empty_responses, engines, labels, prepared_units, prometheus, shards, unit_run, units
from generation.prepared_units import PreparedUnits
from generation.prometheus import GenerateMetrics
from generation.sampler import LoadLLM, NoLLM
from generation.schema import DATASET, SPLITS
from generation.shards import MergedShard
from generation.unit_run import UnitRun

# Minimum number of rows before the share of dead letters is checked during sampling; fewer rows are too few to judge a run.
_ERROR_RATE_ROWS = 200
_OWNED = artifacts.OwnedFiles("dataset", "generate", dataset.WORKING_FILES, r"_staging/(units|letters)/.+", dataset.RESULT_FILES)


def run_generate(config: Config, *, overwrite: bool = False, load: LoadLLM = engines.load_engine) -> dict[str, Any]:
    """Sample, label and publish a regression set; return its summary.

    `load` loads the LLM of each sampling actor. Raises `UsageError` if the destination has a finished run or a run with other
    settings. Raises `CappyError` if too many rows fail or another run has the lease. Raises `Stopped` after SIGTERM.
    """
    start = time.monotonic()
    uri = storage.check_uri(config.dataset_uri, "dataset")
    owned = replace(_OWNED, verb="extend") if config.generate.extend else _OWNED
    if config.generate.extend:
        artifacts.refuse_nested(storage.check_uri(config.generate.extend, "generate.extend"), uri)
    unit_run.refuse_destination(uri, "dataset", owned, overwrite=overwrite)
    engines.check_sampler_config(config.sampler)
    with (
        prometheus.serve_metrics(config.generate) as progress,
        unit_run.hold_destination(uri, "dataset", owned, overwrite=overwrite) as run_lease,
    ):
        staging = storage.join(uri, "_staging")
        settings = _claim_destination(staging, config)
        prepared = prepared_units.prepare(staging, config, run_lease, settings.get("inputs"))
        prepared_units.warn_about_labels(prepared, config)
        stages = {"reading": time.monotonic() - start}
        try:
            with ray_session():
                rates = _sample(staging, prepared, config, load, run_lease, progress)
                stages["sampling"] = time.monotonic() - start - sum(stages.values())
                merged = _merge(uri, staging, prepared, config, run_lease)
                stages["merging"] = time.monotonic() - start - sum(stages.values())
            summary = _publish(uri, staging, prepared, merged, rates, config, settings, stages, run_lease)
        except LeaseLost:
            shards.remove_own(uri, run_lease.run)
            raise
        run_lease.finish()
    return summary


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine the content of the set; other settings (replicas, sizes) may change on resume.

    `inputs` has the versions of the published folders that the run reads, and is left out if there are none.
    """
    tree = config.model_dump(mode="json")
    generate = {key: tree["generate"][key] for key in ("mismatched", "hard_mismatched", "max_per_bin", "unit_rows")}
    if config.generate.reuse:
        generate |= {name: tree["generate"][name] for name in ("reuse", "reuse_only") if name in tree["generate"]}
    if config.generate.extend:
        generate["extend"] = tree["generate"]["extend"]
    generate["label"] = labels.describe_metric(config.generate.label)
    source = {key: tree[key] for key in ("source", "decontaminate")}
    settings = {"seed": config.seed, **source, "sampler": config.sampler.result_settings(), "generate": generate}
    inputs = versions.of_files(read_files(config))
    return {**settings, "inputs": inputs} if inputs else settings


def read_files(config: Config) -> dict[str, str]:
    """Return the files and folders that the run reads, by setting."""
    lists = {"decontaminate.files": config.decontaminate.files, "generate.reuse": config.generate.reuse}
    listed = {f"{setting}.{number}": path for setting, paths in lists.items() for number, path in enumerate(paths)}
    extended = {"generate.extend": config.generate.extend} if config.generate.extend else {}
    return {**source_files(config.source), **listed, **extended}


def _claim_destination(staging: str, config: Config) -> Mapping[str, Any]:
    """Record the settings of the run, or check them against the record of an earlier attempt; return them."""
    return unit_run.claim_destination(staging, result_settings(config), "dataset")


def _sample(
    staging: str, prepared: PreparedUnits, config: Config, load: LoadLLM, run_lease: Lease, progress: GenerateMetrics
) -> dict[str, Any]:
    """Sample and label every unit that is not finished; return the rates of this attempt, empty if all were finished."""
    names = prepared_units.unit_names(prepared)
    finished = {name.removesuffix(".parquet") for name in storage.list_files(storage.join(staging, "units"))}
    pending = [name for name in names if name not in finished]
    total = prepared["rows"]
    done = total - prepared_units.count_rows(pending, prepared, config.generate.unit_rows)
    progress.start(total, done)
    if finished:
        log(f"{len(finished)} of {len(names)} units are finished already; resuming")
    if not pending:
        return {}
    # Older versions took complete rows from `generate.reuse` and no other rows.
    complete = prepared.get("complete", prepared["reused"]["rows"] if "reused" in prepared else 0)
    if prepared.get("sampled_rows") == complete:
        load = NoLLM
        log("no LLM is started: the candidates of every row are its answer_choices" + (" or in an earlier set" if complete else ""))
    else:
        log(f"starting {config.sampler.model} on {config.sampler.engine.kind}, {config.sampler.replicas} replica(s)")
    spent = units.dollars_spent(staging, sorted(finished)) if engines.cost_limit(config.sampler) is not None else 0.0
    empty = sampled = 0
    with UnitRun("sampling", config.sampler, total, done, spent, run_lease) as run:
        for result in run.results(build_plan(staging, pending, config, load, run.gate, prepared.get("max_tokens"))):
            empty += result["empty"] or 0
            sampled += result["candidates"]
            progress.add(result)
            run.advance(result["rows"], **units.count_drawn(result))
            if run.new_rows >= _ERROR_RATE_ROWS:
                prepared_units.check_error_rate(run.dead_letters, run.new_rows, config)
                empty_responses.check_empty_share(empty, sampled, config.sampler)
        run.raise_if_stopped()
        return run.rates()


def build_plan(
    staging: str, names: Sequence[str], config: Config, load: LoadLLM, gate: Any, limits: Mapping[str, int] | None = None
) -> Any:
    """Return the Ray Data plan: one unit name per row in, the counts of each finished unit out (`units.COUNTS`).

    `limits` has the largest length of a candidate in tokens, by dataset.
    """
    import ray.data

    return unit_run.unit_source(names).map_batches(
        units.UnitWorker,
        fn_constructor_args=(staging, config, load, gate, limits),
        batch_size=None,
        batch_format="pyarrow",
        compute=unit_run.sampling_pool(config.sampler.replicas),
        **engines.actor_resources(config.sampler, 0 if load is NoLLM else ray.cluster_resources().get("GPU", 0)),
    )


def _merge(uri: str, staging: str, prepared: PreparedUnits, config: Config, run_lease: Lease) -> dict[str, MergedShard]:
    """Merge the finished units into shards, each in a Ray task; return the results by path, sorted."""
    run_lease.check()
    sizes = storage.list_files(storage.join(staging, "units"))
    tasks: dict[str, Sequence[Any]] = {}
    for split in SPLITS:
        # The names come from the prepared units: a unit that is missing in the listing must be an error.
        of_split = {name: sizes.get(f"{name}.parquet", 0) for name in prepared_units.unit_names(prepared) if name.startswith(f"{split}-")}
        for number, names in enumerate(shards.group_by_size(of_split, config.generate.shard_mib << 20)):
            name = shards.shard_path(split, number, run_lease.run)
            tasks[name] = (names, staging, storage.join(uri, name), config.generate.row_group_rows, run_lease.claim.check)
    merged: dict[str, MergedShard] = unit_run.merge_shards(tasks, shards.write_shard)
    rows = sum(shard["entry"]["rows"] + shard["letters"] - shard["incomplete"] for shard in merged.values())
    if rows != prepared["rows"]:
        raise CappyError(f"{uri}: {prepared['rows']} instructions were prepared, but the units have {rows}; run again with --overwrite")
    not_sampled = sum(shard["letters"] for shard in merged.values())
    prepared_units.check_error_rate(prepared["dead_letters"] + not_sampled, prepared["dead_letters"] + prepared["rows"], config)
    empty, sampled = sum(shard["empty"] for shard in merged.values()), sum(shard["sampled"] for shard in merged.values())
    empty_responses.check_empty_share(empty, sampled, config.sampler)
    if empty:
        log(empty_responses.empty_warning(empty, sampled))
    return merged


def _publish(
    uri: str,
    staging: str,
    prepared: PreparedUnits,
    merged: dict[str, MergedShard],
    rates: dict[str, Any],
    config: Config,
    settings: Mapping[str, Any],
    stages: dict[str, float],
    run_lease: Lease,
) -> dict[str, Any]:
    """Write the files beside the shards, then the manifest; return the summary of the set.

    `settings` are those of `result_settings` when the rows were prepared. `stages` has the seconds of each stage; they include the start
    of Ray and of the LLM.
    """
    counts: dict[str, Any] = {}
    total: dict[str, Any] = {}
    for name, shard in merged.items():
        split = name.split("/")[1]
        part = {key: shard["statistics"][key] for key in ("instructions", "pairs")}
        counts[split] = dataset.add_statistics(counts.get(split, {}), part)
        total = dataset.add_statistics(total, shard["statistics"])
    if not total.get("instructions"):
        raise CappyError(f"{uri}: every row failed, so nothing is published; the reasons are in {staging}; fix the source or sampler.*")
    folder = folder_writer.FolderWriter(uri, run_lease.check)
    letters, dead_letters = prepared_units.publish_letters(folder, staging, merged)
    files = {"dead_letters.jsonl": letters}
    files["config.yaml"] = folder.write_bytes("config.yaml", config.to_yaml().encode())
    overlap = storage.read_json(storage.join(staging, "prepared", "decontamination.json"))
    files["decontamination.json"] = folder.write_json("decontamination.json", overlap)
    files |= {name: shard["entry"] for name, shard in merged.items()}
    left_out = {"dead_letters": dead_letters, "decontaminated": overlap["train_rows_left_out"]}
    found = {"merged": prepared.get("merged", 0), "unseen_references": prepared.get("unseen_references", 0)}
    found |= {f"{name}_responses": sum(shard[name] for shard in merged.values()) for name in ("empty", "missing")}
    if "too_long" in prepared:
        found["too_long"] = prepared["too_long"]
    if "reused" in prepared:
        found["reused"] = prepared["reused"]["rows"]
    if "extends" in prepared:
        found |= {"kept_rows": prepared["extends"]["rows"], "kept_candidates": prepared["extends"]["candidates"]}
    if incomplete := sum(shard["incomplete"] for shard in merged.values()):
        found["incomplete"] = incomplete
    summary = {"uri": uri, **total, "splits": counts, **left_out, **found, "seconds": round(sum(stages.values()), 1)}

    facts: dict[str, Any] = {name: value for name, value in prepared.items() if name in dataset.SAMPLING_FACTS}

    def describe(uri: str, manifest: dict[str, Any]) -> dict[str, Any]:
        manifest = dataset_card.write_card(uri, manifest, run_lease.check)
        shards.remove_superseded(uri, merged, run_lease.check)
        return manifest

    artifacts.publish_folder(
        uri,
        "dataset",
        command="cappy generate config.yaml",
        counts=counts,
        rates=rates,
        seconds={stage: round(seconds, 1) for stage, seconds in stages.items()},
        cost={"dollars": round(sum(shard["cost"] for shard in merged.values()), 6)},
        schema={field.name: str(field.type) for field in DATASET},
        metric=labels.describe_metric(config.generate.label),
        lineage=dict(settings),
        **facts,
        summary=summary,
        config=config,
        files=files,
        describe=describe,
        check=run_lease.check,
    )
    artifacts.cleanup(staging, run_lease.check)
    return summary
