"""`cappy score`: score given pairs of an instruction and a response, from files to published scores.

The source is read once and written as units of `score.unit_rows` pairs. Scoring actors of a Ray Data plan score the units.
`score_units` describes the staging folder. The guarantees are those of `generation.generate`: a finished unit is never scored again, the
same command resumes the run, and the manifest is written last. `--keep-above` and `--top-per-instruction` select rows when the units
are merged, so they can change on resume.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cluster import artifacts, folder_writer, models, storage, versions
from cluster.config import Config, SamplerConfig
from cluster.errors import UsageError
from cluster.lease import Lease, LeaseLost
from cluster.progress import log
from cluster.redaction import redact_text
from cluster.runtime import ray_session
from generation import pair_units, prepared_units, shards, unit_run
from generation.pair_units import SPLIT, PreparedPairs
from generation.sources.pair_rows import Columns
from generation.unit_run import UnitRun
from serving import answer_units, score_files, score_ranking, score_units
from serving.answer_units import LoadScorer
from serving.score_files import ScoredShard
from serving.score_units import ScoreWorker
from serving.scorer_cache import read_version
from training.main_scorer import check_scorer, with_default_scorer

_ERROR_RATE_ROWS = 10_000
"""Smallest number of pairs before the share of dead letters is checked during the run."""
_ACTOR_BYTES = 2 << 30
"""Memory of a scoring actor, from which their default number is computed."""
_OWNED = artifacts.OwnedFiles("scores", "score", score_files.WORKING_FILES, r"_staging/(units|letters)/.+", score_files.RESULT_FILES)


def run_score(
    config: Config, *, src: str, dst: str, overwrite: bool = False, load_scorer: LoadScorer = answer_units.load_main_scorer
) -> dict[str, Any]:
    """Score the pairs of the files at `src`, publish them with their scores at `dst`, and return the summary.

    `src` is a file, a folder, a glob or a published folder; see `pair_units.read_pairs`. `load_scorer` loads the scorer of each actor.

    Raises `UsageError` if no row can be scored or published, and if the destination has a finished run, a run with other settings or
    foreign files. Raises `CappyError` if too many rows fail or another run has the lease. Raises `Stopped` after SIGTERM.
    """
    start = time.monotonic()
    source, uri = storage.check_uri(src, "SRC"), storage.check_uri(dst, "DST")
    _check_source(source, uri)  # an error here leaves no trace at the destination
    unit_run.refuse_destination(uri, "DST", _OWNED, overwrite=overwrite)
    config = with_default_scorer(config, "score")
    check_scorer(config)
    config = config.model_copy(update={"scorer_path": models.absolute(config.scorer_uri)})
    with unit_run.hold_destination(uri, "DST", _OWNED, overwrite=overwrite) as held:
        staging, settings = storage.join(uri, "_staging"), result_settings(config, source)
        settings = dict(unit_run.claim_destination(staging, settings, "DST"))
        columns = Columns(config.score.prompt, config.score.response)
        run = _Run(uri, config, settings, pair_units.prepare(staging, source, columns, config.score.unit_rows, held), held)
        run.check_error_rate()
        seconds = {"reading": time.monotonic() - start}
        try:
            with ray_session():
                rates = run.score_units(load_scorer)
                seconds["scoring"] = time.monotonic() - start - sum(seconds.values())
                merged = run.merge()
                seconds["merging"] = time.monotonic() - start - sum(seconds.values())
            summary = run.publish(merged, rates, seconds)
        except LeaseLost:
            shards.remove_own(uri, held.run)
            raise
        held.finish()
    return summary


def result_settings(config: Config, source: str) -> dict[str, Any]:
    """Return the settings that determine the scores; other settings (actors, filters, shards) may change on resume.

    `source` is absolute. `inputs` has the version of the published folder that holds it, and is left out if there is none.
    """
    inputs = versions.of_files({"src": source})
    return {
        "source": redact_text(source),
        "columns": {"prompt": config.score.prompt, "response": config.score.response},
        "unit_rows": config.score.unit_rows,
        "scorer": {"uri": redact_text(config.scorer_uri), "version": read_version(config.scorer_uri)},
        "scorer_dtype": config.serving.scorer_dtype,
        "cpu_kernels": config.scorer.cpu_kernels,
        **({} if config.scorer.format == "auto" else {"format": config.scorer.format}),
        **({"inputs": inputs} if inputs else {}),
    }


def result_filters(config: Config) -> dict[str, Any]:
    """Return the settings that select the published rows, as the manifest records them."""
    return config.score.model_dump(mode="json", include={"keep_above", "top_per_instruction"})


def _check_source(source: str, uri: str) -> None:
    """Raise `UsageError` if the source has no data file, or if the run would write into its source."""
    root, pattern = storage.split_glob(source)
    if not pattern:
        artifacts.refuse_nested(root, uri)
    if storage.exists(storage.join(uri, "_staging", "prepared.json")):
        return  # a resumed run does not read its source again
    if any(file.uri.startswith(f"{uri}/") for file in pair_units.find_files(source)[0]):
        raise UsageError(f"DST={uri} holds files of SRC={source}; choose a separate folder for DST")


@dataclass(frozen=True)
class _Run:
    """One attempt of a run, after its source is read."""

    uri: str
    """The destination."""
    config: Config
    settings: dict[str, Any]
    """The result of `result_settings`."""
    prepared: PreparedPairs
    lease: Lease

    @property
    def staging(self) -> str:
        return storage.join(self.uri, "_staging")

    @cached_property
    def names(self) -> list[str]:
        """The names of all units, in order."""
        return prepared_units.unit_names(self.prepared)

    def count_rows(self, names: Sequence[str]) -> int:
        """Return the number of pairs in some units."""
        return prepared_units.count_rows(names, self.prepared, self.config.score.unit_rows)

    def check_error_rate(self, letters: int = 0) -> None:
        """Raise `CappyError` if the share of dead letters is too large. `letters` is the number of pairs that could not be scored."""
        failed = self.prepared["dead_letters"]
        prepared_units.check_error_rate(failed + letters, failed + self.prepared["rows"], self.config, self.uri)

    def score_units(self, load_scorer: LoadScorer) -> dict[str, float]:
        """Score every unit that is not finished; return the rates of this attempt, empty if all were finished."""
        found = storage.list_files(storage.join(self.staging, "units"))
        pending = [name for name in self.names if f"{name}.parquet" not in found]
        rows = self.prepared["rows"]
        done = rows - self.count_rows(pending)
        if len(pending) < len(self.names):
            log(f"{done:,} of {rows:,} pairs are scored already; resuming")
        if not pending:
            return {}
        actors, resources = actor_pool(self.config, len(pending))
        log(f"the scorer {redact_text(self.config.scorer_uri)} runs in {actors} actor(s)")
        with UnitRun("scoring", SamplerConfig(), rows, done, 0.0, self.lease, "pairs") as run:
            plan = _build_plan(pending, (self.staging, self.config, load_scorer, run.gate), actors, resources)
            for result in run.results(plan):
                run.advance(result["rows"])
                if run.new_rows >= _ERROR_RATE_ROWS:
                    prepared_units.check_error_rate(run.dead_letters, run.new_rows, self.config, self.uri)
            run.raise_if_stopped()
            return run.rates()

    def merge(self) -> dict[str, ScoredShard]:
        """Merge the finished units into shards, each in a Ray task; return the results by path, sorted."""
        self.lease.check()
        options, kept = self.config.score, None
        if options.top_per_instruction is not None:
            log(f"ranking {self.prepared['rows']:,} scores by instruction")
            kept = score_ranking.best_rows(self.staging, self.names, options.unit_rows, self.prepared["rows"], options.top_per_instruction)
        sizes = storage.list_files(storage.join(self.staging, "prepared"))
        of_unit = {name: sizes.get(f"{name}.parquet", 0) for name in self.names}
        tasks: dict[str, list[Any]] = {}
        first = 0
        for number, group in enumerate(shards.group_by_size(of_unit, self.config.generate.shard_mib << 20)):
            rows = self.count_rows(group)
            path = shards.shard_path(SPLIT, number, self.lease.run)
            tasks[path] = [
                group,
                self.staging,
                storage.join(self.uri, path),
                self.prepared["columns"],
                options.keep_above,
                None if kept is None else kept[first : first + rows],
                self.config.generate.row_group_rows,
                self.lease.claim.check,
            ]
            first += rows
        merged: dict[str, ScoredShard] = unit_run.merge_shards(tasks, score_files.write_scores)
        self.check_error_rate(sum(shard["letters"] for shard in merged.values()))
        return merged

    def publish(self, merged: dict[str, ScoredShard], rates: dict[str, float], seconds: dict[str, float]) -> dict[str, Any]:
        """Write the files beside the shards, then the manifest; return the summary. `seconds` has the time of each stage."""
        rows = sum(shard["entry"]["rows"] for shard in merged.values())
        bins = np.sum([shard["bins"] for shard in merged.values()], axis=0).tolist()
        if not rows:
            raise self._nothing_left(bins)
        scores = score_files.distribution(bins, sum(shard["score_sum"] for shard in merged.values()))
        folder = folder_writer.FolderWriter(self.uri, self.lease.check)
        letters, dead_letters = prepared_units.publish_letters(folder, self.staging, merged)
        files = {
            "dead_letters.jsonl": letters,
            "config.yaml": folder.write_bytes("config.yaml", self.config.to_yaml().encode()),
            "scores.svg": folder.write_bytes("scores.svg", score_files.plot_scores(scores["bins"])),
            **{name: shard["entry"] for name, shard in merged.items()},
        }
        summary = {
            "uri": self.uri,
            "pairs": sum(bins),
            "repeated": sum(shard["repeated"] for shard in merged.values()),
            "rows": rows,
            "dropped": {
                "below": sum(shard["below"] for shard in merged.values()),
                "ranked_out": sum(shard["ranked_out"] for shard in merged.values()),
            },
            "dead_letters": dead_letters,
            "scores": scores,
            "pairs_per_second": rates.get("pairs_per_second"),
            "seconds": round(sum(seconds.values()), 1),
        }

        def describe(uri: str, manifest: dict[str, Any]) -> dict[str, Any]:
            files["README.md"] = folder.write_bytes("README.md", score_files.render_card(manifest).encode())
            shards.remove_superseded(uri, merged, self.lease.check)
            return manifest | {"files": files}

        columns = self.prepared["columns"]
        arithmetic = {
            name: value for name, value in storage.read_json(storage.join(self.staging, score_units.ARITHMETIC)).items() if name != "writer"
        }
        artifacts.publish_folder(
            self.uri,
            "scores",
            command=command_line(self.settings["source"], self.config),
            counts={SPLIT: {"rows": rows}},
            rates=rates,
            seconds={stage: round(spent, 1) for stage, spent in seconds.items()},
            schema={field.name: str(field.type) for field in score_files.score_schema(columns)},
            own_columns=score_files.own_names(columns),
            scorer={**self.settings["scorer"], **arithmetic},
            filters=result_filters(self.config),
            lineage=self.settings,
            summary=summary,
            config=self.config,
            files=files,
            describe=describe,
            check=self.lease.check,
        )
        artifacts.cleanup(self.staging, self.lease.check)
        return summary

    def _nothing_left(self, bins: Sequence[int]) -> UsageError:
        """Return the error of a run without a row to publish. `bins` are the counts of the scores."""
        scored = sum(bins)
        if not scored:
            return UsageError(
                f"DST={self.uri}: none of the {self.prepared['rows']:,} pairs could be scored; the reasons are in {self.staging}/letters"
            )
        largest = (max(np.flatnonzero(bins)) + 1) / score_files.FINE_BINS
        return UsageError(
            f"--keep-above={self.config.score.keep_above:g} drops all {scored:,} pairs, whose largest score is about {largest:g}; "
            f"run the command again with a lower value"
        )


def actor_pool(config: Config, pending: int) -> tuple[int, dict[str, float]]:
    """Return the number of scoring actors for `pending` units, and the resources of each.

    Raises `UsageError` if this machine has too few CPU slots for `score.scorers`. A cluster can get more machines.
    """
    import ray

    found = ray.cluster_resources()
    gpus, slots = found.get("GPU", 0.0), int(found.get("CPU", 0))
    share = 1.0 if config.answer.scorer_gpus is None else config.answer.scorer_gpus
    actors = config.score.scorers
    if actors is None and gpus and share:
        actors = int(gpus / share)
    elif actors is None:
        # An embedded Ray has more slots than the machine has cores.
        cores = slots if os.environ.get("RAY_ADDRESS") else min(slots, os.cpu_count() or 1)
        actors = min(cores, int(found.get("memory", 0.0)) // _ACTOR_BYTES)
    elif not os.environ.get("RAY_ADDRESS") and actors > slots:
        raise UsageError(
            f"score.scorers={actors} needs {actors} CPU slots, and this machine has {slots}; lower it, or use a cluster with --address"
        )
    return max(1, min(actors, pending)), {"num_cpus": 1, "num_gpus": share if gpus else 0}


def _build_plan(names: Sequence[str], arguments: tuple[Any, ...], actors: int, resources: dict[str, float]) -> Any:
    """Return the Ray Data plan: unit names in, `score_units.SCORED_COUNTS` of each scored unit out.

    `arguments` are those of `ScoreWorker`.
    """
    import ray.data

    scored = unit_run.unit_source(names).map_batches(
        ScoreWorker,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=2, max_tasks_in_flight_per_actor=4),
        **resources,
    )
    # A stage passes each unit on when it is finished, not with the other units of its block.
    scored.context.target_max_block_size = 1
    return scored


def command_line(source: str, config: Config) -> str:
    """Return the command of a run, with `DST` for the destination."""
    words = ["cappy", "score", redact_text(source), "DST", "--scorer", redact_text(config.scorer_uri)]
    for option in ("prompt", "response", "keep_above", "top_per_instruction"):
        if (value := getattr(config.score, option)) is not None:
            words += [f"--{option.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
