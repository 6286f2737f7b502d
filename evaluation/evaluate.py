"""`cappy evaluate`: score the sampled candidates of a published set, compare the picks, publish numbers and a report.

Imports no Ray: a published set already holds the candidates, and validation sets are small. Imports torch only when a scorer is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster import artifacts, models, storage, versions
from cluster.config import Config
from cluster.errors import CappyError
from cluster.progress import Bar, log
from cluster.runtime import code_version
from evaluation import publish, report
from evaluation.comparison import NO_SCORER, Comparison, Row, compare_methods, pick_baselines
from evaluation.statistics import Integers
from generation.dataset import RegressionSet
from training import adapted_index
from training.consensus import consensus_metric
from training.main_scorer import choose_scorer, with_default_scorer
from training.selection import Selection, blend_selection

_COLUMNS = ("id", "dataset", "instruction", "references", "candidates")
_PAIRS_AT_ONCE = 512

_CANDIDATE = pa.struct(
    [
        pa.field("response", pa.string(), nullable=False),
        pa.field("label", pa.float64(), nullable=False),  # Rouge-L, in [0, 1]
        pa.field("score", pa.float32(), nullable=False),  # the scorer's raw output, unbounded
        pa.field("decoding", pa.string()),
        pa.field("tokens", pa.int32()),
        pa.field("logprob", pa.float64()),
        pa.field("picked_by", pa.list_(pa.string()), nullable=False),
    ]
)


class PairScorer(Protocol):
    """A scorer of pairs: `training.scorer.Scorer` or another.

    With an attribute `logprob_weight` the blend is compared too, with an attribute `selection` the fitted selection.
    """

    def score(self, instructions: list[str], responses: list[str]) -> NDArray[np.floating[Any]]:
        """Return one number per pair; a higher number is better."""
        ...


def load_scorer(config: Config) -> PairScorer:
    """Load the published scorer in float32, so that the result does not depend on the hardware's lower precisions."""
    from training.scorer import Scorer

    return Scorer.load(
        config.scorer_uri, dtype="float32", setting="scorer_path", cpu_kernels=config.scorer.cpu_kernels, format=config.scorer.format
    )


