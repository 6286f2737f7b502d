"""The published files of `score`: the columns of a scored pair, the shards, the card and the plot of the scores. Imports no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import yaml

from generation import dataset_card, shards, units
from generation.dataset import LABEL_BINS
from generation.pair_units import PAIRS
from serving import own_columns
from serving.own_columns import published_names

WORKING_FILES = (
    r"_lease/\d+\.json",
    r"_staging/(run|prepared|arithmetic)\.json",
    r"_staging/prepared/dead_letters\.jsonl",
    r"_staging/(prepared|units)/scores-\d+\.parquet",
    r"_staging/letters/scores-part-[^/]+\.jsonl",
    r"data/scores/part-\d{5,}-[0-9a-f]{8}\.parquet",
)
"""Patterns of the files of an unfinished run, for `artifacts.OwnedFiles`."""
RESULT_FILES = (r"config\.yaml|README\.md|scores\.svg|dead_letters\.jsonl",)
"""Patterns of the other files of published scores, except the manifest."""

FINE_BINS = 1000
"""Bins of [0, 1] from which the quantiles of the scores are computed."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ROW = tuple(PAIRS.field(name) for name in ("id", "instruction", "response"))
_ADDED = (pa.field("score", pa.float32(), nullable=False), pa.field("logit", pa.float32(), nullable=False))
_COLUMNS = {
    "id": "32 hex digits, a hash of the row; equal rows have equal ids",
    "instruction": "the instruction as the scorer read it, with the context columns of the row",
    "response": "the response as the scorer read it",
    "score": "an estimate of Rouge-L in [0, 1]: `logit`, limited to this range",
    "logit": "the raw output of the scorer, which ranks the rows",
}


class ScoredShard(TypedDict):
    """The result of `write_scores`."""

    entry: dict[str, Any]
    """Bytes, rows and SHA-256 of the shard, for the manifest."""
    letters: int
    """Number of dead letters."""
    repeated: int
    """Number of pairs that repeat another pair of their unit, which is scored once."""
    below: int
    """Number of rows that were dropped because of their score."""
    ranked_out: int
    """Number of rows that were dropped because of better rows of their instruction."""
    bins: list[int]
    """Counts of all scores, dropped rows included, in `FINE_BINS` equal bins of [0, 1]."""
    score_sum: float
    """Sum of these scores."""


