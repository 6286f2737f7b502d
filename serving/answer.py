"""`cappy answer`: boosted decoding of a whole source, from instructions to published answers.

A Ray Data plan has two stages. Sampling actors draw the candidates of a unit, and scoring actors score them and select the answers.
Each stage has its own number of actors, so the LLM does not wait for the scorer. `answer_units` describes the staging folder. The
guarantees are those of `generation.generate`: a finished unit is never sampled again, the same command resumes the run, and the manifest
is written last. With early stopping (`serving.adaptive`) a unit of unfinished rows goes through both stages again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from cluster import artifacts, folder_writer, models, storage, versions
from cluster.config import Config, DecodingConfig
from cluster.config.paths import source_files
from cluster.errors import CappyError, UsageError
from cluster.lease import Lease, LeaseLost
from cluster.progress import log
from cluster.runtime import ray_session
from generation import empty_responses, engines, labels, prepared_units, prompt_units, shards, unit_run, units
from generation.prompt_units import SPLIT, PreparedPrompts
from generation.sampler import LoadLLM, NoLLM
from generation.unit_run import UnitRun
from serving import answer_files, answer_units
from serving.answer_files import AnsweredShard
from serving.answer_rows import needs_scores, plan_decodings
from serving.answer_units import AnswerWorker, LoadScorer, UnitFeed
from serving.scorer_cache import read_version
from training.main_scorer import check_scorer, with_default_scorer

_ERROR_RATE_ROWS = 200
"""Smallest number of rows before the share of dead letters is checked during the run."""
_FEED_S = 0.2
"""Interval between two requests for the next unit, in seconds."""
_OWNED = artifacts.OwnedFiles(
    "answers", "answer", answer_files.WORKING_FILES, r"_staging/(units|sampled|letters)/.+", answer_files.RESULT_FILES
)
Rounds = Sequence[Sequence[DecodingConfig]]


def run_answer(
    config: Config,
    *,
    overwrite: bool = False,
    load: LoadLLM = engines.load_engine,
    load_scorer: LoadScorer = answer_units.load_main_scorer,
) -> dict[str, Any]:
    """Answer the instructions of `source` by boosted decoding, publish the answers at `config.answers_uri`; return their summary.

    `load` loads the LLM of each sampling actor, and `load_scorer` the scorer of each scoring actor. Raises `UsageError` if the destination
    has a finished run or a run with other settings. Raises `CappyError` if too many rows fail or another run has the lease. Raises
    `Stopped` after SIGTERM.
    """
    start = time.monotonic()
    uri = storage.check_uri(config.answers_uri, "answers_path")
    unit_run.refuse_destination(uri, "answers_path", _OWNED, overwrite=overwrite)
    engines.check_sampler_config(config.sampler)
    config = with_default_scorer(config, "answer")
    check_scorer(config)
    config = config.model_copy(update={"scorer_path": models.absolute(config.scorer_uri)})
    with unit_run.hold_destination(uri, "answers_path", _OWNED, overwrite=overwrite) as run_lease:
        staging = storage.join(uri, "_staging")
        settings = result_settings(config)
        settings = dict(unit_run.claim_destination(staging, settings, "answers_path"))
        prepared = prompt_units.prepare(staging, config, run_lease)
        prepared_units.check_error_rate(prepared["dead_letters"], prepared["dead_letters"] + prepared["rows"], config, uri)
        stages = {"reading": time.monotonic() - start}
        try:
            with ray_session():
                rates = _answer_units(staging, prepared, config, load, load_scorer, run_lease)
                stages["answering"] = time.monotonic() - start - sum(stages.values())
                merged = _merge(uri, staging, prepared, config, run_lease)
                stages["merging"] = time.monotonic() - start - sum(stages.values())
            summary = _publish(uri, staging, prepared, merged, rates, config, settings, stages, run_lease)
        except LeaseLost:
            shards.remove_own(uri, run_lease.run)
            raise
        run_lease.finish()
    return summary


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine the answers; other settings (replicas, scorers, shards) may change on resume.

    `inputs` has the versions of the published folders that the source reads, and is left out if there are none.
    """
    tree = config.model_dump(mode="json")
    answer = config.answer.model_dump(mode="json", include={"candidates", "min_score", "keep_candidates"})
    serving = {name: tree["serving"][name] for name in ("selection", "fallback", "adaptive", "scorer_dtype")}
    inputs = versions.of_files(source_files(config.source))
    return {
        "seed": config.seed,
        "source": tree["source"],
        "sampler": config.sampler.result_settings(),
        "unit_rows": config.generate.unit_rows,
        "label": labels.describe_metric(config.generate.label),
        "answer": answer,
        "serving": serving,
        "scorer": {"uri": config.scorer_uri, "version": read_version(config.scorer_uri)},
        **({} if config.scorer.format == "auto" else {"scorer_format": config.scorer.format}),
        **({"inputs": inputs} if inputs else {}),
    }