def run_evaluate(config: Config, *, overwrite: bool = False, load: Callable[[Config], PairScorer] = load_scorer) -> dict[str, Any]:
    """Evaluate the scorer on `config.evaluation.split` and publish to `config.evaluation_uri`; return the summary.

    Without `scorer_path` and without a scorer in the workspace, the scorer of the package is evaluated. Writes `results.json`,
    `rows.parquet`, `report.html` and `config.yaml`, then the manifest. A lease (`_lease`) excludes a second run.

    Args:
        config: the whole config.
        overwrite: replace a published evaluation, once the new results are computed.
        load: loads the scorer of a config.

    Raises `UsageError` if the folder holds other files, or a published evaluation and `overwrite` is false. Raises `CappyError` if the
    set or the scorer cannot be used, or another run holds the lease.
    """
    uri = storage.check_uri(config.evaluation_uri, "evaluation_path")
    RegressionSet(config.dataset_uri)  # without a set, the command must leave no folder of a lease
    config = with_default_scorer(config, "evaluate")
    inputs = read_inputs(config)
    with publish.hold_destination(config, overwrite=overwrite) as held:
        results, table = _compare(config, uri, load)
        summary = summarise(uri, results)
        page = report.render_report(results, table, config.evaluation.examples)
        publish.publish_evaluation(config, results, table, page, summary, overwrite, held, inputs=inputs)
    return summary


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine the result. The inputs are in `read_inputs`."""
    return {"seed": config.seed, "evaluation": config.evaluation.model_dump(mode="json")}


def read_inputs(config: Config) -> dict[str, str | None]:
    """Return the versions of the set, the scorer and the adapted scorers. A scorer without a manifest has its name or URI."""
    scorer = choose_scorer(config)
    inputs = {"dataset": versions.version(config.dataset_uri), "scorer": versions.version(scorer) or models.absolute(scorer)}
    return inputs | ({"adapted": adapted_index.version(config.adapted_uri)} if config.evaluation.adapted else {})


def _compare(config: Config, uri: str, load: Callable[[Config], PairScorer]) -> tuple[dict[str, Any], pa.Table]:
    """Score the rows of the split; return the content of `results.json` and of `rows.parquet`."""
    dataset = RegressionSet(config.dataset_uri)
    rows, without = read_rows(dataset, config.evaluation.split)
    metric = consensus_metric(dataset.manifest.get("metric"))
    base = pick_baselines(rows, dataset.manifest["config"]["sampler"]["decodings"], metric)
    for name, reason in base.left_out.items():
        log(f"evaluate: {name} is left out: {reason}")
    adapted: dict[str | None, str] = {}
    if config.evaluation.adapted:
        adapted = {scorer.dataset: scorer.uri for scorer in adapted_index.read_published(config.adapted_uri, "evaluation.adapted")}
    scored, selections = score_rows_by_task(base.rows, adapted, config, load)
    compared = compare_methods(scored, base.picks, config.evaluation, config.seed, selections)
    # Adapted scorers have no weight of a blend.
    blend = None if config.evaluation.adapted else selections["blend"][0]
    results = {
        **compared.results,
        "logprob_weight": blend.variants[0].weights[1] if blend else None,
        "left_out": base.left_out,
        "skipped": {"without_samples": without, "incomplete": base.incomplete},
        "made": {**_provenance(config, dataset, uri), "adapted": sorted(adapted.values())},
    }
    return results, to_table(scored, compared)


def _provenance(config: Config, dataset: RegressionSet, uri: str) -> dict[str, Any]:
    """Return the inputs of the evaluation and the command that repeats it."""
    sampler = dataset.manifest["config"]["sampler"]
    scorer = config.scorer_uri  # a folder, or the name of a model on the hub
    return {
        "dataset": dataset.uri,
        "scorer": storage.absolute(scorer) if storage.exists(scorer) else scorer,
        "encoder": _encoder(scorer),
        "split": config.evaluation.split,
        "sampler": {key: sampler[key] for key in ("model", "prompt", "decodings")},
        "command": f"cappy evaluate {'config.yaml' if storage.is_s3(uri) else storage.join(uri, 'config.yaml')} --overwrite",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": code_version(),
    }


def _encoder(scorer: str) -> str | None:
    """Return the encoder of a scorer from `cappy train`; None for a model without a manifest."""
    manifest = storage.join(scorer, artifacts.MANIFEST)
    return str(storage.read_json(manifest)["config"]["scorer"]["encoder"]) if storage.exists(manifest) else None


def read_rows(dataset: RegressionSet, split: str) -> tuple[list[Row], int]:
    """Return the split's rows with only their sampled candidates, and the number of rows without any (classification rows).

    Raises `CappyError` if no row has sampled candidates.
    """
    rows: list[Row] = []
    total = 0
    for table in dataset.batches(split, columns=_COLUMNS):
        total += table.num_rows
        for row in table.to_pylist():
            row["candidates"] = [each for each in row["candidates"] if each["source"] == "sampled"]
            if row["candidates"]:
                rows.append(row)
    if not rows:
        raise CappyError(
            f"dataset={dataset.uri} has no sampled candidates in its {total} {split} rows; "
            f"generate a set with generation tasks, or set evaluation.split to another split"
        )
    return rows, total - len(rows)


def score_rows(scorer: PairScorer, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a `score` on every candidate. A response that repeats within an instruction is scored once.

    Raises `CappyError` if a score is not a finite number.
    """
    pairs = list(dict.fromkeys((row["instruction"], each["response"]) for row in rows for each in row["candidates"]))
    scores: dict[tuple[str, str], float] = {}
    with Bar("scoring", total=len(pairs), unit="candidates") as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            chunk = pairs[start : start + _PAIRS_AT_ONCE]
            values = np.asarray(scorer.score([text for text, _ in chunk], [text for _, text in chunk]), np.float64)
            if values.shape != (len(chunk),) or not np.isfinite(values).all():
                not_finite = f"{int((~np.isfinite(values)).sum())} scores that are not finite numbers"
                problem = not_finite if values.shape == (len(chunk),) else f"an array of shape {values.shape}"
                raise CappyError(
                    f"the scorer returned {problem} for {len(chunk)} candidates; train the scorer again or set another scorer_path"
                )
            scores.update(zip(chunk, values.tolist(), strict=True))
            bar.advance(len(chunk))
    return [
        {**row, "candidates": [{**each, "score": scores[row["instruction"], each["response"]]} for each in row["candidates"]]}
        for row in rows
    ]


