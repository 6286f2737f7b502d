"""Compare `cappy serve` with vLLM's OpenAI server that draws the same samples; measure `cappy serve` under long load and overload.

    python -m benchmarks.serving --json -                              # against vLLM's server
    python -m benchmarks.serving --minutes 30 --rate moderate --json - # half an hour: errors, memory
    python -m benchmarks.serving --overload --json -                   # ten times the capacity, for a minute

All modes use the demo's BIG-bench prompts in chat form, SmolLM2 on vLLM, and a MiniLM scorer with a random head. With `--answers lines`
a prompt has the demo's shots and an answer ends at a newline, after at most 32 tokens. With `--answers free` a prompt is the
instruction alone and an answer has at most 128 tokens.

A request to `cappy serve` has one choice out of `--candidates`. A request to vLLM's server has `--candidates` samples of the same
prompt. Weights, engine settings, temperature, length and stop strings are equal; each server waits for threads and processes in
its default way. Against vLLM's server, `cappy serve` has two LLM replicas, each with half the cores (docs/guides/serve.md).
The servers alternate and never run at the same time.

- `throughput_ratio`: answers per second of `cappy serve` divided by those of vLLM's server, in a closed loop of `--clients` clients.
  Medians over the turns. The first and last `--clients` answers are left out, so that all clients are busy.
- `plain_throughput_ratio`: the same against vLLM's server with its default engine settings and all cores.
- `added_latency_p50`, `_p99`: quantiles of `scoring_s` / `sampling_s` over the answers of `cappy serve` in an open loop. Requests
  arrive as a Poisson process at a share (`--rate`) of vLLM's throughput. The gateway measures both times: hand-over, waiting and scoring
  in one, sampling in the other.
- `extra_latency_p50`, `_p99`: quantiles of the client's latency in that loop, `cappy serve` minus vLLM's server, divided by the median
  `sampling_s`. They include all added work, and the CPU time that scoring takes from the LLM.
- `cpu`: share of the machine's CPU time of each kind of process in the closed loop; `rest` is Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.load import Answer, Body, arrivals, closed_loop, closed_loop_rate, duration_s, open_loop, quantiles
from cluster.config import Config, load
from cluster.progress import log
from generation import few_shot
from generation.prompts import messages

RATES = {"light": 0.25, "moderate": 0.5, "high": 0.8}
_WARM = 24
_BEFORE_S = 30.0


class Prompts:
    """Bodies of requests. A prompt repeats only after all were used; setting `place` to an earlier value repeats the bodies from there."""

    def __init__(self, config: Config, options: argparse.Namespace) -> None:
        rows = [each[1] for each in few_shot.prepare_rows(config) if isinstance(each, tuple)]
        random.Random(options.seed).shuffle(rows)
        lines = options.answers == "lines"
        same: Body = {"model": config.serving.model_name, "max_tokens": 32 if lines else 128, "temperature": 0.9}
        same |= {"stop": ["\n"]} if lines else {}
        self._bodies = [{**same, "messages": messages(row["instruction"], row["shots"] if lines else [], None)} for row in rows]
        self._candidates = options.candidates
        self.place = 0

    def ours(self, count: int) -> list[Body]:
        """Return requests for the best of the candidates; the answers hold the time of each stage."""
        return [{**body, "cappy": {"candidates": self._candidates}} for body in self._next(count)]

    def vllms(self, count: int) -> list[Body]:
        return [{**body, "n": self._candidates} for body in self._next(count)]

    def _next(self, count: int) -> list[Body]:
        start, self.place = self.place, self.place + count
        return [self._bodies[place % len(self._bodies)] for place in range(start, self.place)]


def failed(answers: Sequence[Answer], choices: int = 1) -> list[Answer]:
    """Return the answers that are errors, or that do not have `choices` choices."""
    return [each for each in answers if each.status != 200 or len(each.tree["choices"]) != choices]


def latencies(answers: Sequence[Answer]) -> list[float]:
    return [each.latency for each in answers]


def compare(config: Config, folder: Path, prompts: Prompts, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both servers alternately, each started for its turn; return ratios and figures."""
    rates: dict[str, list[float]] = {"plain": [], "vllm": [], "ours": []}
    answers: dict[str, list[Answer]] = {"vllm": [], "ours": []}
    cpu: dict[str, Counter[str]] = {"vllm": Counter(), "ours": Counter()}
    loaded = {"vllm": 0.0, "ours": 0.0}
    errors: list[Answer] = []
    for turn in range(options.turns):
        offered = 0.0
        place = prompts.place
        with servers.vllms(config, folder, settings="own") as server:
            full = saturate(server, prompts.vllms, options)
        rates["plain"].append(closed_loop_rate(full, options.clients))
        errors += failed(full, options.candidates)
        log(f"turn {turn + 1} of {options.turns}, vllm with its defaults: {rates['plain'][-1]:.2f} answers/s")
        for side, start in (("vllm", servers.vllms), ("ours", servers.ours)):
            prompts.place = place  # both sides send the same prompts, to an empty prefix cache
            choices = options.candidates if side == "vllm" else 1
            draw = prompts.vllms if side == "vllm" else prompts.ours
            with start(config, folder) as server:
                asyncio.run(closed_loop(server.chat, draw(_WARM), options.clients))
                before = server.cpu_seconds()
                full = asyncio.run(closed_loop(server.chat, draw(options.requests), options.clients))
                cpu[side].update({role: spent - before.get(role, 0.0) for role, spent in server.cpu_seconds().items()})
                loaded[side] += duration_s(full)
                rates[side].append(closed_loop_rate(full, options.clients))
                offered = offered or RATES[options.rate] * rates[side][-1]
                moments = arrivals(offered, options.seconds, options.seed + turn)
                part = asyncio.run(open_loop(server.chat, draw(len(moments)), moments))
            answers[side] += part
            errors += failed([*full, *part], choices)
            middle, late = quantiles(latencies(part), 0.5, 0.99)
            log(
                f"turn {turn + 1} of {options.turns}, {side}: {rates[side][-1]:.2f} answers/s; "
                f"at {offered:.2f}/s p50 {middle:.2f} s, p99 {late:.2f} s"
            )
    times = [each.tree["cappy"]["latency"] for each in answers["ours"] if each.status == 200]
    shares = [each["scoring_s"] / each["sampling_s"] for each in times]
    sampling = statistics.median(each["sampling_s"] for each in times)
    seen = {side: quantiles(latencies(each), 0.5, 0.99) for side, each in answers.items()}
    ours, vllm, plain = (statistics.median(rates[side]) for side in ("ours", "vllm", "plain"))
    return {
        "throughput_ratio": round(ours / vllm, 3),
        "plain_throughput_ratio": round(ours / plain, 3),
        **_rounded("added_latency", quantiles(shares, 0.5, 0.99), 3),
        "errors": len(errors),
        **_rounded("extra_latency", [(mine - theirs) / sampling for mine, theirs in zip(seen["ours"], seen["vllm"], strict=True)], 3),
        "answers_per_second": round(ours, 3),
        "vllm_answers_per_second": round(vllm, 3),
        "plain_answers_per_second": round(plain, 3),
        "answers_per_second_by_turn": {side: [round(each, 3) for each in rates[side]] for side in rates},
        **_rounded("latency", seen["ours"], 3),
        **_rounded("vllm_latency", seen["vllm"], 3),
        **_rounded("sampling_s", quantiles([each["sampling_s"] for each in times], 0.5, 0.99), 3),
        **_rounded("scoring_s", quantiles([each["scoring_s"] for each in times], 0.5, 0.99), 4),
        "tokens_per_answer": round(statistics.mean(each.tree["cappy"]["sampled_tokens"] for each in answers["ours"]), 1),
        "vllm_tokens_per_answer": round(statistics.mean(each.tree["usage"]["completion_tokens"] for each in answers["vllm"]), 1),
        "cpu": {side: _shares(each, loaded[side]) for side, each in cpu.items()},
        "requests": options.requests,
        "clients": options.clients,
        "open_answers": len(answers["ours"]),
        "turns": options.turns,
        "first_errors": [each.tree.get("error") for each in errors[:3]],
    }