def _answer_units(
    staging: str, prepared: PreparedPrompts, config: Config, load: LoadLLM, load_scorer: LoadScorer, run_lease: Lease
) -> dict[str, float]:
    """Sample, score and select in every unit that is not finished; return the rates of this attempt, empty if all were finished."""
    total, rounds = prepared["rows"], plan_decodings(config)
    finished = answer_units.finished_units(staging)
    pending = answer_units.pending_units(staging)
    sampled = frozenset(answer_units.sampled_units(staging))
    done = _count_done(staging, finished)
    if finished:
        log(f"{done:,} of {total:,} instructions are answered already; resuming")
    if not pending:
        return {}
    if prepared["sampled_rows"] == 0:
        load = NoLLM
        log("no LLM is started: the scorer selects one of the answer_choices of every row")
    else:
        log(f"starting {config.sampler.model} on {config.sampler.engine.kind}, {config.sampler.replicas} replica(s)")
    scorer = load_scorer if needs_scores(config) or prepared["sampled_rows"] < total else None
    if scorer:
        log(f"the scorer {config.scorer_uri} runs in {config.answer.scorers} actor(s)")
    _check_cpus(config)
    spent = units.dollars_spent(staging, sorted(sampled), "sampled") if engines.cost_limit(config.sampler) is not None else 0.0
    empty = candidates = 0
    with UnitRun("answering", config.sampler, total, done, spent, run_lease) as run:
        plan = build_plan(staging, pending, config, rounds, load, scorer, run, prepared.get("max_tokens"))
        for result in run.results(plan, paid=sampled):
            empty += result["empty"] or 0
            candidates += result["candidates"]
            drawn = {} if result["unit"] in sampled else units.count_drawn(result)
            run.advance(result["rows"], **drawn)
            if run.new_rows >= _ERROR_RATE_ROWS:
                prepared_units.check_error_rate(run.dead_letters, run.new_rows, config, config.answers_uri)
                empty_responses.check_empty_share(empty, candidates, config.sampler)
        run.raise_if_stopped()
        return run.rates()


def _check_cpus(config: Config) -> None:
    """Raise `UsageError` if this machine has too few CPU slots for the actors of both stages. A cluster can get more machines."""
    import ray

    slots, needed = int(ray.cluster_resources().get("CPU", 0)), config.sampler.replicas + config.answer.scorers
    if not os.environ.get("RAY_ADDRESS") and needed > slots:
        raise UsageError(
            f"answer.scorers={config.answer.scorers} and sampler.replicas={config.sampler.replicas} need {needed} CPU slots, "
            f"and this machine has {slots}; lower them, or use a cluster with --address"
        )


def _count_done(staging: str, finished: Mapping[str, Sequence[str]]) -> int:
    """Return the number of rows in the finished units, dead letters included."""
    counts = (units.read_counts(staging, name) for names in finished.values() for name in names)
    return sum(each["rows"] for each in counts if each)


