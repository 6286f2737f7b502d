"""`cappy evaluate`: score the sampled candidates of a published set, compare the picks, publish numbers and report.

Nothing is sampled and no Ray is needed: a published set holds the candidates, and validation rows are few. Scoring is a
function of its own (`score_rows`), so that it can move to Ray Data actors where they are many.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster import artifacts, folder_writer, storage
from cluster.config import Config
from cluster.errors import CappyError
from cluster.progress import Bar, log
from cluster.runtime import code_version
from evaluation import report
from evaluation.comparison import Comparison, Row, compare_methods, pick_baselines
from evaluation.statistics import Integers
from generation.dataset import RegressionSet
from training.adapted_index import read_published

VERSION = 1
_COLUMNS = ("id", "dataset", "instruction", "references", "candidates")
_PAIRS_AT_ONCE = 512
_MARK = "_staging/run.json"
_OWNED = artifacts.OwnedFiles(
    "evaluation", "evaluate", (r"_staging/run\.json",), r"_staging/run\.json", (r"results\.json|rows\.parquet|report\.html|config\.yaml",)
)

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
    """Anything that scores pairs: our scorer, or a rival in its place. A `logprob_weight` it has makes the blend a method too."""

    def score(self, instructions: list[str], responses: list[str]) -> NDArray[np.floating[Any]]:
        """Return one number a pair, higher is better."""
        ...


def load_scorer(config: Config) -> PairScorer:
    """Load the published scorer, in float32: an evaluation must not depend on the hardware's fast arithmetic."""
    from training.scorer import Scorer

    return Scorer.load(config.scorer_uri, dtype="float32", setting="scorer_path")


def run_evaluate(config: Config, *, overwrite: bool = False, load: Callable[[Config], PairScorer] = load_scorer) -> dict[str, Any]:
    """Evaluate the scorer on `config.evaluation.split` and publish to `config.evaluation_uri`; return the summary.

    Writes `results.json`, `rows.parquet`, `report.html` and `config.yaml`, then the manifest. What is there is replaced only
    with `overwrite`, and only once the new result exists.
    """
    uri = storage.check_uri(config.evaluation_uri, "evaluation_path")
    if not overwrite:
        artifacts.refuse_published(uri, "evaluation_path", "evaluate")
    artifacts.refuse_foreign(uri, "evaluation_path", _OWNED, overwrite=overwrite)
    dataset = RegressionSet(config.dataset_uri)
    rows, without = read_rows(dataset, config.evaluation.split)
    base = pick_baselines(rows, dataset.manifest["config"]["sampler"]["decodings"])
    for name, reason in base.left_out.items():
        log(f"evaluate: {name} is left out: {reason}")
    adapted: dict[str | None, str] = {}
    if config.evaluation.adapted:
        adapted = {scorer.dataset: scorer.uri for scorer in read_published(config.adapted_uri, "evaluation.adapted")}
        scored, weight = score_rows_by_task(base.rows, adapted, config, load), None  # each scorer would have a weight of its own
    else:
        scorer = load(config)
        scored, weight = score_rows(scorer, base.rows), getattr(scorer, "logprob_weight", None)
    compared = compare_methods(scored, base.picks, config.evaluation, config.seed, weight)
    results = {
        **compared.results,
        "logprob_weight": weight,
        "left_out": base.left_out,
        "skipped": {"without_samples": without, "incomplete": base.incomplete},
        "made": {**_provenance(config, dataset, uri), "adapted": sorted(adapted.values())},
    }
    table = to_table(scored, compared)
    page = report.render_report(results, table, config.evaluation.examples)

    if overwrite:
        artifacts.withdraw(uri, "evaluation_path", _OWNED)
    artifacts.finish_withdrawal(uri, "evaluation_path", _OWNED)
    # Until the manifest is there, it tells the next run that the other files are an evaluation's.
    storage.write_json(storage.join(uri, _MARK), {"scorer": config.scorer_uri, "dataset": config.dataset_uri})
    folder = folder_writer.FolderWriter(uri)
    files = {
        "results.json": folder.write_json("results.json", results),
        "rows.parquet": folder.write_bytes("rows.parquet", _parquet(table)),
        "report.html": folder.write_bytes("report.html", page.encode()),
        "config.yaml": folder.write_bytes("config.yaml", config.to_yaml().encode()),
    }
    summary = summarise(uri, results)
    manifest = {
        "kind": "evaluation",
        "version": VERSION,
        **{key: results["made"][key] for key in ("created", "code_version", "dataset", "scorer")},
        "summary": summary,
        "config": config.model_dump(mode="json"),
        "files": files,
    }
    artifacts.publish(uri, manifest)
    artifacts.cleanup(storage.join(uri, "_staging"))
    return summary