def _shares(spent: Counter[str], loaded_s: float) -> dict[str, float]:
    """Return the CPU seconds of each role as a share of the machine's CPU time during the load."""
    whole = loaded_s * (os.cpu_count() or 1)
    return {role: round(each / whole, 3) for role, each in spent.most_common() if each / whole >= 0.001}


def soak(config: Config, folder: Path, prompts: Prompts, options: argparse.Namespace) -> dict[str, Any]:
    """Run a steady load for `--minutes`; return errors, and the memory of each role in the first and the last quarter."""
    with servers.ours(config, folder) as server:
        offered = RATES[options.rate] * closed_loop_rate(saturate(server, prompts.ours, options), options.clients)
        moments = arrivals(offered, 60 * options.minutes, options.seed)
        log(f"{len(moments)} requests in {options.minutes:g} minutes, {offered:.2f} per second")
        with servers.MemorySampler(server) as sampler:
            answers = asyncio.run(open_loop(server.chat, prompts.ours(len(moments)), moments))
    quarter = len(sampler.samples) // 4
    roles = sampler.samples[-1][1]
    early, late = sampler.samples[: max(1, quarter)], sampler.samples[-max(1, quarter) :]
    memory = {role: [round(statistics.median(sample.get(role, 0.0) for _, sample in some), 1) for some in (early, late)] for role in roles}
    bad = failed(answers)
    for role, (first, last) in memory.items():
        print(f"{role:<12} {first:>9.1f} MiB in the first quarter, {last:>9.1f} in the last: {last / first:.3f}")
    return {
        "errors": len(bad),
        "answers": len(answers),
        "minutes": options.minutes,
        "rate": round(offered, 3),
        **_rounded("latency", quantiles(latencies(answers), 0.5, 0.99), 3),
        "memory_mib": memory,
        "memory_growth": round(max(last / first for first, last in memory.values()), 3),
        "first_errors": [each.tree.get("error") for each in bad[:3]],
    }


