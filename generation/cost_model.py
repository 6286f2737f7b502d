"""What `cappy generate` would make and cost: numbers from counts and rates. Pure: no files, no Ray, no LLM.

`generation.plan` counts the source and finds the rates; every assumption stands in the result with where it came from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import Config

BYTES_PER_PAIR = 131.0
"""21 GB for 160M pairs, zstd, a row an instruction."""
GPU_FLOPS = 990e12
"""Dense bfloat16 of an H200, FLOP/s."""
GPU_SHARE = 0.5
"""Share of it an engine is taken to reach."""

_MIXTURE_ROWS = 40


@dataclass
class Count:
    """What one dataset, or one part of a mixture, holds. Sampled rows are those without answer choices."""

    train: int = 0
    validation: int = 0
    sampled_rows: int = 0
    references: int = 0
    """Distinct references of all rows."""
    sampled_references: int = 0
    """Those of sampled rows; each brings its mismatched ones."""
    choices: int = 0
    """Answer choices that are no reference."""
    prompt_tokens: float = 0.0
    """Tokens of the sampled rows' prompts, without shots."""
    reference_tokens: float = 0.0
    """Tokens of the sampled rows' references."""


@dataclass(frozen=True)
class Rates:
    """What one replica does in a second, and what a candidate and a pair come to; `origin` says for each where it is from."""

    sampled: float
    """Tokens sampled in a second."""
    prompt: float | None
    """Prompt tokens read in a second; None where `sampled` has the reading in it."""
    tokens_per_candidate: float | None
    """None takes the mean length of the references."""
    bytes_per_pair: float
    origin: Mapping[str, str]


def estimate_plan(counts: Mapping[str, Count], config: Config, rates: Rates, tokens_from: str = "given") -> dict[str, Any]:
    """Return the plan: `mixture` (a row a dataset), `totals`, `compute`, `dollars`, `assumptions`.

    Sampled tokens are given as expected and as the most the decodings allow; hours and dollars likewise. Hours are of whole
    replicas, `compute.wall_hours` by number of GPUs (None where they are fewer than a replica spans).
    """
    sampler = config.sampler
    candidates = sum(decoding.n for decoding in sampler.decodings)
    rows = {name: _dataset_row(count, config, rates, candidates) for name, count in counts.items()}
    total = {key: sum(row[key] for row in rows.values()) for key in _SUMMED}
    pairs = {source: sum(row["by_source"][source] for row in rows.values()) for source in ("reference", "choice", "mismatched", "sampled")}
    assumptions = [
        ("tokens of a prompt", "see the table", tokens_from),
        (
            "tokens of a candidate",
            _round(total["sampled_tokens"] / max(1, total["candidates"])),
            rates.origin["tokens_per_candidate"],
        ),
        ("bytes of a published pair", _round(rates.bytes_per_pair), rates.origin["bytes_per_pair"]),
        ("mismatched responses", "all found", "fewer in datasets too small or uniform to borrow from"),
    ]
    if config.generate.max_per_bin is not None:
        assumptions.append(
            ("sampled pairs", "all", f"generate.max_per_bin={config.generate.max_per_bin} leaves fewer, by what the labels are")
        )
    shots = sampler.prompt.shots
    if shots:
        assumptions.append(("tokens of a shot", "an instruction and a reference", f"{shots} of mean length stand before each instruction"))
    result = {
        "mixture": rows,
        "totals": {
            "instructions": total["train"] + total["validation"],
            "sampled_instructions": total["sampled_rows"],
            "candidates": total["candidates"],
            "pairs": sum(pairs.values()),
            "pairs_by_source": pairs,
            "prompt_tokens": round(total["prompt_tokens"]),
            "sampled_tokens": {"expected": round(total["sampled_tokens"]), "most": total["most_tokens"]},
            "bytes": round(sum(pairs.values()) * rates.bytes_per_pair),
        },
    }
    if sampler.engine.kind == "endpoint":
        return result | _endpoint_costs(total, config, assumptions)
    return result | _gpu_costs(total, config, rates, assumptions)


_SUMMED = ("train", "validation", "sampled_rows", "candidates", "fresh_tokens", "prompt_tokens", "sampled_tokens", "most_tokens")


def _dataset_row(count: Count, config: Config, rates: Rates, candidates: int) -> dict[str, Any]:
    decodings = config.sampler.decodings
    reference = count.reference_tokens / max(1, count.sampled_references)
    expected = sum(each.n * min(max(rates.tokens_per_candidate or reference, each.min_tokens), each.max_tokens) for each in decodings)
    instruction = count.prompt_tokens / max(1, count.sampled_rows)
    # Shots that do not fit are left out; an endpoint's context is its own affair.
    room = config.sampler.engine.max_model_len if config.sampler.engine.kind == "vllm" else math.inf
    prompt = min(instruction + config.sampler.prompt.shots * (instruction + reference), room)
    by_source = {
        "reference": count.references,
        "choice": count.choices,
        "mismatched": config.generate.mismatched * count.sampled_references,
        "sampled": candidates * count.sampled_rows,
    }
    return {
        "train": count.train,
        "validation": count.validation,
        "sampled_rows": count.sampled_rows,
        "mean_prompt_tokens": round(prompt, 1),
        "candidates": by_source["sampled"],
        "by_source": by_source,
        "pairs": sum(by_source.values()),
        "fresh_tokens": count.prompt_tokens,
        "prompt_tokens": prompt * count.sampled_rows,
        "sampled_tokens": expected * count.sampled_rows,
        "most_tokens": count.sampled_rows * sum(each.n * each.max_tokens for each in decodings),
    }


