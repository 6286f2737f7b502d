"""`cappy inspect`: what a published folder holds, for people and for programs, and whether its files are sound."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import CappyError
from generation.dataset import LABEL_BINS, RegressionSet

_SOURCES = {
    "reference": "correct, label 1",
    "choice": "other answer choices, label 0",
    "mismatched": "references of other instructions, label 0",
    "sampled": "the LLM's, label Rouge-L",
}
_WIDTH = 40


def run(uri: str, *, samples: int = 2, verify: bool = True) -> dict[str, Any]:
    """Return a published folder's kind, summary, manifest facts, `problems` (with `verify`) and sample rows.

    Raises `CappyError` where nothing is published.
    """
    uri = storage.check(uri, "URI")
    try:
        manifest = storage.read_json(storage.join(uri, storage.MANIFEST))
    except (FileNotFoundError, ValueError):
        raise CappyError(
            f"URI={uri} has no readable {storage.MANIFEST}: nothing is there, or the run writing it did not finish; run its command again"
        ) from None
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
    if manifest["kind"] == "dataset":
        result |= {key: manifest[key] for key in ("metric", "lineage", "schema")}
        opened = RegressionSet(uri)
        split = next(iter(opened.manifest["counts"]))
        result["samples"] = next(opened.batches(split, max(1, samples))).slice(0, samples).to_pylist() if not result["problems"] else []
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result of `run`."""
    console.print(Text(f"{result['kind']} {result['uri']}", style="bold"))
    checked = "checksums match" if not result["problems"] else f"{len(result['problems'])} DAMAGED"
    state = checked if result["verified"] else "not checked"
    console.print(f"made {result['created']} by {result['code_version']}; {result['files']} files, {_size(result['bytes'])}, {state}")
    for problem in result["problems"]:
        console.print(Text(f"  {problem}", style="red"))
    if result["kind"] == "dataset":
        lineage = result["lineage"]
        decodings = ", ".join(f"{each['name']} x{each['n']}" for each in lineage["sampler"]["decodings"])
        prompt = lineage["sampler"]["prompt"]
        console.print(f"model {lineage['sampler']['model']}; decodings {decodings}; prompt {prompt['form']}, {prompt['shots']} shots")
        metric = result["metric"]
        mode = f"{metric['mode']} mode, " if metric["mode"] else ""
        console.print(f"labels {metric['name']} ({mode}version {metric['version']})")
    show_summary(result["kind"], result["summary"], console)
    for row in result.get("samples", []):
        _show_row(row, console)


def show_summary(kind: str, summary: dict[str, Any], console: Console) -> None:
    """Print the summary a verb returned and its manifest keeps."""
    if kind == "dataset":
        _show_dataset(summary, console)
    elif kind == "evaluation":
        from evaluation.table import print_table

        print_table(summary, console)
    else:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for key, value in _flat(summary):
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
    console.print("datasets: " + ", ".join(f"{name} {count:,}" for name, count in summary["datasets"].items()))
    console.print("labels")
    top = max(summary["labels"]) or 1
    for index, count in enumerate(summary["labels"]):
        bar = "█" * round(_WIDTH * count / top)
        close = "]" if index == LABEL_BINS - 1 else ")"
        console.print(Text(f"  [{index / LABEL_BINS:.1f}, {(index + 1) / LABEL_BINS:.1f}{close} {bar:<{_WIDTH}} {count:,}"))
    if summary["dead_letters"]:
        console.print(
            Text(f"{summary['dead_letters']:,} rows left out, each with its reason: {summary['uri']}/dead_letters.jsonl", style="yellow")
        )
    console.print(f"{summary['uri']} in {summary['seconds']:,.0f} s")


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


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