def _provenance(config: Config, dataset: RegressionSet, uri: str) -> dict[str, Any]:
    """What the result was made from, and the command that makes it again."""
    sampler = dataset.manifest["config"]["sampler"]
    scorer = config.scorer_uri  # a folder, or the name of a model on a hub
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
    """The encoder a published scorer was built on; None for a model that is not ours."""
    manifest = storage.join(scorer, artifacts.MANIFEST)
    return str(storage.read_json(manifest)["config"]["scorer"]["encoder"]) if storage.exists(manifest) else None


def read_rows(dataset: RegressionSet, split: str) -> tuple[list[Row], int]:
    """Return the split's rows with their sampled candidates only, and how many rows had none (classification rows).

    Raises `CappyError` when no row has any.
    """
    rows: list[Row] = []
    seen = 0
    for table in dataset.batches(split, columns=_COLUMNS):
        seen += table.num_rows
        for row in table.to_pylist():
            row["candidates"] = [each for each in row["candidates"] if each["source"] == "sampled"]
            if row["candidates"]:
                rows.append(row)
    if not rows:
        raise CappyError(
            f"dataset={dataset.uri} has no sampled candidates in its {seen} {split} rows, so there is nothing to pick from; "
            f"generate one with generation tasks, or set evaluation.split to another split"
        )
    return rows, seen - len(rows)


def score_rows(scorer: PairScorer, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a `score` on every candidate; a response repeated within an instruction is scored once.

    Raises `CappyError` when a score is not a finite number.
    """
    pairs = list(dict.fromkeys((row["instruction"], each["response"]) for row in rows for each in row["candidates"]))
    scores: dict[tuple[str, str], float] = {}
    with Bar("scoring", total=len(pairs), unit="candidates") as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            chunk = pairs[start : start + _PAIRS_AT_ONCE]
            values = np.asarray(scorer.score([text for text, _ in chunk], [text for _, text in chunk]), np.float64)
            if values.shape != (len(chunk),) or not np.isfinite(values).all():
                broken = f"{int((~np.isfinite(values)).sum())} scores that are no finite numbers"
                wrong = broken if values.shape == (len(chunk),) else f"an array of shape {values.shape}"
                raise CappyError(f"the scorer gave {wrong} for {len(chunk)} candidates; train it again or choose another scorer_path")
            scores.update(zip(chunk, values.tolist(), strict=True))
            bar.advance(len(chunk))
    return [
        {**row, "candidates": [{**each, "score": scores[row["instruction"], each["response"]]} for each in row["candidates"]]}
        for row in rows
    ]


def score_rows_by_task(
    rows: Sequence[Row], adapted: Mapping[str | None, str], config: Config, load: Callable[[Config], PairScorer] = load_scorer
) -> list[Row]:
    """Return what `score_rows` does, each task's rows scored by its own scorer (`adapted`: URIs), the others by the common one."""
    uris = [adapted.get(row["dataset"], adapted.get(None, config.scorer_uri)) for row in rows]
    scored: dict[int, Row] = {}
    for uri in dict.fromkeys(uris):
        places = [place for place, mine in enumerate(uris) if mine == uri]
        scorer = load(config.model_copy(update={"scorer_path": uri}))
        scored |= zip(places, score_rows(scorer, [rows[place] for place in places]), strict=True)
    return [scored[place] for place in range(len(rows))]


def to_table(rows: Sequence[Row], compared: Comparison) -> pa.Table:
    """Return what happened to each instruction: `rouge_l_{method}` (in [0, 1]) and `pick_{method}` (text), its candidates.

    A candidate's `picked_by` lists the methods that chose it.
    """
    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in rows], pa.string()),
        "dataset": pa.array([row["dataset"] for row in rows], pa.string()),
        "instruction": pa.array([row["instruction"] for row in rows], pa.string()),
        "references": pa.array([row["references"] for row in rows], pa.list_(pa.string())),
    }
    for method, positions in compared.picks.items():
        picked = [row["candidates"][at] for row, at in zip(rows, positions, strict=True)]
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


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def summarise(uri: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the verb prints: the results without curves and plots' data, and where the report is."""
    left_out = ("curves", "calibration", "methods", "made")
    return {"uri": uri, "report": storage.join(uri, "report.html"), **{key: value for key, value in results.items() if key not in left_out}}
