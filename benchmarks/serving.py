"""Boosted answers per second against vLLM's own OpenAI server asked for the same samples, and how the server bears long and heavy load.

    python -m benchmarks.serving --json -                              # against vLLM's server
    python -m benchmarks.serving --minutes 30 --rate moderate --json - # half an hour: errors, memory
    python -m benchmarks.serving --overload --json -                   # ten times what it can do, for a minute

All of them: real BIG-bench prompts (the demo's, in chat form), SmolLM2 on vLLM, a MiniLM scorer whose head is drawn.
`--answers lines` (32 tokens at most) has the demo's shots and ends where the line does, `free` (128 at most) is the bare instruction.
`cappy serve` is asked for one choice out of `--candidates`, vLLM's server for as many samples of the same prompts; weights, engine
settings, temperature, length and stop strings are the same. How threads and processes wait is each server's own. Against vLLM's server
ours has the LLM twice, each with half the cores (docs/guides/serve.md, Replicas). They run by turns, never at the same time.

- `throughput_ratio`: answers a second of `--clients` clients without a pause, ours over vLLM's, medians over the turns. Counted while all
  of them are busy: the first and the last `--clients` answers are left out.
- `plain_throughput_ratio`: the same over vLLM's server as it comes, with settings of its own for its engine; it is given all cores.
- `added_latency_p50`, `_p99`: over our answers in an open load (Poisson arrivals at `--rate` of vLLM's rate above), quantiles of an
  answer's `scoring_s` / `sampling_s`, as the gateway takes them: handing over, waiting and scoring, against sampling.
- `extra_latency_p50`, `_p99`: the same quantiles of whole answers in that load seen by the client, ours less vLLM's, over our median
  `sampling_s`. Everything we add is in it, and so is what scoring takes from the LLM's cores.
- `cpu`: what each kind of process took of the machine's CPU time in the first of these loads; `rest` is Ray.
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
from benchmarks.load import Answer, Body, arrivals, closed, opened, quantiles, rate, seconds
from cluster.config import Config, load
from cluster.progress import log
from generation import few_shot
from generation.prompts import messages

RATES = {"light": 0.25, "moderate": 0.5, "high": 0.8}
_WARM = 24
_BEFORE_S = 30.0


class Prompts:
    """Bodies of requests, never the same prompt again before all were used; `state` has how a run of bodies is drawn again."""

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
        """Ask for the best of the candidates; the answers tell where the time went."""
        return [{**body, "cappy": {"candidates": self._candidates}} for body in self._next(count)]

    def vllms(self, count: int) -> list[Body]:
        return [{**body, "n": self._candidates} for body in self._next(count)]

    def _next(self, count: int) -> list[Body]:
        start, self.place = self.place, self.place + count
        return [self._bodies[place % len(self._bodies)] for place in range(start, self.place)]


def wrong(answers: Sequence[Answer], choices: int = 1) -> list[Answer]:
    """Return the answers that are errors, or have another number of choices."""
    return [each for each in answers if each.status != 200 or len(each.tree["choices"]) != choices]


def latencies(answers: Sequence[Answer]) -> list[float]:
    return [each.latency for each in answers]


def compare(config: Config, folder: Path, prompts: Prompts, options: argparse.Namespace) -> dict[str, Any]:
    """Both servers by turns, each started for its turn."""
    rates: dict[str, list[float]] = {"plain": [], "vllm": [], "ours": []}
    answers: dict[str, list[Answer]] = {"vllm": [], "ours": []}
    cpu: dict[str, Counter[str]] = {"vllm": Counter(), "ours": Counter()}
    loaded = {"vllm": 0.0, "ours": 0.0}
    errors: list[Answer] = []
    for turn in range(options.turns):
        offered = 0.0
        place = prompts.place
        with servers.vllms(config, folder, settings="own") as server:
            full = busy(server, prompts.vllms, options)
        rates["plain"].append(rate(full, options.clients))
        errors += wrong(full, options.candidates)
        log(f"turn {turn + 1} of {options.turns}, vllm as it comes: {rates['plain'][-1]:.2f} answers/s")
        for side, start in (("vllm", servers.vllms), ("ours", servers.ours)):
            prompts.place = place  # each has all its prompts for the first time
            choices = options.candidates if side == "vllm" else 1
            draw = prompts.vllms if side == "vllm" else prompts.ours
            with start(config, folder) as server:
                asyncio.run(closed(server.chat, draw(_WARM), options.clients))
                before = server.cpu_seconds()
                full = asyncio.run(closed(server.chat, draw(options.requests), options.clients))
                cpu[side].update({role: spent - before.get(role, 0.0) for role, spent in server.cpu_seconds().items()})
                loaded[side] += seconds(full)
                rates[side].append(rate(full, options.clients))
                offered = offered or RATES[options.rate] * rates[side][-1]
                moments = arrivals(offered, options.seconds, options.seed + turn)
                part = asyncio.run(opened(server.chat, draw(len(moments)), moments))
            answers[side] += part
            errors += wrong([*full, *part], choices)
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
    """CPU seconds by role as shares of the machine's while the load ran."""
    whole = loaded_s * (os.cpu_count() or 1)
    return {role: round(each / whole, 3) for role, each in spent.most_common() if each / whole >= 0.001}


