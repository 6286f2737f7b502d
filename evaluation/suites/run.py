"""Run a suite: `cappy evaluate --suite NAME`. Resumes after the finished parts, compares the methods, publishes numbers and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa

from cluster import artifacts, storage
from cluster.config import Config
from cluster.redaction import redact_tree
from cluster.runtime import code_version, ray_session
from evaluation import publish
from evaluation.evaluate import PairScorer, load_scorer
from evaluation.suites import report
from evaluation.suites.choices import run_choices
from evaluation.suites.sampled import run_sampled
from evaluation.suites.scores import Row, scorer_key
from evaluation.suites.steps import Steps
from generation import engines
from generation.sampler import LoadLLM

_CANDIDATE = (
    ("response", pa.string()),
    ("label", pa.float64()),  # in [0, 1]
    ("decoding", pa.string()),
    ("tokens", pa.float32()),
    ("logprob", pa.float64()),
    ("scorer", pa.float32()),  # raw scores, unbounded
    ("adapted", pa.float32()),
    ("likelihood", pa.float64()),  # of a choice: sum of log-probabilities, in nats
    ("unconditional", pa.float64()),
)


def run_suite(config: Config, *, overwrite: bool = False, load_llm: LoadLLM = engines.load_engine) -> dict[str, Any]:
    """Run or resume the suite of a config and publish to `config.evaluation_uri`; return the summary.

    The candidates, the folds and the scores are kept below `config.workspace`. After an interruption the same command resumes, and
    gives the same figures.

    Args:
        config: the config with its `suite`.
        overwrite: replace a published result, once the new one is computed. Candidates, folds and scores are kept.
        load_llm: loads the LLM, for candidates that are not sampled yet.

    Raises `UsageError` if the folder holds other files, or a published evaluation and `overwrite` is false. Raises `CappyError` if an
    input cannot be used, or another run holds the lease.
    """
    suite = config.suite
    assert suite is not None
    with publish.hold_destination(config, overwrite=overwrite) as held:
        steps = Steps(config.workspace, held.check)
        scorer = zero_shot_scorer(config)
        load = partial(_load, config)
        if suite.kind == "sampled":
            with ray_session():
                results, rows = run_sampled(config, steps, held, scorer, load, load_llm)
        else:
            results, rows = run_choices(config, steps, held, scorer, load)
        results |= {
            "suite": suite.model_dump(mode="json"),
            "steps": steps.measured,
            "made": {
                "dataset": results["dataset"],
                "scorer": scorer,
                "inputs": {**_inputs(results["dataset"], scorer), "row_sha256": results.get("row_sha256")},
                "source": redact_tree(config.source.model_dump(mode="json")) if suite.kind != "questions" else None,
                "seed": config.seed,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "code_version": code_version(),
            },
        }
        summary = summarise(storage.check_uri(config.evaluation_uri, "evaluation_path"), results)
        publish.publish_evaluation(config, results, to_table(rows), report.render_suite(results), summary, overwrite, held)
    return summary


def zero_shot_scorer(config: Config) -> str | None:
    """Return the scorer that is compared without adaptation: `scorer_path`, the scorer of the workspace, or `adapt.base`."""
    if config.scorer_path or storage.exists(storage.join(config.scorer_uri, artifacts.MANIFEST)):
        return config.scorer_uri
    return config.adapt_base


def _load(config: Config, uri: str) -> PairScorer:
    return load_scorer(config.model_copy(update={"scorer_path": uri}))


def _inputs(dataset: str | None, scorer: str | None) -> dict[str, Any]:
    """Return the identity of the inputs: the SHA-256 of each file of the set, and the scorer."""
    files = artifacts.read_manifest(dataset, "dataset", "generate")["files"] if dataset else {}
    return {"files": {name: entry["sha256"] for name, entry in files.items()}, "scorer": scorer_key(scorer) if scorer else None}


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Return one row per instruction: `value_{method}` in [0, 1] for each method, the fold, and the candidates with their scores."""
    columns: dict[str, Any] = {
        name: pa.array([row.get(name) for row in rows], pa.string()) for name in ("id", "dataset", "template", "instruction")
    }
    columns["references"] = pa.array([row["references"] for row in rows], pa.list_(pa.string()))
    columns["fold"] = pa.array([row.get("fold") for row in rows], pa.int32())
    for method in rows[0]["values"]:
        columns[f"value_{method}"] = pa.array([row["values"][method] for row in rows], pa.float64())
    fields = [pa.field(name, kind) for name, kind in _CANDIDATE]
    candidates = [[{name: each.get(name) for name, _ in _CANDIDATE} for each in row["candidates"]] for row in rows]
    columns["candidates"] = pa.array(candidates, pa.list_(pa.struct(fields)))
    return pa.table(columns)


def summarise(uri: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of the verb: the results without plots, provenance and gains of single tasks, and the location of the report."""
    left_out = ("calibration", "adapt", "made", "best_baselines")
    tasks = {task: {key: value for key, value in entry.items() if key != "gains"} for task, entry in results["per_task"].items()}
    kept = {key: value for key, value in results.items() if key not in left_out}
    return {"uri": uri, "report": storage.join(uri, "report.html"), **kept, "per_task": tasks}
