"""Estimate the size and the cost of a `cappy generate` run from counts and rates.

Pure: reads no files, imports no Ray, loads no LLM. `generation.plan` counts the source and finds the rates. The result
lists every assumption with its origin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.config import Config
from generation import token_limits

BYTES_PER_PAIR = 131.0
"""21 GB for 160M pairs, with zstd and one row per instruction."""
GPU_FLOPS = 990e12
"""Peak of an H200 for dense bfloat16, in FLOP/s."""
GPU_SHARE = 0.5
"""Share of the peak that an engine is assumed to reach."""


@dataclass
class Count:
    """Counts of one dataset, or of one part of a mixture. Sampled rows are the rows without answer choices."""

    train: int = 0
    """Train rows."""
    validation: int = 0
    """Validation rows."""
    sampled_rows: int = 0
    references: int = 0
    """Distinct references of all rows."""
    sampled_references: int = 0
    """References of sampled rows; each adds its mismatched references."""
    choices: int = 0
    """Answer choices that are not a reference."""
    prompt_tokens: float = 0.0
    """Tokens of the prompts of sampled rows, without shots."""
    reference_tokens: float = 0.0
    """Tokens of the references of sampled rows."""
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Sampled rows and largest length of a candidate in tokens, by dataset; only for datasets with such a length."""


@dataclass(frozen=True)
class Rates:
    """The speed of one replica, and the mean sizes of a candidate and a pair; `origin` has the source of each value."""

    sampled: float
    """Sampled tokens per second."""
    prompt: float | None
    """Prompt tokens per second; None if `sampled` already includes the time of the prompts."""
    tokens_per_candidate: float | None
    """Sampled tokens per candidate; None means the mean length of the references."""
    bytes_per_pair: float
    """Compressed bytes of a published pair."""
    origin: Mapping[str, str]


def estimate_plan(counts: Mapping[str, Count], config: Config, rates: Rates, tokens_from: str = "given") -> dict[str, Any]:
    """Return the plan of a run.

    Args:
        counts: The counts of each dataset, or of each part of a mixture.
        config: The config of the run.
        rates: The speed of one replica and the mean sizes.
        tokens_from: The source of the token counts, for the assumptions.

    Returns:
        `mixture` (one entry per dataset), `totals`, `compute`, `dollars` and `assumptions`. Sampled tokens, hours and dollars
        have an `expected` value and a `most` value, the maximum that the decodings allow. `compute.wall_hours` has the
        expected hours by number of GPUs; None if a replica needs more GPUs. `compute` is None for an endpoint.
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
        ("mismatched responses", "all found", "datasets with few distinct references have fewer"),
    ]
    if config.generate.max_per_bin is not None:
        assumptions.append(
            ("sampled pairs", "all", f"generate.max_per_bin={config.generate.max_per_bin} leaves fewer; the number depends on the labels")
        )
    shots = sampler.prompt.shots
    if shots:
        assumptions.append(("tokens of a shot", "an instruction and a reference", f"{shots} of mean length before each instruction"))
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
    length = rates.tokens_per_candidate or reference
    expected = most = 0.0
    unlimited = count.sampled_rows - sum(rows for rows, _ in count.limits.values())
    for rows, limit in [*count.limits.values(), (unlimited, None)]:
        limited = token_limits.limit_decodings(decodings, limit)
        expected += rows * sum(each.n * min(max(length, each.min_tokens), each.max_tokens) for each in limited)
        most += rows * sum(each.n * each.max_tokens for each in limited)
    instruction = count.prompt_tokens / max(1, count.sampled_rows)
    # The vLLM engine drops shots that do not fit into its context; the context length of an endpoint is not known here.
    max_prompt_tokens = config.sampler.engine.max_model_len if config.sampler.engine.kind == "vllm" else math.inf
    prompt = min(instruction + config.sampler.prompt.shots * (instruction + reference), max_prompt_tokens)
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
        "sampled_tokens": expected,
        "most_tokens": round(most),
    }


def _gpu_costs(total: dict[str, Any], config: Config, rates: Rates, assumptions: list[tuple[str, Any, str]]) -> dict[str, Any]:
    plan, engine = config.plan, config.sampler.engine
    replica_gpus = engine.tensor_parallel if engine.kind == "vllm" else 1
    prompt_seconds = total["fresh_tokens"] / rates.prompt if rates.prompt else 0.0
    hours = {
        name: (prompt_seconds + total[key] / rates.sampled) / 3600
        for name, key in (("expected", "sampled_tokens"), ("most", "most_tokens"))
    }
    gpu_hours = {name: value * replica_gpus for name, value in hours.items()}
    assumptions = [
        *assumptions,
        ("sampled tokens/s of a replica", _round(rates.sampled), rates.origin["sampled"]),
        (
            "prompt tokens/s of a replica",
            _round(rates.prompt) if rates.prompt else "in the rate above",
            rates.origin["prompt"],
        ),
        ("GPUs of a replica", replica_gpus, "sampler.engine.tensor_parallel"),
        ("speed", "proportional to replicas", "replicas share nothing; the start of the engines and the merge are not counted"),
        ("dollars of a GPU hour", plan.gpu_dollars_per_hour, "plan.gpu_dollars_per_hour"),
    ]
    if rates.prompt:
        assumptions.append(("reads of a prompt", "1", "its candidates, and all rows with the same shots, share it in the prefix cache"))
    return {
        "compute": {
            "gpu_hours": gpu_hours,
            "wall_hours": {
                str(count): hours["expected"] / (count // replica_gpus) if count >= replica_gpus else None for count in plan.gpus
            },
        },
        "dollars": {name: value * plan.gpu_dollars_per_hour for name, value in gpu_hours.items()},
        "assumptions": _assumption_rows(assumptions),
    }


def _endpoint_costs(total: dict[str, Any], config: Config, assumptions: list[tuple[str, Any, str]]) -> dict[str, Any]:
    """Return the cost at an endpoint: each decoding is a request, and each request pays for the whole prompt."""
    engine = config.sampler.engine
    prompt, sampled = (float(getattr(engine, f"price_per_million_{kind}", 0) or 0) for kind in ("prompt", "sampled"))
    requests = len(config.sampler.decodings)
    prompt_dollars = total["prompt_tokens"] * requests * prompt / 1e6
    assumptions = [
        *assumptions,
        ("dollars of a million prompt tokens", prompt, "sampler.engine.price_per_million_prompt"),
        ("dollars of a million sampled tokens", sampled, "sampler.engine.price_per_million_sampled"),
        ("payments for a prompt", str(requests), "one per decoding; one per candidate if the endpoint does not support n > 1"),
        ("wall time", "not known", "it depends on the rate limits of the endpoint"),
    ]
    return {
        "compute": None,
        "dollars": {
            "expected": prompt_dollars + total["sampled_tokens"] * sampled / 1e6,
            "most": prompt_dollars + total["most_tokens"] * sampled / 1e6,
        },
        "assumptions": _assumption_rows(assumptions),
    }


def _assumption_rows(assumptions: list[tuple[str, Any, str]]) -> list[dict[str, Any]]:
    return [{"what": what, "value": value, "from": origin} for what, value, origin in assumptions]


def _round(value: float) -> float:
    """Round to three significant digits, the most that the estimates support."""
    return float(f"{value:.3g}")
