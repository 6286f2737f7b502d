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
from cluster.hardware import GPUS, Device
from generation import speed, token_limits
from generation.speed import EncoderSize

BYTES_PER_PAIR = 131.0
"""21 GB for 160M pairs, with zstd and one row per instruction."""
_SPECIAL_TOKENS = 3  # of a pair of an encoder


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
    reused: int = 0
    """Candidates of sampled rows that are in the sets of `generate.reuse` and `generate.extend`, so they are not sampled."""
    complete_rows: int = 0
    """Sampled rows with all their candidates in these sets."""


@dataclass(frozen=True)
class MachineRates:
    """The speed of this machine, with all its replicas."""

    name: str
    sampled: float
    """Sampled tokens per second."""
    prompt: float | None
    """Prompt tokens per second; None if `sampled` already includes the time of the prompts."""
    origin: str


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
    gpu: Device = GPUS["H200"]
    """The GPU of the estimates on GPUs."""
    machine: MachineRates | None = None
    """The rates of this machine, if it has no GPU."""
    cpu: Device | None = None
    """The CPU of this machine, if it has no GPU."""
    encoder: EncoderSize | None = None
    """The encoder of the scorer; None if its size is not known."""
    warnings: tuple[str, ...] = ()
    """Sentences about models that do not fit."""


def mean_context(counts: Mapping[str, Count], config: Config) -> float:
    """Return the mean number of tokens that a decoding step reads for a candidate: its prompt, and half of its sampled tokens."""
    rows = sum(count.sampled_rows for count in counts.values())
    references = sum(count.sampled_references for count in counts.values())
    if not rows:
        return 1.0
    reference = sum(count.reference_tokens for count in counts.values()) / max(1, references)
    instruction = sum(count.prompt_tokens for count in counts.values()) / rows
    return instruction + config.sampler.prompt.shots * (instruction + reference) + reference / 2


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
        expected hours by number of GPUs; None if a replica needs more GPUs. `compute.machine` has the hours of this machine, None
        if it has a GPU. `compute` is None for an endpoint. `training` has the estimate of `cappy train` (`_training_costs`).
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
            _round(total["candidate_tokens"] / max(1, total["candidates"])),
            rates.origin["tokens_per_candidate"],
        ),
        ("bytes of a published pair", _round(rates.bytes_per_pair), rates.origin["bytes_per_pair"]),
        ("mismatched responses", "all found", "datasets with few distinct references have fewer"),
    ]
    if config.generate.max_per_bin is not None:
        assumptions.append(
            ("sampled pairs", "all", f"generate.max_per_bin={config.generate.max_per_bin} leaves fewer; the number depends on the labels")
        )
    if total["reused"]:
        assumptions.append(("candidates that are not sampled", f"{total['reused']:,}", "earlier sets have them"))
    shots = sampler.prompt.shots
    if shots:
        assumptions.append(("tokens of a shot", "an instruction and a reference", f"{shots} of mean length before each instruction"))
    result: dict[str, Any] = {
        "mixture": rows,
        "totals": {
            "instructions": total["train"] + total["validation"],
            "sampled_instructions": total["sampled_rows"],
            "candidates": total["candidates"],
            "reused_candidates": total["reused"],
            "pairs": sum(pairs.values()),
            "pairs_by_source": pairs,
            "prompt_tokens": round(total["prompt_tokens"]),
            "sampled_tokens": {"expected": round(total["sampled_tokens"]), "most": total["most_tokens"]},
            "bytes": round(sum(pairs.values()) * rates.bytes_per_pair),
        },
    }
    training, trained_by = _training_costs(rows, total, config, rates)
    result["training"] = training
    assumptions += trained_by
    if sampler.engine.kind == "endpoint":
        return result | _endpoint_costs(total, config, assumptions)
    return result | _gpu_costs(total, config, rates, assumptions)


_SUMMED = (
    *("train", "validation", "sampled_rows", "candidates", "reused"),
    *("instruction_tokens", "candidate_tokens", "fresh_tokens", "prompt_tokens", "sampled_tokens", "most_tokens"),
)


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
    all_candidates = candidates * count.sampled_rows
    drawn = 1 - count.reused / max(1, all_candidates)
    drawn_rows = count.sampled_rows - count.complete_rows
    by_source = {
        "reference": count.references,
        "choice": count.choices,
        "mismatched": config.generate.mismatched * count.sampled_references,
        "sampled": all_candidates,
    }
    return {
        "train": count.train,
        "validation": count.validation,
        "sampled_rows": count.sampled_rows,
        "mean_prompt_tokens": round(prompt, 1),
        "candidates": all_candidates,
        "reused": count.reused,
        "by_source": by_source,
        "pairs": sum(by_source.values()),
        "instruction_tokens": count.prompt_tokens,
        "candidate_tokens": expected,
        "fresh_tokens": instruction * drawn_rows,
        "prompt_tokens": prompt * drawn_rows,
        "sampled_tokens": expected * drawn,
        "most_tokens": round(most * drawn),
    }