def overload(config: Config, folder: Path, prompts: Prompts, options: argparse.Namespace) -> dict[str, Any]:
    """Send `--times` the server's capacity for `--seconds`, between two moderate loads that should have equal latencies.

    Capacity is the throughput of a closed loop with `serving.max_concurrency` clients. The latency of answered requests is compared with
    the latency in that loop.
    """
    with servers.ours(config, folder) as server, servers.MemorySampler(server, 1.0) as sampler:
        asyncio.run(closed_loop(server.chat, prompts.ours(_WARM), options.clients))
        full = asyncio.run(closed_loop(server.chat, prompts.ours(options.requests), config.serving.max_concurrency))
        capacity = closed_loop_rate(full, config.serving.max_concurrency)
        log(f"capacity: {capacity:.2f} answers/s with {config.serving.max_concurrency} clients")
        parts = {}
        for name, offered, length in (
            ("before", RATES["moderate"] * capacity, _BEFORE_S),
            ("over", options.times * capacity, options.seconds),
            ("after", RATES["moderate"] * capacity, _BEFORE_S),
        ):
            moments = arrivals(offered, length, options.seed)
            began = len(sampler.samples)
            parts[name] = asyncio.run(open_loop(server.chat, prompts.ours(len(moments)), moments))
            peak = max(sum(sample.values()) for _, sample in sampler.samples[began:])
            log(f"{name}: {len(moments)} requests, {dict(Counter(each.status for each in parts[name]))}, {peak:.0f} MiB at most")
        memory = [round(sum(sample.values())) for _, sample in sampler.samples]
    served = [each for each in parts["over"] if each.status == 200]
    refused = [each for each in parts["over"] if each.status in (429, 503)]
    kept, base = quantiles(latencies(served), 0.5, 0.99), quantiles(latencies(full), 0.5, 0.99)
    return {
        **_rounded("latency_ratio", [mine / theirs for mine, theirs in zip(kept, base, strict=True)], 2),
        **_rounded("refusal_s", quantiles(latencies(refused), 0.5, 0.99), 3),
        "refused": dict(Counter(each.status for each in refused)),
        "answered": len(served),
        "errors": len(parts["over"]) - len(served) - len(refused) + len(failed(parts["before"])) + len(failed(parts["after"])),
        **_rounded("recovered_latency_ratio", _ratios(parts["after"], parts["before"]), 2),
        "capacity": round(capacity, 3),
        "goodput": round(len(served) / duration_s(served), 3),
        "offered": round(len(parts["over"]) / options.seconds, 1),
        **_rounded("latency_at_capacity", base, 2),
        **_rounded("latency", kept, 2),
        "memory_mib": {"first": memory[0], "highest": max(memory), "last": memory[-1]},
    }


