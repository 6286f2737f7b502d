"""The results of the verbs as tables on the terminal. Computes nothing beyond the text: all figures come from the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cappy.display_suites import show_suite
from generation.dataset import LABEL_BINS
from generation.export_card import LEFT_OUT

if TYPE_CHECKING:
    from cappy.doctor import Finding

_MIXTURE_ROWS = 40
_DEAD_LETTERS = "dead_letters.jsonl"


def show_plan(result: dict[str, Any], console: Console) -> None:
    """Print the result of `cappy plan`."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("dataset", "train", "validation", "tokens/prompt", "candidates", "pairs"):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    rows = sorted(result["mixture"].items(), key=lambda item: (-item[1]["pairs"], item[0]))
    for name, row in rows[:_MIXTURE_ROWS]:
        prompt = f"{row['mean_prompt_tokens']:,.0f}" if row["sampled_rows"] else ""
        table.add_row(Text(name), f"{row['train']:,}", f"{row['validation']:,}", prompt, f"{row['candidates']:,}", f"{row['pairs']:,}")
    console.print(table)
    if len(rows) > _MIXTURE_ROWS:
        rest = rows[_MIXTURE_ROWS:]
        console.print(Text(f"and {len(rest):,} datasets more with {sum(row['pairs'] for _, row in rest):,} pairs"))
    console.print()
    totals = result["totals"]
    tokens = totals["sampled_tokens"]
    lines = [
        ("left out", f"{result['dead_letters']:,} rows of the source that cannot be used"),
        ("merged", f"{result['merged']:,} repeated rows"),
        ("instructions", f"{totals['instructions']:,}, {totals['sampled_instructions']:,} of them sampled"),
        ("pairs", f"{totals['pairs']:,}: " + ", ".join(f"{name} {count:,}" for name, count in totals["pairs_by_source"].items())),
        *([("reused", f"{totals['reused_candidates']:,} candidates of earlier sets")] if totals["reused_candidates"] else []),
        ("prompt tokens", f"{totals['prompt_tokens']:,}"),
        ("sampled tokens", f"{tokens['expected']:,} expected, {tokens['most']:,} at most"),
        ("storage", size(totals["bytes"])),
    ]
    if result["compute"]:
        if machine := result["compute"]["machine"]:
            hours = machine["hours"]
            lines.append(("time on this machine", f"{duration(hours['expected'])} expected, {duration(hours['most'])} at most"))
        hours = result["compute"]["gpu_hours"]
        lines.append(("GPU-hours", f"{hours['expected']:,.3g} expected, {hours['most']:,.3g} at most, on {result['compute']['gpu']}"))
        for count, wall in result["compute"]["wall_hours"].items():
            lines.append((f"time on {int(count):,} GPU{'s' if count != '1' else ''}", duration(wall) if wall is not None else "too few"))
    lines.append(("dollars", f"{result['dollars']['expected']:,.2f} expected, {result['dollars']['most']:,.2f} at most"))
    if training := result["training"]:
        times = [f"{duration(training['gpu_hours'])} on one GPU"]
        if training["machine_hours"] is not None:
            times.insert(0, f"{duration(training['machine_hours'])} on this machine")
        lines.append(("training", f"{training['pairs']:,} pairs of {training['tokens_per_pair']:,.3g} tokens: {', '.join(times)}"))
    _print_pairs(lines, console)
    for warning in result["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))
    console.print()
    console.print("assumed")
    assumed = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for each in result["assumptions"]:
        value = f"{each['value']:,}" if isinstance(each["value"], int | float) else str(each["value"])
        assumed.add_row(Text(each["what"]), Text(value), Text(each["from"]))
    console.print(assumed)


def _print_pairs(lines: list[tuple[str, str]], console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in lines:
        table.add_row(name, Text(text))
    console.print(table)


def duration(hours: float) -> str:
    """Return hours in a readable unit: `12 s`, `8.4 min`, `3.2 h`, `5.1 days`."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"


def size(count: float) -> str:
    """Return bytes in a readable unit, in powers of 1,000: `1.4 MB`, `21.0 GB`."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


_SOURCES = {
    "reference": "correct, label 1",
    "choice": "other answer choices, label 0",
    "mismatched": "references of other instructions, label 0",
    "sampled": "the LLM's, labelled by the metric",
}
_WIDTH = 40
_DATASETS = 24
_REASONS = 8


def show_inspection(result: dict[str, Any], console: Console) -> None:
    """Print the result of `cappy inspect`."""
    console.print(Text(f"{result['kind']} {result['uri']}", style="bold"))
    checked = "checksums match" if not result["problems"] else f"{len(result['problems'])} DAMAGED"
    state = checked if result["verified"] else "not checked"
    size = format_size(result["bytes"])
    made = f"made {result['created']} by {result['code_version']}; " if result["created"] else ""
    console.print(Text(f"{made}{result['files']} files, {size}, {state}"))
    for problem in result["problems"]:
        console.print(Text(f"  {problem}", style="red"))
    if result["kind"] in ("dataset", "pairs"):
        _show_origin(result, console)
    summary = {key: value for key, value in result["summary"].items() if key != "selection"}
    show_summary(result["kind"], summary | ({"uri": result["uri"]} if "uri" in summary else {}), console)
    if result.get("selection"):
        fitted = result["selection"]
        weights, measured = (
            ", ".join(f"{name} {each[name]:.3g}" for name in each) for each in (fitted["weights"], fitted["cross_validated"])
        )
        console.print(Text(f"selection fitted on {fitted['rows']:,} pools, weights: {weights}"))
        console.print(Text(f"cross-validated label of the picks: {measured or 'unknown'}"))
    reasons = result.get("dead_letters", {})
    for reason, count in list(reasons.items())[:_REASONS]:
        console.print(Text(f"  {count:,} x {_short(reason, 200)}", style="yellow"))
    if len(reasons) > _REASONS:
        console.print(Text(f"  and {len(reasons) - _REASONS:,} reasons more", style="yellow"))
    if result["kind"] in ("answers", "scores"):
        for row in result.get("samples", []):
            console.print(Text(f"\n{_short(row['instruction'], 400)}", style="bold"))
            score = "" if row["score"] is None else f"{row['score']:.3f}  "
            console.print(Text(f"  {score}{'(abstained)' if row.get('abstained') else _short(row['response'], 400)}"))
        return
    for row in result.get("samples", []):
        _show_row(row if result["kind"] == "dataset" else {**row, "candidates": [row]}, console)


def _show_origin(result: dict[str, Any], console: Console) -> None:
    lineage, metric = result["lineage"], result["metric"]
    if "combines" in lineage:
        console.print(Text("combined from " + ", ".join(each["uri"] for each in lineage["combines"])))
    else:
        sampler = lineage["sampler"]
        if "log" in lineage:
            made = f"from the log of served candidates {lineage['log']}"
        else:
            decodings = ", ".join(f"{each['name']} x{each['n']}" for each in sampler["decodings"])
            made = f"decodings {decodings}; prompt {sampler['prompt']['form']}, {sampler['prompt']['shots']} shots"
        console.print(Text(f"model {sampler['model']}; {made}"))
    mode = f"{metric['mode']} mode, " if metric["mode"] else ""
    console.print(Text(f"labels {metric['name']} ({mode}version {metric['version']})"))
    if "made_from" in result:
        console.print(Text(f"pairs of {result['made_from']['uri']}"))
    if "copied_from" in result:
        console.print(Text(f"copied from {result['copied_from']}"))
    for name in ("rates", "cost"):
        if result.get(name):
            console.print(Text(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in _flat(result[name]))))


def show_summary(kind: str, summary: dict[str, Any], console: Console) -> None:
    """Print the summary of a verb for a folder of this `kind`."""
    if kind in ("dataset", "pairs"):
        _show_dataset(summary, console)
    elif kind == "evaluation":
        show_evaluation(summary, console)
    elif kind == "adapted":
        show_adapted(summary, console)
    else:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for key, value in _flat(summary):
            if value is None or isinstance(value, list):  # not measured, or shown as a plot on the card
                continue
            table.add_row(Text(key), Text(f"{value:.6g}" if isinstance(value, float) else str(value)))
        console.print(table)


def _show_dataset(summary: dict[str, Any], console: Console) -> None:
    splits = ", ".join(f"{split} {counts['instructions']:,}" for split, counts in summary["splits"].items())
    console.print(
        Text(f"instructions {summary['instructions']:,} ({splits}); pairs {summary['pairs']:,}; sampled tokens {summary['tokens']:,}")
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("source", "pairs", "what"):
        table.add_column(name, justify="right" if name == "pairs" else "left")
    for source, count in summary["sources"].items():
        table.add_row(source, f"{count:,}", _SOURCES.get(source, ""))
    console.print(table)
    _show_datasets(summary["datasets"], console)
    _show_labels(summary, console)
    if summary.get("merged"):
        console.print(Text(f"{summary['merged']:,} repeated rows of the source were merged"))
    if summary.get("empty_responses"):
        console.print(Text(f"{summary['empty_responses']:,} sampled responses are empty", style="yellow"))
    if summary.get("missing_responses"):
        console.print(Text(f"{summary['missing_responses']:,} responses are missing: a content filter stopped them", style="yellow"))
    if "kept_rows" in summary:
        console.print(Text(f"{summary['kept_rows']:,} instructions and {summary['kept_candidates']:,} samples are from the extended set"))
    incomplete = summary.get("incomplete", 0)
    if incomplete:
        console.print(Text(f"{incomplete:,} instructions failed and have only the samples of the extended set", style="yellow"))
    if summary["dead_letters"] > incomplete:
        left_out = summary["dead_letters"] - incomplete
        console.print(Text(f"{left_out:,} rows left out, with their reasons: {summary['uri']}/{_DEAD_LETTERS}", style="yellow"))
    console.print(Text(f"{summary['uri']} in {summary['seconds']:,.0f} s"))


def _show_datasets(datasets: dict[str, int], console: Console) -> None:
    """Print the number of instructions of each dataset in columns, the largest first."""
    largest = sorted(datasets.items(), key=lambda item: (-item[1], item[0]))
    console.print(Text(f"datasets {len(datasets):,}, with instructions"))
    console.print(Columns([Text(f"{name} {count:,}") for name, count in largest[:_DATASETS]], padding=(0, 3), column_first=True))
    if len(largest) > _DATASETS:
        rest = largest[_DATASETS:]
        console.print(Text(f"and {len(rest):,} more with {sum(count for _, count in rest):,}"))


def _show_labels(summary: dict[str, Any], console: Console) -> None:
    """Print the label histogram: bars for sampled responses, and the counts of all sources."""
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
        table.add_row(f"{candidate['label']:.2f}", Text(source), logprob, Text(_short(candidate["response"], 100)))
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


def format_size(count: int) -> str:
    """Return a number of bytes as text, in MB or kB."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


_METHOD_NAMES = {
    "greedy": "greedy",
    "sample": "sample",
    "self_sum": "self\nsum",
    "self_mean": "self\nmean",
    "scorer": "scorer",
    "consensus": "con-\nsensus",
    "blend": "blend",
    "fitted_no_scorer": "fitted without scorer",
    "fitted": "fitted",
    "oracle": "oracle",
}


def show_evaluation(summary: dict[str, Any], console: Console) -> None:
    """Print methods by task, the average with its interval, and the gain of the scorer. Fits 80 columns.

    The best method except the oracle is green, and has a star for output without colours.
    """
    if "suite" in summary:
        show_suite(summary, console)
        return
    # The gains below the table have the method without scorer; its column would need more than 80 columns.
    averages = {method: each for method, each in summary["averages"].items() if method != "fitted_no_scorer"}
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title="Rouge-L of the answer, in points",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("task", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    for method in averages:
        table.add_column(_METHOD_NAMES[method], justify="right", no_wrap=True)
    for task, entry in summary["per_task"].items():
        table.add_row(Text(task), f"{entry['instructions']:,}", *_method_cells({method: entry["methods"][method] for method in averages}))
    table.add_section()
    table.add_row("average over tasks", f"{summary['instructions']:,}", *_method_cells(averages), style="bold")
    for end in ("low", "high"):
        table.add_row(f"  {summary['confidence']:.0%} {end}", "", *(f"{each[end]:.1f} " for each in averages.values()), style="dim")
    console.print(table, soft_wrap=False)
    for line in _gain_lines(summary):
        console.print(line, soft_wrap=False)


_ADAPTED_POINTS = ("random", "self", "before", "after", "fitted", "oracle")


def show_adapted(summary: dict[str, Any], console: Console) -> None:
    """Print the outcome of `cappy adapt` for each task, the averages and the URI of the scorers. Fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for name in ("rows", *_ADAPTED_POINTS):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gate", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for outcome in summary["tasks"]:
        figures, gate = outcome.get("figures"), outcome.get("gate")
        shown = [""] * (1 + len(_ADAPTED_POINTS)) if figures is None else [f"{figures['rows']:,}", *_point_cells(figures)]
        gain = "" if gate is None or gate["gain"] is None else f"{gate['gain']:+.1f}"
        style = {"published": "green", "rejected": "yellow", "failed": "red"}[outcome["state"]]
        table.add_row(Text(outcome["task"]), *shown, gain, Text(outcome["state"], style=style))
    if summary["averages"]:
        table.add_section()
        table.add_row("average", "", *_point_cells(summary["averages"]), style="bold")
    console.print(table, soft_wrap=False)
    if "after the gate" in summary["averages"]:
        console.print(Text(f"with the decision of the gate for each task: {summary['averages']['after the gate']:.1f} points on average"))
    for outcome in summary["tasks"]:
        if outcome["state"] == "failed":
            console.print(Text(f"{outcome['task']}: {outcome['error']}", style="red"), soft_wrap=True)
    rejected = [outcome for outcome in summary["tasks"] if outcome["state"] == "rejected"]
    if rejected:
        use = rejected[0]["use"]
        names = ", ".join(outcome["task"] for outcome in rejected)
        console.print(Text(f"not better than the base, not published; use {use or 'another scorer'}: {names}"), soft_wrap=True)
    console.print(
        Text(f"{summary['published']} of {len(summary['tasks'])} tasks published: {summary['uri']} in {summary['seconds']:,.0f} s")
    )


def _point_cells(figures: dict[str, Any]) -> list[str]:
    values = [figures.get(name) for name in _ADAPTED_POINTS]
    return ["" if value is None else f"{value:.1f}" for value in values]


def _gain_lines(summary: dict[str, Any]) -> list[Text]:
    """Return lines for the gains of the scorer and of its fitted selection, the scorer's share of the oracle gap, omitted methods and
    skipped rows."""
    best = summary["best_baseline"]
    lines = [_gain_line("scorer", best, summary["gain"])]
    if share := summary["gap_closed"]:
        lines[0].append(f"; {share['mean']:.0%} of the oracle gap closed [{share['low']:.0%}, {share['high']:.0%}]")
    fitted = summary["gains"].get("fitted", {})
    lines += [_gain_line("fitted", other, fitted[other]) for other in (best, "fitted_no_scorer") if other in fitted]
    lines += [Text(f"left out: {_one_line_name(method)} ({reason})") for method, reason in summary["left_out"].items()]
    skipped = {reason: count for reason, count in summary["skipped"].items() if count}
    if skipped:
        lines.append(Text("skipped rows: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in skipped.items())))
    return lines


def _gain_line(method: str, other: str, gain: dict[str, float]) -> Text:
    verdict = "ahead" if gain["low"] > 0 else "behind" if gain["high"] < 0 else "no clear difference"
    return Text.assemble(
        (f"{_one_line_name(method)} - {_one_line_name(other)}: ", "bold"),
        (f"{gain['mean']:+.1f}", "bold green" if gain["low"] > 0 else "bold red" if gain["high"] < 0 else "bold"),
        f" [{gain['low']:+.1f}, {gain['high']:+.1f}] points ({verdict})",
    )


def _one_line_name(method: str) -> str:
    return _METHOD_NAMES[method].replace("-\n", "").replace("\n", " ")


def _method_cells(estimates: dict[str, dict[str, float]]) -> list[Text]:
    best = max((each["mean"] for method, each in estimates.items() if method != "oracle"))
    return [
        Text(f"{each['mean']:.1f}*", style="bold green")
        if method != "oracle" and each["mean"] == best
        else Text(f"{each['mean']:.1f} ", style="dim" if method == "oracle" else "")
        for method, each in estimates.items()
    ]


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the checks of `cappy doctor` as a table, with the fix below each failure."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        mark = Text("ok", style="green") if finding.ok else Text("FAIL", style="bold red")
        table.add_row(mark, finding.check, Text(finding.detail))
        if finding.remedy:
            table.add_row("", "", Text(f"-> {finding.remedy}", style="yellow"))
    console.print(table)
    bad = sum(not finding.ok for finding in findings)
    verdict = f"{bad} of {len(findings)} checks failed" if bad else f"all {len(findings)} checks passed"
    console.print(Text(verdict, style="red" if bad else "green"))


def show_copy(result: dict[str, Any], console: Console) -> None:
    """Print the summary of `cappy push` or `cappy pull`."""
    state = (
        f"{result['copied_files']} of {result['files']} files copied, {result['copied_bytes'] / 1e6:,.1f} MB at "
        f"{result['mb_per_second']:,.0f} MB/s"
        if result["copied_files"]
        else f"all {result['files']} files are already there"
    )
    console.print(Text(f"{result['kind']} {result['uri']}: {state}"))
    if "commit" in result:
        console.print(Text(f"commit {result['commit']}"))


def show_export(result: dict[str, Any], console: Console) -> None:
    """Print the summary of `cappy export`."""
    splits = ", ".join(f"{split} {count:,}" for split, count in result["splits"].items())
    kept = " (already there)" if result["kept"] else ""
    console.print(Text(f"{result['format']} {result['uri']}{kept}: {result['rows']:,} rows ({splits})", style="bold"))
    ranked = f", ranked by {result['by']}" if result["by"] else ""
    console.print(Text(f"from {result['instructions']:,} instructions with {result['candidates']:,} candidates{ranked}"))
    for name, count in result["left_out"].items():
        if count:
            console.print(Text(f"  left out: {count:,} {LEFT_OUT[name]}", style="yellow"))