def build_plan(
    staging: str,
    names: Sequence[str],
    config: Config,
    rounds: Rounds,
    load: LoadLLM,
    load_scorer: LoadScorer | None,
    run: UnitRun,
    limits: Mapping[str, int] | None = None,
) -> Any:
    """Return the Ray Data plan: unit names in, `answer_units.ANSWERED_COUNTS` of each answered unit out.

    `limits` has the largest length of a candidate in tokens, by dataset.
    """
    import ray
    import ray.data

    feed = None
    if len(rounds) > 1:
        feed = ray.remote(num_cpus=0, scheduling_strategy=run.driver_node)(UnitFeed).remote(list(names))
        source = unit_run.unit_source([""]).map_batches(
            _feed_units,
            fn_kwargs={"feed": feed, "gate": run.gate},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
        )
    else:
        source = unit_run.unit_source(names)
    # With early stopping the number of units is not known before.
    scorers = config.answer.scorers if feed else min(config.answer.scorers, len(names))
    gpus = 0 if load is NoLLM else ray.cluster_resources().get("GPU", 0)
    resources = engines.actor_resources(config.sampler, gpus)
    if config.serving.llm_gpus is not None and gpus:
        resources["num_gpus"] = config.serving.llm_gpus
    sampled = source.map_batches(
        units.UnitWorker,
        fn_constructor_args=(staging, config, load, run.gate, limits, rounds, answer_units.SAMPLED_UNITS),
        batch_size=None,
        batch_format="pyarrow",
        compute=unit_run.sampling_pool(config.sampler.replicas),
        **resources,
    )
    answered = sampled.map_batches(
        AnswerWorker,
        fn_constructor_args=(staging, config, rounds, load_scorer, feed),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=scorers, max_concurrent_calls_per_actor=2, max_tasks_in_flight_per_actor=4),
        num_cpus=1,
        num_gpus=scorer_gpus(config, ray.cluster_resources().get("GPU", 0), resources["num_gpus"]) if load_scorer else 0,
    )
    # A stage passes each unit on when it is finished, not with the other units of its block.
    answered.context.target_max_block_size = 1
    return answered


def _feed_units(batch: pa.Table, feed: Any, gate: Any) -> Iterator[pa.Table]:
    """Yield the name of each unit as soon as it is known, until all units are finished or no other unit is admitted."""
    import ray

    index = 0
    while True:
        name, finished = ray.get(feed.get.remote(index))
        if name is not None:
            index += 1
            yield pa.table({"unit": [name]})
        elif finished or not ray.get(gate.is_open.remote()):
            return
        else:
            time.sleep(_FEED_S)


def scorer_gpus(config: Config, cluster_gpus: float, llm_gpus: float) -> float:
    """Return the GPUs of a scoring actor: `answer.scorer_gpus`, or a quarter of one if the sampling actors leave enough."""
    if config.answer.scorer_gpus is not None:
        return config.answer.scorer_gpus if cluster_gpus else 0.0
    free = int(cluster_gpus - llm_gpus * config.sampler.replicas)
    return 0.25 if config.answer.scorers <= 4 * free else 0.0