def own_names(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the published names of the own columns of the rows; see `own_columns.published_names`."""
    return published_names(columns, [field.name for field in (*_ROW, *_ADDED)])


def score_schema(columns: Mapping[str, str]) -> pa.Schema:
    """Return the columns of published scores. `columns` are the types of the own columns; see `prompt_units.ColumnTypes`."""
    return pa.schema([*_ROW, *own_columns.fields(columns, own_names(columns)), *_ADDED])


def write_scores(
    names: Sequence[str],
    staging: str,
    target: str,
    columns: Mapping[str, str],
    keep_above: float | None,
    kept: np.ndarray | None,
    row_group_rows: int,
    check: Callable[[], None],
) -> ScoredShard:
    """Merge finished units into one shard, and write their dead letters below `{staging}/letters`.

    Args:
        names: The units, in the order of their rows.
        staging: URI of the staging folder.
        target: URI of the shard.
        columns: Types of the own columns of the rows.
        keep_above: Smallest score of a row that is kept; None keeps all.
        kept: Whether each row is among the best of its instruction, bool (rows of the units,); None keeps all.
        row_group_rows: Rows of a row group.
        check: Raises if the run has lost its lease; it is called before the first write.
    """
    schema, published = score_schema(columns), own_names(columns)
    letters: list[str] = []
    bins = np.zeros(FINE_BINS, np.int64)
    repeated = below = ranked_out = first = 0
    score_sum = 0.0

    def read_units() -> Iterator[pa.Table]:
        nonlocal bins, repeated, below, ranked_out, first, score_sum
        for name in names:
            scored = shards.read_finished(staging, name, "score")
            prepared = units.read_unit(units.unit_uri(staging, "prepared", name))
            metadata = units.unit_metadata(scored)
            letters.extend(metadata["letters"])
            repeated += metadata["counts"]["repeated"]  # type: ignore[typeddict-item]
            logits = scored["logit"].to_numpy()  # NaN without a score
            scores = np.clip(logits, 0, 1)
            known = np.isfinite(logits)
            bins += count_scores(scores[known])
            score_sum += float(scores[known].sum(dtype=np.float64))
            good = known if keep_above is None else known & (scores >= keep_above)
            best = good if kept is None else good & kept[first : first + len(logits)]
            first += len(logits)
            below += int(known.sum() - good.sum())
            ranked_out += int(good.sum() - best.sum())
            rows = prepared.take(pa.array(np.flatnonzero(best))).to_pylist()
            numbers = zip(scores[best].tolist(), logits[best].tolist(), strict=True)
            yield pa.Table.from_pylist(
                [
                    {**row, **own_columns.values(row["own"], columns, published), "score": score, "logit": logit}
                    for row, (score, logit) in zip(rows, numbers, strict=True)
                ],
                schema,
            )

    entry = shards.write_tables(read_units(), schema, target, row_group_rows, check)
    shards.write_letters(staging, target, letters)
    return {
        "entry": entry,
        "letters": len(letters),
        "repeated": repeated,
        "below": below,
        "ranked_out": ranked_out,
        "bins": bins.tolist(),
        "score_sum": score_sum,
    }


def count_scores(scores: np.ndarray) -> np.ndarray:
    """Return the counts of scores in [0, 1] in `FINE_BINS` equal bins, of which the last includes 1."""
    return np.bincount(np.minimum((scores * FINE_BINS).astype(np.int64), FINE_BINS - 1), minlength=FINE_BINS)


def distribution(bins: Sequence[int], score_sum: float) -> dict[str, Any]:
    """Return `mean`, quantiles (`p5` to `p95`, exact to one bin) and `bins`, the counts in `LABEL_BINS` equal bins of [0, 1].

    Args:
        bins: Counts in `FINE_BINS` equal bins.
        score_sum: Sum of the scores.
    """
    total = sum(bins)
    if not total:
        return {"mean": None, "bins": [0] * LABEL_BINS}
    places = np.searchsorted(np.cumsum(bins), [share * total for share in _QUANTILES])
    middles = [round((int(place) + 0.5) / FINE_BINS, 4) for place in places]
    quantiles = {f"p{round(100 * share)}": middle for share, middle in zip(_QUANTILES, middles, strict=True)}
    coarse = np.reshape(bins, (LABEL_BINS, -1)).sum(axis=1).tolist()
    return {"mean": round(score_sum / total, 6), **quantiles, "bins": coarse}


def plot_scores(bins: Sequence[int]) -> bytes:
    """Plot the counts of scores in equal bins of [0, 1] and return the SVG image."""
    return dataset_card.plot_histogram(bins, xlabel="score", ylabel="pairs", title="all scored pairs")


def render_card(manifest: Mapping[str, Any]) -> str:
    """Return the card of published scores: Markdown with the YAML header of the Hugging Face hub."""
    summary = manifest["summary"]
    header = {
        "license": manifest["config"]["generate"].get("license") or "unknown",
        "task_categories": ["text-ranking"],
        "size_categories": [dataset_card.size_category(summary["rows"])],
        "tags": ["cappy-ray", "scores"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/scores/part-*.parquet"}]}],
    }
    own = set(manifest["own_columns"].values())
    columns = dataset_card.markdown_table(
        ("column", "content", "type"),
        [
            (f"`{name}`", "a column of the source" if name in own else _COLUMNS.get(name, ""), kind)
            for name, kind in manifest["schema"].items()
        ],
    )
    scorer, scores = manifest["scorer"], summary["scores"]
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# Scored pairs

{summary["rows"]:,} rows. A scorer estimated the quality of the response in each row.

- Scorer: {scorer["uri"]}{f", version {scorer['version']}" if scorer["version"] else ""}, {scorer["dtype"]}
- Scored pairs: {summary["pairs"]:,}, with a mean score of {scores["mean"]}
- Dropped: {_describe_dropped(manifest["filters"], summary["dropped"])}
- Dead letters: {summary["dead_letters"]:,} (`dead_letters.jsonl` has the reasons)

Made by `{manifest["command"]}` ({manifest["code_version"]}).

![scores](scores.svg)

{columns}

```python
import pandas
scores = pandas.read_parquet("data/scores")
```
"""


def _describe_dropped(filters: Mapping[str, Any], dropped: Mapping[str, int]) -> str:
    parts = []
    if filters["keep_above"] is not None:
        parts.append(f"{dropped['below']:,} with a score below {filters['keep_above']:g}")
    if filters["top_per_instruction"] is not None:
        parts.append(f"{dropped['ranked_out']:,} that were not among the best {filters['top_per_instruction']} of their instruction")
    return "; ".join(parts) or "none"
