"""Run the benchmarks: `python -m benchmarks` runs all, `--quick` the short runs, `--list` prints names and purposes.

Every benchmark has a separate process. A failed benchmark does not stop the others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A module of `benchmarks/` with a `main`."""

    name: str
    """The module: `python -m benchmarks.NAME`."""
    compares: str
    """The figure, and the baseline it is compared with, in a phrase."""
    minutes: float
    """Roughly, on 2 CPU cores with nothing else running, models and BIG-bench in the cache."""
    quick: tuple[str, ...] | None = None
    """Arguments of the quick run, which takes under two minutes; None if it has no quick run."""
    arguments: tuple[str, ...] = ()
    """Arguments of the full run, if the defaults are meant for a GPU."""
    needs: str | None = None
    """A package that `make setup` does not install."""


BENCHMARKS = (
    Benchmark("adaptive", "adaptive sampling against fixed numbers of candidates: quality and cost", 15),
    Benchmark("answer", "`cappy answer` against vLLM driven directly: candidates/s", 12),
    Benchmark("answer_quality", "answers of hidden references against greedy, consensus and likelihood: Rouge-L", 8),
    Benchmark("batching", "a batch for each core against one batch on all cores: latency", 4, ("--turns", "1", "--seconds", "15")),
    Benchmark("gate", "rules of the gate of `cappy adapt`, simulated: wrong decisions and their cost", 0.2, ()),
    Benchmark("consensus", "the consensus of a pool against a loop over `rouge_score`: ms a pool", 1, ("--pools", "50")),
    Benchmark("generation", "the generate pipeline against vLLM driven directly: candidates/s", 12),
    Benchmark("hostile", "the answers to malformed and malicious requests against the documented ones", 4),
    Benchmark("interchange", "scores of one scorer here, in transformers, CrossEncoder and vLLM", 15, needs="sentence_transformers"),
    Benchmark("kills", "`cappy generate` or `cappy answer` with killed processes against an undisturbed run", 20),
    Benchmark("objectives", "training objectives at equal compute: quality", 60),
    Benchmark("odd", "the rows of odd inputs against the rows published, set aside and merged", 1, ()),
    Benchmark("prompts", "prompt forms: quality of the candidate pool", 10),
    Benchmark("rouge", "labels against `rouge_score`: labels/s and equality to the bit", 5, ("--pairs", "50000")),
    Benchmark("round_trip", "greedy decoding before and after LoRA on responses that the scorer selected: Rouge-L", 25),
    Benchmark("scale", "`cappy generate` at 10,000 to 1,000,000 instructions: memory and speed", 15),
    Benchmark("score_files", "`cappy score` against CrossEncoder, Parquet to Parquet: pairs/s", 15, ("--pairs", "600", "--files", "1")),
    Benchmark("scoring", "the scorer against CrossEncoder and the Hugging Face pipeline: pairs/s", 15, needs="sentence_transformers"),
    Benchmark("selection", "the fitted selection without each of its signals against single signals: quality", 8),
    Benchmark("serving", "`cappy serve` against vLLM's own server: answers/s and latency", 40),
    Benchmark("serving_kills", "killed replicas and updates under load: failed requests", 25),
    Benchmark("siblings", "a prompt prefilled once for all candidates against once for each: pools/s", 20),
    Benchmark("slow_bodies", "the time of a GET request with and without clients that send bodies slowly", 3, ("--seconds", "5")),
    Benchmark("split_leak", "split keys: share of validation rows that overlap train rows", 1, ()),
    Benchmark("training", "the trainer against padding to 512 and Hugging Face's Trainer: pairs/s", 20),
    Benchmark("training_kills", "`cappy train` with killed processes against an undisturbed run: weights", 15),
    Benchmark("training_memory", "`cappy train` at 10,000 to 1,000,000 pairs: memory and speed", 20),
    Benchmark(
        "training_step",
        "a training step padded to 512, padded dynamically, and of `cappy train`: pairs/s and memory",
        *(
            10,
            ("--model", "minilm", "--steps", "1", "--turns", "1", "--batch-size", "8"),
            ("--model", "minilm", "--steps", "4", "--turns", "2"),
        ),
    ),
    Benchmark("training_workers", "two training workers against one: losses and pairs/s", 3, ("--steps", "20")),
)


def missing(benchmark: Benchmark) -> str | None:
    """Return why a benchmark cannot run in this environment, or None."""
    if benchmark.needs is None or importlib.util.find_spec(benchmark.needs) is not None:
        return None
    return f"{benchmark.name} needs {benchmark.needs}: pip install 'cappy-ray[bench]'"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="run only these")
    parser.add_argument("--quick", action="store_true", help="the quick runs, each under two minutes")
    parser.add_argument("--list", action="store_true", help="print the benchmarks and run none")
    options = parser.parse_args(given)
    unknown = sorted(set(options.names) - {each.name for each in BENCHMARKS})
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; `python -m benchmarks --list` prints the names")
    chosen = [
        each for each in BENCHMARKS if (not options.names or each.name in options.names) and (not options.quick or each.quick is not None)
    ]
    if options.list:
        for each in chosen:
            print(f"{each.name:<18}{each.minutes:>4g} min  {'quick' if each.quick is not None else '':<6} {each.compares}")
        return 0
    failed, skipped = [], []
    for each in chosen:
        if reason := missing(each):
            skipped.append(reason)
            print(f"skipped: {reason}", flush=True)
            continue
        arguments = each.quick if options.quick and each.quick is not None else each.arguments
        print(f"{each.name}: {each.compares}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{each.name}", *arguments]).returncode
        print(f"{each.name}: {'done' if code == 0 else f'exit code {code}'} in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
        if code:
            failed.append(each.name)
    print(f"{len(chosen) - len(failed) - len(skipped)} ran, {len(skipped)} skipped, {len(failed)} failed {' '.join(failed)}".rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