def _gpu_costs(total: dict[str, Any], config: Config, rates: Rates, assumptions: list[tuple[str, Any, str]]) -> dict[str, Any]:
    plan, engine = config.plan, config.sampler.engine
    span = engine.tensor_parallel if engine.kind == "vllm" else 1
    reading = total["fresh_tokens"] / rates.prompt if rates.prompt else 0.0
    hours = {name: (reading + total[key] / rates.sampled) / 3600 for name, key in (("expected", "sampled_tokens"), ("most", "most_tokens"))}
    gpu_hours = {name: value * span for name, value in hours.items()}
    assumptions = [
        *assumptions,
        ("sampled tokens/s of a replica", _round(rates.sampled), rates.origin["sampled"]),
        (
            "prompt tokens/s of a replica",
            _round(rates.prompt) if rates.prompt else "in the rate above",
            rates.origin["prompt"],
        ),
        ("GPUs of a replica", span, "sampler.engine.tensor_parallel"),
        ("more replicas", "as much faster", "replicas share nothing; start-up of the engines and merging are not counted"),
        ("dollars of a GPU hour", plan.gpu_dollars_per_hour, "plan.gpu_dollars_per_hour"),
    ]
    if rates.prompt:
        assumptions.append(("a prompt is read", "once", "its candidates, and all rows with the same shots, share it in the prefix cache"))
    return {
        "compute": {
            "gpu_hours": gpu_hours,
            "wall_hours": {str(count): hours["expected"] / (count // span) if count >= span else None for count in plan.gpus},
        },
        "dollars": {name: value * plan.gpu_dollars_per_hour for name, value in gpu_hours.items()},
        "assumptions": _assumption_rows(assumptions),
    }


def _endpoint_costs(total: dict[str, Any], config: Config, assumptions: list[tuple[str, Any, str]]) -> dict[str, Any]:
    """An endpoint's bill: each decoding is a request, which pays for the whole prompt."""
    engine = config.sampler.engine
    prompt, sampled = (float(getattr(engine, f"price_per_million_{kind}", 0) or 0) for kind in ("prompt", "sampled"))
    requests = len(config.sampler.decodings)
    reading = total["prompt_tokens"] * requests * prompt / 1e6
    assumptions = [
        *assumptions,
        ("dollars of a million prompt tokens", prompt, "sampler.engine.price_per_million_prompt"),
        ("dollars of a million sampled tokens", sampled, "sampler.engine.price_per_million_sampled"),
        ("a prompt is paid", f"{requests} times", "once a decoding; an endpoint that refuses n takes it once a candidate"),
        ("wall time", "not known", "the endpoint's rate limits decide"),
    ]
    return {
        "compute": None,
        "dollars": {
            "expected": reading + total["sampled_tokens"] * sampled / 1e6,
            "most": reading + total["most_tokens"] * sampled / 1e6,
        },
        "assumptions": _assumption_rows(assumptions),
    }


def _assumption_rows(assumptions: list[tuple[str, Any, str]]) -> list[dict[str, Any]]:
    return [{"what": what, "value": value, "from": origin} for what, value, origin in assumptions]


def show(result: dict[str, Any], console: Console) -> None:
    """Print a plan with the number of its `dead_letters`."""
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
        console.print(f"and {len(rest):,} datasets more with {sum(row['pairs'] for _, row in rest):,} pairs")
    console.print()
    totals = result["totals"]
    tokens = totals["sampled_tokens"]
    lines = [
        ("left out", f"{result['dead_letters']:,} rows of the source that cannot be used"),
        ("instructions", f"{totals['instructions']:,}, {totals['sampled_instructions']:,} of them sampled"),
        ("pairs", f"{totals['pairs']:,}: " + ", ".join(f"{name} {count:,}" for name, count in totals["pairs_by_source"].items())),
        ("prompt tokens", f"{totals['prompt_tokens']:,}"),
        ("sampled tokens", f"{tokens['expected']:,} expected, {tokens['most']:,} at most"),
        ("storage", size(totals["bytes"])),
    ]
    if result["compute"]:
        hours = result["compute"]["gpu_hours"]
        lines.append(("GPU-hours", f"{hours['expected']:,.3g} expected, {hours['most']:,.3g} at most"))
        for count, wall in result["compute"]["wall_hours"].items():
            lines.append((f"time on {int(count):,} GPU{'s' if count != '1' else ''}", duration(wall) if wall is not None else "too few"))
    lines.append(("dollars", f"{result['dollars']['expected']:,.2f} expected, {result['dollars']['most']:,.2f} at most"))
    _print_pairs(lines, console)
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
    """Hours as people say them: `12 s`, `8.4 min`, `3.2 h`, `5.1 days`."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"


def size(count: float) -> str:
    """Bytes as people say them, in powers of 1,000: `1.4 MB`, `21.0 GB`."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:,.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _round(value: float) -> float:
    """Three significant digits; more would claim a precision nobody has."""
    return float(f"{value:.3g}")