def _gpu_costs(total: dict[str, Any], config: Config, rates: Rates, assumptions: list[tuple[str, Any, str]]) -> dict[str, Any]:
    plan, engine = config.plan, config.sampler.engine
    replica_gpus = engine.tensor_parallel if engine.kind == "vllm" else 1
    hours = _sampling_hours(total, rates.sampled, rates.prompt)
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
    machine = rates.machine
    if machine:
        assumptions.append((f"sampled tokens/s of {machine.name}", _round(machine.sampled), machine.origin))
    if rates.prompt:
        assumptions.append(("reads of a prompt", "1", "its candidates, and all rows with the same shots, share it in the prefix cache"))
    return {
        "compute": {
            "gpu": rates.gpu.name,
            "gpu_hours": gpu_hours,
            "machine": {"name": machine.name, "hours": _sampling_hours(total, machine.sampled, machine.prompt)} if machine else None,
            "wall_hours": {
                str(count): hours["expected"] / (count // replica_gpus) if count >= replica_gpus else None for count in plan.gpus
            },
        },
        "dollars": {name: value * plan.gpu_dollars_per_hour for name, value in gpu_hours.items()},
        "assumptions": _assumption_rows(assumptions),
    }


def _sampling_hours(total: dict[str, Any], sampled: float, prompt: float | None) -> dict[str, float]:
    """Return the expected and the largest hours: prompt tokens / prompt rate + sampled tokens / sampled rate."""
    prompt_seconds = total["fresh_tokens"] / prompt if prompt else 0.0
    return {name: (prompt_seconds + total[key] / sampled) / 3600 for name, key in (("expected", "sampled_tokens"), ("most", "most_tokens"))}


def _training_costs(
    rows: Mapping[str, dict[str, Any]], total: dict[str, Any], config: Config, rates: Rates
) -> tuple[dict[str, Any] | None, list[tuple[str, Any, str]]]:
    """Return the estimate of `cappy train` and its assumptions; None if the size of the encoder or the length of the pairs is unknown.

    The pairs are those of the train rows, times `training.epochs`. Their length is the mean prompt without shots plus the mean candidate,
    up to `scorer.max_length`. `generation.speed` has the formulas; the start and the validations are not counted.
    """
    if rates.encoder is None or not total["sampled_rows"]:
        return None, []
    instruction = total["instruction_tokens"] / total["sampled_rows"]
    candidate = total["candidate_tokens"] / max(1, total["candidates"])
    tokens = min(instruction + candidate + _SPECIAL_TOKENS, config.scorer.max_length)
    pairs = sum(row["pairs"] * row["train"] / max(1, row["train"] + row["validation"]) for row in rows.values())
    trained = round(pairs * config.training.epochs)
    devices = {"gpu": rates.gpu, "machine": rates.cpu}
    trained_per_second = {
        name: speed.trained_pairs_per_second(rates.encoder, device, tokens) if device else None for name, device in devices.items()
    }
    return {
        "pairs": trained,
        "tokens_per_pair": _round(tokens),
        "flops": 3 * speed.pair_flops(rates.encoder, tokens) * trained,
        "gpu_hours": trained / (trained_per_second["gpu"] or math.inf) / 3600,
        "machine_hours": trained / rate / 3600 if (rate := trained_per_second["machine"]) else None,
        "trained_pairs_per_second": {name: rate and _round(rate) for name, rate in trained_per_second.items()},
        "scored_pairs_per_second": {
            name: _round(speed.scored_pairs_per_second(rates.encoder, device, tokens)) if device else None
            for name, device in devices.items()
        },
    }, [
        (
            "training speed",
            f"{speed.COMPUTE_SHARE:.0%} of the FLOP/s",
            f"a calculation for {config.scorer.encoder} on {rates.gpu.name}" + (f" and {rates.cpu.name}" if rates.cpu else ""),
        )
    ]


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