def _merge(uri: str, staging: str, prepared: PreparedPrompts, config: Config, run_lease: Lease) -> dict[str, AnsweredShard]:
    """Merge the finished units into shards, each in a Ray task; return the results by path, sorted."""
    run_lease.check()
    sizes = storage.list_files(storage.join(staging, "units"))
    groups = answer_units.finished_units(staging)
    # The names come from the prepared units: a unit that is missing in the listing must be an error.
    names = [f"{SPLIT}-{number:06d}" for number in range(prepared["units"][SPLIT])]
    of_group = {name: sum(sizes.get(f"{unit}.parquet", 0) for unit in groups.get(name, ())) for name in names}
    tasks: dict[str, Sequence[Any]] = {}
    for number, shard in enumerate(shards.group_by_size(of_group, config.generate.shard_mib << 20)):
        path = shards.shard_path(SPLIT, number, run_lease.run)
        tasks[path] = (
            [groups.get(name, [name]) for name in shard],
            staging,
            storage.join(uri, path),
            prepared["columns"],
            config.answer.keep_candidates,
            config.generate.row_group_rows,
            run_lease.claim.check,
        )
    merged: dict[str, AnsweredShard] = unit_run.merge_shards(tasks, answer_files.write_answers)
    letters = sum(shard["letters"] for shard in merged.values())
    rows = letters + sum(shard["entry"]["rows"] for shard in merged.values())
    if rows != prepared["rows"]:
        raise CappyError(f"{uri}: {prepared['rows']} instructions were prepared, but the units have {rows}; run again with --overwrite")
    failed = prepared["dead_letters"] + letters
    prepared_units.check_error_rate(failed, prepared["dead_letters"] + prepared["rows"], config, uri)
    empty, candidates = (sum(shard["counts"].get(name, 0) for shard in merged.values()) for name in ("empty", "candidates"))
    empty_responses.check_empty_share(empty, candidates, config.sampler)
    return merged


def _publish(
    uri: str,
    staging: str,
    prepared: PreparedPrompts,
    merged: dict[str, AnsweredShard],
    rates: dict[str, float],
    config: Config,
    settings: dict[str, Any],
    stages: dict[str, float],
    run_lease: Lease,
) -> dict[str, Any]:
    """Write the files beside the shards, then the manifest; return the summary of the answers. `stages` has seconds."""

    def total(name: str) -> int:
        return sum(shard["counts"].get(name, 0) for shard in merged.values())

    if not total("answers"):
        raise CappyError(f"{uri}: every row failed, so nothing is published; the reasons are in {staging}; fix the source or sampler.*")
    folder = folder_writer.FolderWriter(uri, run_lease.check)
    letters, dead_letters = prepared_units.publish_letters(folder, staging, merged)
    files = {"dead_letters.jsonl": letters}
    files["config.yaml"] = folder.write_bytes("config.yaml", config.to_yaml().encode())
    files |= {name: shard["entry"] for name, shard in merged.items()}
    selected = sorted({name for shard in merged.values() for name in shard["counts"] if name.startswith("by:")})
    scored = sum(shard["scored"] for shard in merged.values())
    cost = round(sum(shard["cost"] for shard in merged.values()), 6)
    summary = {
        "uri": uri,
        **{name: total(name) for name in ("answers", "abstained", "classified", "candidates", "tokens")},
        "cost": cost,
        "dead_letters": dead_letters,
        "merged": prepared["merged"],
        "mean_score": round(sum(shard["score_sum"] for shard in merged.values()) / scored, 6) if scored else None,
        "selected_by": {name.removeprefix("by:"): total(name) for name in selected},
        "seconds": round(sum(stages.values()), 1),
    }

    def describe(uri: str, manifest: dict[str, Any]) -> dict[str, Any]:
        card = folder.write_bytes("README.md", answer_files.render_card(manifest).encode())
        shards.remove_superseded(uri, merged, run_lease.check)
        return {**manifest, "files": manifest["files"] | {"README.md": card}}

    schema = answer_files.answer_schema(prepared["columns"], config.answer.keep_candidates)
    artifacts.publish_folder(
        uri,
        "answers",
        command="cappy answer config.yaml",
        counts={SPLIT: {"rows": summary["answers"]}},
        rates=rates,
        seconds={stage: round(seconds, 1) for stage, seconds in stages.items()},
        cost={"dollars": cost},
        schema={field.name: str(field.type) for field in schema},
        own_columns=answer_files.own_names(prepared["columns"]),
        scorer=settings["scorer"],
        lineage=settings,
        summary=summary,
        config=config,
        files=files,
        describe=describe,
        check=run_lease.check,
    )
    artifacts.cleanup(staging, run_lease.check)
    return summary
