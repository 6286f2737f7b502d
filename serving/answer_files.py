"""The published files of `answer`: the columns of an answer, the shards, and the card. Imports no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import pyarrow as pa
import yaml

from generation import shards, units
from serving import own_columns
from serving.answer_rows import ANSWER_COLUMNS, ROW_COLUMNS, SCORED

WORKING_FILES = (
    r"_lease/\d+\.json",
    r"_staging/(run|prepared)\.json",
    r"_staging/prepared/dead_letters\.jsonl",
    r"_staging/(prepared|sampled|units)/answers-\d+(\.\d+)?\.parquet",
    r"_staging/letters/answers-part-[^/]+\.jsonl",
    r"data/answers/part-\d{5,}-[0-9a-f]{8}\.parquet",
    r"_staging/promises/answers-\d+(\.\d+)?-[0-9a-f]{32}\.json",
    r"_staging/attempts/answers-\d+(\.\d+)?/((batch|single|row-[^/]+)-[0-9a-f]{32}|answer-[^/]+)\.json",
    r"_staging/attempts/load/[0-9a-f]{32}\.json",
)
"""Patterns of the files of an unfinished run, for `artifacts.OwnedFiles`."""
RESULT_FILES = (r"config\.yaml|README\.md|dead_letters\.jsonl",)
"""Patterns of the other files of published answers, except the manifest."""

_COLUMNS = {
    "id": "32 hex digits, a hash of the row",
    "dataset": "the dataset of the row",
    "template": "the prompt template, or null",
    "instruction": "the instruction as the source has it, without shots",
    "references": "the correct responses, if the source has them; the answers do not depend on them",
    "answer_choices": "the choices of a row that the scorer classified, or null",
    "response": "the best candidate, or the best choice; null if `abstained`",
    "score": "the score of the best candidate: a raw logit, an estimate of Rouge-L",
    "n_candidates": "number of candidates",
    "tokens": "sampled tokens of all candidates",
    "cost": "cost of the candidates in dollars, if the LLM is an endpoint with prices",
    "abstained": "whether no candidate reached `answer.min_score`",
    "selected_by": "`score`, `fitted`, `blend`, `consensus`, `choices` or a fallback: `self_score`, `first`",
    "candidates": "all candidates in the order of sampling, with `score`, `logprob`, `tokens` and `decoding`",
}


class AnsweredShard(TypedDict):
    """The result of `write_answers`."""

    entry: dict[str, Any]
    """Bytes, rows and SHA-256 of the shard, for the manifest."""
    letters: int
    """Number of dead letters."""
    counts: dict[str, int]
    """Counts of rows by name: `answers`, `abstained`, `classified`, `candidates`, `tokens`, `empty`, and `by:{selected_by}`."""
    cost: float
    """Dollars, dead letters included."""
    score_sum: float
    """Sum of the known scores."""
    scored: int
    """Number of known scores."""


def own_names(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the published names of the own columns of the rows. A name that an answer has already gets the prefix `source_`."""
    taken = {field.name for field in (*ROW_COLUMNS, *ANSWER_COLUMNS)} | {"candidates"}
    return own_columns.published_names(columns, taken)


def answer_schema(columns: Mapping[str, str], keep_candidates: bool) -> pa.Schema:
    """Return the columns of published answers. `columns` are the types of the own columns; see `prompt_units.ColumnTypes`."""
    own = own_columns.fields(columns, own_names(columns))
    return pa.schema([*ROW_COLUMNS, *own, *ANSWER_COLUMNS, *([pa.field("candidates", SCORED)] if keep_candidates else [])])


def write_answers(
    groups: Sequence[Sequence[str]],
    staging: str,
    target: str,
    columns: Mapping[str, str],
    keep_candidates: bool,
    row_group_rows: int,
    check: Callable[[], None],
) -> AnsweredShard:
    """Merge finished units into one shard, and write their dead letters below `{staging}/letters`.

    Args:
        groups: The units of each unit of the source, one of each round. The rows get the order of the source.
        staging: URI of the staging folder.
        target: URI of the shard.
        columns: Types of the own columns of the rows.
        keep_candidates: Whether the shard has the candidates.
        row_group_rows: Rows of a row group.
        check: Raises if the run has lost its lease; it is called before the first write.
    """
    schema, names = answer_schema(columns, keep_candidates), own_names(columns)
    letters: list[str] = []
    counts: Counter[str] = Counter()
    cost = score_sum = 0.0
    scored = 0

    def read_groups() -> Iterator[pa.Table]:
        nonlocal cost, score_sum, scored
        for group in groups:
            rows: list[dict[str, Any]] = []
            for name in group:
                table = shards.read_finished(staging, name, "answer")
                metadata = units.unit_metadata(table)
                letters.extend(metadata["letters"])
                cost += metadata["counts"]["cost"]
                counts.update(candidates=metadata["counts"]["candidates"], tokens=metadata["counts"]["tokens"])
                counts.update(empty=metadata["counts"].get("empty", 0))
                rows += table.to_pylist()
            for row in rows:
                counts.update({"answers": 1, f"by:{row['selected_by']}": 1, "abstained": int(row["abstained"])})
                counts.update(classified=int(row["answer_choices"] is not None))
                if row["score"] is not None:
                    score_sum += row["score"]
                    scored += 1
            ordered = sorted(rows, key=lambda row: int(row["position"]))
            published = [{**row, **own_columns.values(row["own"], columns, names)} for row in ordered]
            yield pa.Table.from_pylist(published, schema)

    entry = shards.write_tables(read_groups(), schema, target, row_group_rows, check)
    shards.write_letters(staging, target, letters)
    return {"entry": entry, "letters": len(letters), "counts": dict(counts), "cost": cost, "score_sum": score_sum, "scored": scored}


def render_card(manifest: Mapping[str, Any]) -> str:
    """Return the card of published answers: Markdown with the YAML header of the Hugging Face hub."""
    summary, config = manifest["summary"], manifest["config"]
    header = {
        "license": config["generate"].get("license") or "unknown",
        "task_categories": ["text-generation"],
        "tags": ["cappy-ray", "boosted-decoding"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/answers/part-*.parquet"}]}],
    }
    own = set(manifest["own_columns"].values())
    rows = [
        f"| `{name}` | {'a column of the source' if name in own else _COLUMNS.get(name, '')} | {kind} |"
        for name, kind in manifest["schema"].items()
    ]
    scorer, selected = manifest["scorer"], ", ".join(f"{name} {count:,}" for name, count in summary["selected_by"].items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# Answers by boosted decoding

{summary["answers"]:,} rows. For each, {config["sampler"]["model"]} sampled candidates, and a scorer selected the answer.
Rows with `answer_choices` were classified by the scorer alone.

- Scorer: {scorer["uri"] or "none"}{f", version {scorer['version']}" if scorer["version"] else ""}
- Selection: `serving.selection={config["serving"]["selection"]}`; rows by selection: {selected or "none"}
- Candidates: {summary["candidates"]:,}, with {summary["tokens"]:,} tokens; ${summary["cost"]:,.4f}
- Abstained: {summary["abstained"]:,}; dead letters: {summary["dead_letters"]:,} (`dead_letters.jsonl` has the reasons)

Made by `cappy answer config.yaml` ({manifest["code_version"]}).

| column | content | type |
| --- | --- | --- |
{chr(10).join(rows)}

```python
import pandas
answers = pandas.read_parquet("data/answers")
```
"""