def _ratios(one: Sequence[Answer], two: Sequence[Answer]) -> list[float]:
    pairs = zip(quantiles(latencies(one), 0.5, 0.99), quantiles(latencies(two), 0.5, 0.99), strict=True)
    return [mine / theirs for mine, theirs in pairs]


def saturate(server: servers.Server, draw: Callable[[int], list[Body]], options: argparse.Namespace) -> list[Answer]:
    """Return the answers to `--requests` bodies in a closed loop of `--clients` clients, after a warm-up."""
    asyncio.run(closed_loop(server.chat, draw(_WARM), options.clients))
    return asyncio.run(closed_loop(server.chat, draw(options.requests), options.clients))


def _rounded(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    return {f"{name}_{share}": round(value, digits) for share, value in zip(("p50", "p99"), values, strict=True)}


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as a table, and with `as_json` also as one JSON object on the last line."""
    for key, value in result.items():
        print(f"{key:<28} {value}")
    if as_json:
        print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    """Return a parser with the options that several serving benchmarks share."""
    made = argparse.ArgumentParser()
    made.add_argument("--candidates", type=int, default=8)
    made.add_argument(
        "--answers",
        choices=["lines", "free"],
        default="lines",
        help="lines: with shots, up to a newline; free: without shots, up to 128 tokens",
    )
    made.add_argument("--clients", type=int, default=16, help="clients of a closed loop")
    made.add_argument("--requests", type=int, default=128, help="requests of a closed loop")
    made.add_argument(
        "--rate", choices=list(RATES), default="moderate", help=f"arrival rate of an open loop, as a share of capacity: {RATES}"
    )
    made.add_argument("--seconds", type=float, default=60.0, help="length of an open loop")
    made.add_argument("--seed", type=int, default=20261126)
    made.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="a setting of the servers")
    made.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    return made


def prepare(options: argparse.Namespace, folder: Path, *more: str) -> tuple[Config, Prompts]:
    """Write the scorer; return the servers' config and the prompts. `--set` options override the settings in `more`."""
    servers.write_scorer(folder / "scorer", options.seed)
    settings = [f"workspace={folder}", "sampler.prompt.form=chat", *more, *options.overrides]
    if options.answers == "free":
        # Stop strings in the server's config apply to every request.
        settings.append("sampler.decodings=[{name: sample, n: 8, max_tokens: 128}]")
    config = load("demo", settings)
    return config, Prompts(config, options)


def _high_throughput() -> tuple[str, ...]:
    """Return the settings for high throughput on CPU: two LLM replicas, and a compiled model as in vLLM's server."""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    return "serving.llm_replicas=2", f"sampler.engine.cpu_threads={threads}", "sampler.engine.compile=true"


def main() -> int:
    made = parser()
    made.description = __doc__.splitlines()[0] if __doc__ else None
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--minutes", type=float, help="run a steady load for this many minutes instead")
    made.add_argument("--overload", action="store_true", help="send more than the capacity instead")
    made.add_argument("--times", type=float, default=10.0, help="load in --overload, as a multiple of the capacity")
    options = made.parse_args()
    mode = soak if options.minutes else overload if options.overload else compare
    with tempfile.TemporaryDirectory(prefix="cappy-serving-") as name:
        config, prompts = prepare(options, Path(name), *(_high_throughput() if mode is compare else ()))
        result = mode(config, Path(name), prompts, options)
    show(result, bool(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