def score_rows_by_task(
    rows: Sequence[Row], adapted: Mapping[str | None, str], config: Config, load: Callable[[Config], PairScorer] = load_scorer
) -> tuple[list[Row], dict[str, list[Selection | None]]]:
    """Score every candidate, each task by its adapted scorer, the other tasks by the main scorer.

    Returns the rows with a `score` on every candidate, and for `blend`, `fitted_no_scorer` and `fitted` the selection of each row's
    scorer, [R]; None if it has none. `adapted` maps tasks to the URIs of their scorers.
    """
    uris = [adapted.get(row["dataset"], adapted.get(None, config.scorer_uri)) for row in rows]
    scored: dict[int, Row] = {}
    blend_of: dict[str, Selection | None] = {}
    fitted_of: dict[str, Selection | None] = {}
    for uri in dict.fromkeys(uris):
        indices = [index for index, row_uri in enumerate(uris) if row_uri == uri]
        scorer = load(config.model_copy(update={"scorer_path": uri}))
        scored |= zip(indices, score_rows(scorer, [rows[index] for index in indices]), strict=True)
        weight = getattr(scorer, "logprob_weight", None)
        blend_of[uri] = None if weight is None else blend_selection(weight)
        fitted_of[uri] = getattr(scorer, "selection", None)
    fitted = [fitted_of[uri] for uri in uris]
    selections = {"blend": [blend_of[uri] for uri in uris], NO_SCORER: fitted, "fitted": fitted}
    return [scored[index] for index in range(len(rows))], selections


def to_table(rows: Sequence[Row], compared: Comparison) -> pa.Table:
    """Return one row per instruction: `rouge_l_{method}` in [0, 1] and `pick_{method}` (the response) for each method, and candidates.

    A candidate's `picked_by` lists the methods that picked it.
    """
    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in rows], pa.string()),
        "dataset": pa.array([row["dataset"] for row in rows], pa.string()),
        "instruction": pa.array([row["instruction"] for row in rows], pa.string()),
        "references": pa.array([row["references"] for row in rows], pa.list_(pa.string())),
    }
    for method, indices in compared.picks.items():
        picked = [row["candidates"][index] for row, index in zip(rows, indices, strict=True)]
        columns[f"rouge_l_{method}"] = pa.array([each["label"] for each in picked], pa.float64())
        columns[f"pick_{method}"] = pa.array([each["response"] for each in picked], pa.string())
    columns["candidates"] = pa.array(_marked(rows, compared.picks), pa.list_(_CANDIDATE))
    return pa.table(columns)


def _marked(rows: Sequence[Row], picks: Mapping[str, Integers]) -> list[list[dict[str, Any]]]:
    fields = [field.name for field in _CANDIDATE if field.name != "picked_by"]
    return [
        [
            {**{field: each[field] for field in fields}, "picked_by": [method for method in picks if picks[method][index] == position]}
            for position, each in enumerate(row["candidates"])
        ]
        for index, row in enumerate(rows)
    ]


def summarise(uri: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of the verb: the results without the data of curves and plots, and the location of the report."""
    left_out = ("curves", "calibration", "methods", "made")
    return {"uri": uri, "report": storage.join(uri, "report.html"), **{key: value for key, value in results.items() if key not in left_out}}
