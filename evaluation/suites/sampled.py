"""Suites of kind `sampled`: select among candidates of the LLM, in folds.

The candidates of all rows are sampled once and published as the set of the workspace. The rows of a task are dealt into folds. In each
fold a scorer is adapted to the other rows of the task (`folds/{fold}/adapted`), and scores the rows of the fold. So every row is reported
with a scorer, a selection and a best baseline that were chosen without it. Each finished part is kept, and the same command resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cluster import artifacts, storage
from cluster.config import Config, LabelConfig
from cluster.errors import CappyError
from cluster.lease import Lease
from cluster.progress import log
from evaluation import statistics
from evaluation.evaluate import PairScorer
from evaluation.methods import consensus_rank
from evaluation.statistics import Integers
from evaluation.suites import results as suite_results
from evaluation.suites.cost import replay_costs
from evaluation.suites.pools import Pools, pool_values
from evaluation.suites.rivals import add_rivals
from evaluation.suites.scores import Row, ScoreStore, add_field, score_candidates, scorer_folder
from evaluation.suites.steps import Steps
from generation import engines, generate
from generation.dataset import RegressionSet
from generation.resplit import publish_resplit
from generation.sampler import LoadLLM
from training import adapt, selection
from training.cross_fit import deal_folds

_COLUMNS = ("id", "dataset", "template", "instruction", "references", "candidates")
_CALIBRATION_BINS = 10
LoadScorer = Callable[[str], PairScorer]


def run_sampled(
    config: Config, steps: Steps, held: Lease, zero_shot: str | None, load: LoadScorer, load_llm: LoadLLM = engines.load_engine
) -> tuple[dict[str, Any], list[Row]]:
    """Run or resume the folds; return the results, and the rows with `fold`, the values by method, and the scores of the candidates.

    Args:
        config: the config with its `suite`.
        steps: measures the steps.
        held: the lease of the evaluation.
        zero_shot: the scorer that no task of the suite was trained on; None leaves it out.
        load: loads a scorer by its URI.
        load_llm: loads the LLM, for candidates that are not sampled yet.
    """
    suite = config.suite
    assert suite is not None
    if not storage.exists(storage.join(config.dataset_uri, artifacts.MANIFEST)):
        with steps.step("generate"):
            generate.run_generate(config, load=load_llm)
    dataset = RegressionSet(config.dataset_uri)
    rows = read_all_rows(dataset)
    folds_R = _deal(rows, suite.folds, config.seed)
    store = ScoreStore(storage.join(config.workspace, "scores"), str(dataset.manifest.get("writer")), held)
    tasks = sorted({row["dataset"] for row in rows})
    models: list[str] = []
    zero_shot_selection: selection.Selection | None = None
    if zero_shot is not None:
        models.append("scorer")
        with steps.step("score zero-shot") as measured:
            add_field(rows, "scorer", score_candidates(store, "zero-shot", rows, dict.fromkeys(tasks, zero_shot), load))
            measured |= {"pairs": store.pairs, "scoring_seconds": store.seconds}
        zero_shot_selection = selection.read(scorer_folder(zero_shot))
        if zero_shot_selection is not None:
            models.append("scorer_fitted")
    else:
        log("zero-shot scorer left out: scorer_path and adapt.base name none")
    rivals = add_rivals(config, rows, store, steps, load)
    selections: dict[tuple[str, int], selection.Selection | None] = {}
    outcomes: list[dict[str, Any]] = []
    if suite.adapted:
        models += ["adapted", "fitted_no_scorer", "fitted"]
        for fold in range(suite.folds):
            scorers = _adapt_fold(config, dataset, rows, folds_R == fold, fold, steps, outcomes)
            of_fold = [row for row, number in zip(rows, folds_R, strict=True) if number == fold]
            with steps.step("score adapted") as measured:
                before = store.pairs, store.seconds
                _score_adapted(of_fold, scorers, store, f"fold-{fold}", load, _label(dataset))
                measured |= {"pairs": store.pairs - before[0], "scoring_seconds": store.seconds - before[1]}
            selections |= {(task, fold): selection.read(scorer_folder(uri)) if uri else None for task, uri in scorers.items()}
    pools = Pools(
        rows,
        folds_R,
        dataset.manifest["config"]["sampler"]["decodings"],
        _label(dataset),
        selections,
        zero_shot_selection,
        tuple(models),
        rivals,
    )
    with steps.step("compare"):
        results, kept = compare_pools(pools, config, dataset.manifest.get("rates", {}), steps)
    return {**results, "adapt": outcomes, "dataset": dataset.uri}, kept


def read_all_rows(dataset: RegressionSet) -> list[Row]:
    """Return the rows of all splits with their sampled candidates only. Rows without any are left out.

    Raises `CappyError` if no row has sampled candidates.
    """
    rows = []
    for split in dataset.manifest["counts"]:
        for table in dataset.batches(split, columns=_COLUMNS):
            for row in table.to_pylist():
                row["candidates"] = [each for each in row["candidates"] if each["source"] == "sampled"]
                if row["candidates"]:
                    rows.append(row)
    if not rows:
        raise CappyError(f"dataset={dataset.uri} has no sampled candidates; suite.kind=sampled needs generation tasks")
    return rows


def _label(dataset: RegressionSet) -> LabelConfig:
    return LabelConfig.model_validate(dataset.manifest["config"]["generate"].get("label", {}))


def _deal(rows: Sequence[Row], folds: int, seed: int) -> Integers:
    """Return the fold of each row, [R]; the folds of a task differ by one instruction at most."""
    found = np.zeros(len(rows), np.int64)
    for task in sorted({row["dataset"] for row in rows}):
        indices = [index for index, row in enumerate(rows) if row["dataset"] == task]
        found[indices] = deal_folds([rows[index]["instruction"] for index in indices], folds, seed)
    return found


def _score_adapted(
    rows: Sequence[Row], scorers: Mapping[str, str | None], store: ScoreStore, name: str, load: LoadScorer, label: LabelConfig
) -> None:
    """Add `adapted` to the candidates: the score of the scorer of their task, or the consensus for a task without a scorer."""
    with_scorer = [row for row in rows if scorers[row["dataset"]]]
    uris = {task: uri for task, uri in scorers.items() if uri}
    add_field(with_scorer, "adapted", score_candidates(store, name, with_scorer, uris, load))
    others = [row for row in rows if not scorers[row["dataset"]]]
    rank = consensus_rank(label)
    add_field(others, "adapted", [np.asarray(rank(row["instruction"], row["candidates"])) for row in others])


def _adapt_fold(
    config: Config,
    dataset: RegressionSet,
    rows: Sequence[Row],
    validation_R: np.ndarray,
    fold: int,
    steps: Steps,
    outcomes: list[dict[str, Any]],
) -> dict[str, str | None]:
    """Adapt a scorer to the train rows of each task in a fold; return the URI of the scorer of each task.

    It is the base for a task whose scorer the gate rejected, and None if the base is not a scorer. Raises `CappyError` if a task failed.
    """
    suite = config.suite
    assert suite is not None
    folder = storage.join(config.workspace, "folds", str(fold))
    validation = dict.fromkeys(_ids(dataset), False) | {row["id"]: bool(held) for row, held in zip(rows, validation_R, strict=True)}
    with steps.step("split"):
        note = {"fold": fold, "folds": suite.folds, "seed": config.seed}
        publish_resplit(dataset, storage.join(folder, "dataset"), "workspace", validation, note)
    of_fold = config.model_copy(
        update={"dataset": storage.join(folder, "dataset"), "adapted_path": storage.join(folder, "adapted"), "suite": None}
    )
    with steps.step("adapt"):
        log(f"fold {fold + 1} of {suite.folds}")
        summary = adapt.run_adapt(of_fold)
    failed = [outcome for outcome in summary["tasks"] if outcome["state"] == "failed"]
    if failed:
        raise CappyError(
            f"fold {fold}: {len(failed)} of {len(summary['tasks'])} tasks failed, first {failed[0]['task']}: {failed[0]['error']}; "
            f"correct it and run the same command again to resume"
        )
    kept = ("task", "state", "train_rows", "distinct_pairs", "steps", "gate", "seconds")
    outcomes += [{"fold": fold, **{key: outcome.get(key) for key in kept}} for outcome in summary["tasks"]]
    return {outcome["task"]: outcome["use"] for outcome in summary["tasks"]}


def _ids(dataset: RegressionSet) -> list[str]:
    tables = [table for split in dataset.manifest["counts"] for table in dataset.batches(split, columns=["id"])]
    return [row_id for table in tables for row_id in table["id"].to_pylist()]


def compare_pools(pools: Pools, config: Config, rates: Mapping[str, Any], steps: Steps) -> tuple[dict[str, Any], list[Row]]:
    """Return the results of all methods, and the rows that all methods can rank, with their `values` by method.

    `rates` are those of the set with the candidates.
    """
    rows, settings = pools.rows, config.evaluation
    methods = pools.methods(rows[0]["dataset"], int(pools.folds[0]))
    by_method = pool_values(pools, rows, pools.folds, [each["candidates"] for each in rows])
    complete = suite_results.complete_values(methods, by_method)
    kept = [rows[index] for index in complete.rows]
    folds_R = pools.folds[complete.rows]
    names, tasks_R = np.unique([row["dataset"] for row in kept], return_inverse=True)
    roles = {each.name: each.role for each in methods if each.name in complete.by_method}
    titles = {each.name: each.title or each.name for each in methods if each.name in complete.by_method}
    values = dict(complete.by_method)
    baselines = {name: values[name] for name, role in roles.items() if role == "baseline"}
    values[suite_results.BEST], chosen = suite_results.best_baseline_values(baselines, tasks_R, folds_R)
    roles[suite_results.BEST], titles[suite_results.BEST] = "baseline", "Best baseline on train rows"
    compared = suite_results.compare(
        values, roles, [str(name) for name in names], tasks_R, settings.resamples, settings.confidence, config.seed
    )
    for row, fold, index in zip(kept, folds_R.tolist(), range(len(kept)), strict=True):
        row["fold"] = fold
        row["values"] = {name: float(each[index]) for name, each in values.items()}
    return {
        **compared,
        "titles": titles,
        "roles": roles,
        "headline": next((name for name in ("fitted", "scorer_fitted") if name in values), next(iter(values))),
        "rival": suite_results.BEST,
        "left_out": complete.left_out,
        "skipped": {"incomplete": len(rows) - len(kept)},
        "best_baselines": {str(names[task]): {str(fold): name for (of, fold), name in chosen.items() if of == task} for task, _ in chosen},
        "candidates": sum(len(row["candidates"]) for row in kept),
        "calibration": {name: _calibration(kept, name) for name in ("scorer", "adapted") if name in values},
        "cost": replay_costs(pools, kept, folds_R, tasks_R, config, rates, steps),
    }, kept


def _calibration(rows: Sequence[Row], name: str) -> list[dict[str, float]]:
    """Return groups of the distinct candidates by the score `name`, with mean score and mean label."""
    distinct = [each for row in rows for each in {each["response"]: each for each in row["candidates"]}.values()]
    scores, values = (np.asarray([each[field] for each in distinct], np.float64) for field in (name, "label"))
    return statistics.calibration(scores, values, _CALIBRATION_BINS)