def soak(config: Config, folder: Path, prompts: Prompts, options: argparse.Namespace) -> dict[str, Any]:
    """A steady load for minutes: errors, and each kind of process's memory in the first and the last quarter of it."""
    with servers.ours(config, folder) as server:
        offered = RATES[options.rate] * rate(busy(server, prompts.ours, options), options.clients)
        moments = arrivals(offered, 60 * options.minutes, options.seed)
        log(f"{len(moments)} requests in {options.minutes:g} minutes, {offered:.2f} a second")
        with servers.MemoryWatch(server) as watch:
            answers = asyncio.run(opened(server.chat, prompts.ours(len(moments)), moments))
    quarter = len(watch.looks) // 4
    roles = watch.looks[-1][1]
    early, late = watch.looks[: max(1, quarter)], watch.looks[-max(1, quarter) :]
    memory = {role: [round(statistics.median(look.get(role, 0.0) for _, look in some), 1) for some in (early, late)] for role in roles}
    bad = wrong(answers)
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
    """`--times` its capacity for `--seconds`, between two moderate loads that should look the same.

    Capacity is what as many clients get as the server works on at once, and so is the latency the answered ones are held against.
    """
    with servers.ours(config, folder) as server, servers.MemoryWatch(server, 1.0) as watch:
        asyncio.run(closed(server.chat, prompts.ours(_WARM), options.clients))
        full = asyncio.run(closed(server.chat, prompts.ours(options.requests), config.serving.max_concurrency))
        capacity = rate(full, config.serving.max_concurrency)
        log(f"capacity: {capacity:.2f} answers/s with {config.serving.max_concurrency} clients")
        parts = {}
        for name, offered, length in (
            ("before", RATES["moderate"] * capacity, _BEFORE_S),
            ("over", options.times * capacity, options.seconds),
            ("after", RATES["moderate"] * capacity, _BEFORE_S),
        ):
            moments = arrivals(offered, length, options.seed)
            began = len(watch.looks)
            parts[name] = asyncio.run(opened(server.chat, prompts.ours(len(moments)), moments))
            peak = max(sum(look.values()) for _, look in watch.looks[began:])
            log(f"{name}: {len(moments)} requests, {dict(Counter(each.status for each in parts[name]))}, {peak:.0f} MiB at most")
        memory = [round(sum(look.values())) for _, look in watch.looks]
    served = [each for each in parts["over"] if each.status == 200]
    refused = [each for each in parts["over"] if each.status in (429, 503)]
    kept, base = quantiles(latencies(served), 0.5, 0.99), quantiles(latencies(full), 0.5, 0.99)
    return {
        **_rounded("latency_ratio", [mine / theirs for mine, theirs in zip(kept, base, strict=True)], 2),
        **_rounded("refusal_s", quantiles(latencies(refused), 0.5, 0.99), 3),
        "refused": dict(Counter(each.status for each in refused)),
        "answered": len(served),
        "errors": len(parts["over"]) - len(served) - len(refused) + len(wrong(parts["before"])) + len(wrong(parts["after"])),
        **_rounded("recovered_latency_ratio", _ratios(parts["after"], parts["before"]), 2),
        "capacity": round(capacity, 3),
        "goodput": round(len(served) / seconds(served), 3),
        "offered": round(len(parts["over"]) / options.seconds, 1),
        **_rounded("latency_at_capacity", base, 2),
        **_rounded("latency", kept, 2),
        "memory_mib": {"first": memory[0], "highest": max(memory), "last": memory[-1]},
    }


