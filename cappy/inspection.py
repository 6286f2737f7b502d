"""`cappy inspect`: what a published folder holds, for people and for programs, and whether its files are sound."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import CappyError, first_line
from generation.dataset import LABEL_BINS

_SOURCES = {
    "reference": "correct, label 1",
    "choice": "other answer choices, label 0",
    "mismatched": "references of other instructions, label 0",
    "sampled": "the LLM's, label Rouge-L",
}
_WIDTH = 40
_DATASETS = 24
_REASONS = 8
_DEAD_LETTERS = "dead_letters.jsonl"
_NUMBER = r"\b\d[\d.,]*\b"


def run_inspect(uri: str, *, samples: int = 2, verify: bool = True) -> dict[str, Any]:
    """Return a published folder's kind, summary, manifest facts, `problems` (with `verify`) and sample rows.

    Raises `CappyError` where nothing is published.
    """
    uri = storage.check_uri(uri, "URI")
    manifest = storage.published(uri, "URI")
    result = {
        "uri": uri,
        "kind": manifest["kind"],
        "created": manifest["created"],
        "code_version": manifest["code_version"],
        "summary": manifest["summary"],
        "files": len(manifest["files"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "problems": storage.verify(uri, manifest) if verify else [],
        "verified": verify,
    }
    if manifest["kind"] in ("dataset", "pairs"):
        result |= {key: manifest[key] for key in ("metric", "lineage", "schema")}
        result |= {key: manifest[key] for key in ("rates", "cost", "copied_from", "made_from") if key in manifest}
        if not result["problems"]:
            try:
                result["dead_letters"] = _reasons(storage.join(uri, _DEAD_LETTERS)) if _DEAD_LETTERS in manifest["files"] else {}
                result["samples"] = _first_rows(uri, manifest, samples)
            except (OSError, ValueError) as error:
                raise CappyError(f"{uri} is damaged ({first_line(error)}); copy or make it again") from None
    return result


def _first_rows(uri: str, manifest: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The first rows of the first shard."""
    shard = min((name for name in manifest["files"] if name.startswith("data/")), default=None)
    if shard is None or not count:
        return []
    fs, path = storage.filesystem(storage.join(uri, shard))
    with fs.open_input_file(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        return list(next(parquet.iter_batches(batch_size=count)).to_pylist())


def _reasons(uri: str) -> dict[str, int]:
    """How many dead letters have each reason, numbers in it left out, most frequent first."""
    fs, path = storage.filesystem(uri)
    counts: Counter[str] = Counter()
    with fs.open_input_stream(path, compression=None) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            letter = json.loads(line)
            counts[f"{letter['stage']}: {re.sub(_NUMBER, 'N', letter['reason'])}"] += 1
    return dict(counts.most_common())


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result of `run`."""
    console.print(Text(f"{result['kind']} {result['uri']}", style="bold"))
    checked = "checksums match" if not result["problems"] else f"{len(result['problems'])} DAMAGED"
    state = checked if result["verified"] else "not checked"
    console.print(f"made {result['created']} by {result['code_version']}; {result['files']} files, {_size(result['bytes'])}, {state}")
    for problem in result["problems"]:
        console.print(Text(f"  {problem}", style="red"))
    if result["kind"] in ("dataset", "pairs"):
        _show_origin(result, console)
    show_summary(result["kind"], result["summary"] | ({"uri": result["uri"]} if "uri" in result["summary"] else {}), console)
    reasons = result.get("dead_letters", {})
    for reason, count in list(reasons.items())[:_REASONS]:
        console.print(Text(f"  {count:,} x {_short(reason, 200)}", style="yellow"))
    if len(reasons) > _REASONS:
        console.print(Text(f"  and {len(reasons) - _REASONS:,} reasons more", style="yellow"))
    for row in result.get("samples", []):
        _show_row(row if result["kind"] == "dataset" else {**row, "candidates": [row]}, console)


def _show_origin(result: dict[str, Any], console: Console) -> None:
    lineage, metric = result["lineage"], result["metric"]
    decodings = ", ".join(f"{each['name']} x{each['n']}" for each in lineage["sampler"]["decodings"])
    prompt = lineage["sampler"]["prompt"]
    console.print(f"model {lineage['sampler']['model']}; decodings {decodings}; prompt {prompt['form']}, {prompt['shots']} shots")
    mode = f"{metric['mode']} mode, " if metric["mode"] else ""
    console.print(f"labels {metric['name']} ({mode}version {metric['version']})")
    if "made_from" in result:
        console.print(Text(f"pairs of {result['made_from']['uri']}"))
    if "copied_from" in result:
        console.print(Text(f"copied from {result['copied_from']}"))
    for name in ("rates", "cost"):
        if result.get(name):
            console.print(Text(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in _flat(result[name]))))


def show_summary(kind: str, summary: dict[str, Any], console: Console) -> None:
    """Print the summary a verb returned and its manifest keeps."""
    if kind in ("dataset", "pairs"):
        _show_dataset(summary, console)
    elif kind == "evaluation":
        from evaluation.table import print_table

        print_table(summary, console)
    elif kind == "adapted":
        from evaluation.table import print_adapted

        print_adapted(summary, console)
    else:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for key, value in _flat(summary):
            if value is None or isinstance(value, list):  # not measured, or what the card shows as a plot
                continue
            table.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
        console.print(table)


def _show_dataset(summary: dict[str, Any], console: Console) -> None:
    splits = ", ".join(f"{split} {counts['instructions']:,}" for split, counts in summary["splits"].items())
    console.print(f"instructions {summary['instructions']:,} ({splits}); pairs {summary['pairs']:,}; sampled tokens {summary['tokens']:,}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("source", "pairs", "what"):
        table.add_column(name, justify="right" if name == "pairs" else "left")
    for source, count in summary["sources"].items():
        table.add_row(source, f"{count:,}", _SOURCES.get(source, ""))
    console.print(table)
    _show_datasets(summary["datasets"], console)
    _show_labels(summary, console)
    if summary["dead_letters"]:
        console.print(
            Text(f"{summary['dead_letters']:,} rows left out, each with its reason: {summary['uri']}/{_DEAD_LETTERS}", style="yellow")
        )
    console.print(f"{summary['uri']} in {summary['seconds']:,.0f} s")


def _show_datasets(datasets: dict[str, int], console: Console) -> None:
    """The instructions of each dataset, the largest first, side by side."""
    largest = sorted(datasets.items(), key=lambda item: (-item[1], item[0]))
    console.print(f"datasets {len(datasets):,}, with instructions")
    console.print(Columns([Text(f"{name} {count:,}") for name, count in largest[:_DATASETS]], padding=(0, 3), column_first=True))
    if len(largest) > _DATASETS:
        rest = largest[_DATASETS:]
        console.print(f"and {len(rest):,} more with {sum(count for _, count in rest):,}")


def _show_labels(summary: dict[str, Any], console: Console) -> None:
    """The label histogram: sampled responses as bars, the counts of all sources beside them."""
    labels = summary["source_labels"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("label")
    table.add_column("sampled" if "sampled" in labels else "")
    for source in labels:
        table.add_column(source, justify="right")
    sampled = labels.get("sampled", [0] * LABEL_BINS)
    top = max(sampled) or 1
    for index in range(LABEL_BINS):
        close = "]" if index == LABEL_BINS - 1 else ")"
        counts = [f"{labels[source][index]:,}" if labels[source][index] else "" for source in labels]
        bin_ = Text(f"[{index / LABEL_BINS:.1f}, {(index + 1) / LABEL_BINS:.1f}{close}")
        table.add_row(bin_, "█" * round(_WIDTH * sampled[index] / top), *counts)
    console.print(table)


def _show_row(row: dict[str, Any], console: Console) -> None:
    console.print()
    console.print(Text(f"{row['dataset']} / {row['template']}  {row['id'][:8]}", style="bold"))
    console.print(Text(_short(row["instruction"].strip(), 400)))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("label", justify="right")
    table.add_column("source")
    table.add_column("log-prob", justify="right")
    table.add_column("response")
    for candidate in sorted(row["candidates"], key=lambda candidate: -candidate["label"]):
        logprob = "" if candidate["logprob"] is None else f"{candidate['logprob']:.1f}"
        source = candidate["decoding"] or candidate["source"]
        table.add_row(f"{candidate['label']:.2f}", source, logprob, Text(_short(candidate["response"], 100)))
    console.print(table)


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _flat(tree: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        pairs += _flat(value, f"{path}{key}.") if isinstance(value, dict) else [(f"{path}{key}", value)]
    return pairs


def _number(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