def _ratios(one: Sequence[Answer], two: Sequence[Answer]) -> list[float]:
    pairs = zip(quantiles(latencies(one), 0.5, 0.99), quantiles(latencies(two), 0.5, 0.99), strict=True)
    return [mine / theirs for mine, theirs in pairs]


def busy(server: servers.Server, draw: Callable[[int], list[Body]], options: argparse.Namespace) -> list[Answer]:
    """Return the answers to `--requests` bodies, from `--clients` clients without a pause, after a few to warm up."""
    asyncio.run(closed(server.chat, draw(_WARM), options.clients))
    return asyncio.run(closed(server.chat, draw(options.requests), options.clients))


def _rounded(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    return {f"{name}_{share}": round(value, digits) for share, value in zip(("p50", "p99"), values, strict=True)}


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result for people, and once more as JSON on the last line."""
    for key, value in result.items():
        print(f"{key:<28} {value}")
    if as_json:
        print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    """What `serving_kills` takes as well."""
    made = argparse.ArgumentParser()
    made.add_argument("--candidates", type=int, default=8)
    made.add_argument(
        "--answers", choices=["lines", "free"], default="lines", help="lines: with shots, to the end of the line; free: neither"
    )
    made.add_argument("--clients", type=int, default=16, help="requests under way at once in the loads without a pause")
    made.add_argument("--requests", type=int, default=128, help="requests of a load without a pause")
    made.add_argument("--rate", choices=list(RATES), default="moderate", help=f"of an open load, as a share of capacity: {RATES}")
    made.add_argument("--seconds", type=float, default=60.0, help="length of an open load")
    made.add_argument("--seed", type=int, default=20261126)
    made.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="a setting of the servers")
    made.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    return made


def prepare(options: argparse.Namespace, folder: Path, *more: str) -> tuple[Config, Prompts]:
    """Return the servers' config, with `more` settings where the options have no others, and the prompts; writes the scorer."""
    servers.write_scorer(folder / "scorer", options.seed)
    settings = [f"workspace={folder}", "sampler.prompt.form=chat", *more, *options.overrides]
    if options.answers == "free":
        # A server's own stop strings hold for every request.
        settings.append("sampler.decodings=[{name: sample, n: 8, max_tokens: 128}]")
    config = load("demo", settings)
    return config, Prompts(config, options)


def _twice() -> tuple[str, ...]:
    """What a server of an LLM on CPU has that is to answer much: two replicas of it, and a compiled model, as vLLM's server has."""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    return "serving.llm_replicas=2", f"sampler.engine.cpu_threads={threads}", "sampler.engine.compile=true"


def main() -> int:
    made = parser()
    made.description = __doc__.splitlines()[0] if __doc__ else None
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--minutes", type=float, help="soak for so long instead")
    made.add_argument("--overload", action="store_true", help="offer more than it can do instead")
    made.add_argument("--times", type=float, default=10.0, help="how much more")
    options = made.parse_args()
    mode = soak if options.minutes else overload if options.overload else compare
    with tempfile.TemporaryDirectory(prefix="cappy-serving-") as name:
        config, prompts = prepare(options, Path(name), *(_twice() if mode is compare else ()))
        result = mode(config, Path(name), prompts, options)
    show(result, bool(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
