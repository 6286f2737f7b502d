"""Compare `cappy score` with sentence-transformers' `CrossEncoder.predict`, from Parquet to Parquet, with the same scorer.

    python -m benchmarks.score_files --json -
    python -m benchmarks.score_files --memory --json -

The pairs are instructions with a reference, from BIG-bench or `--data`, divided into files. The two sides alternate on the files. Each side
has one compute thread, so the ratio is per CPU core. The time of `cappy score` is the time to read, to score and to merge. The time of
`CrossEncoder` is the time to read the file, to score its pairs and to write them. `CrossEncoder` runs with its defaults (float32, batches
of 32) and cuts pairs to 512 tokens. `ratio` is the median over the files.

The time to start, with the load of the scorer, is reported separately. `merging_s` is the median time of `cappy score` to merge.

sentence-transformers is taken from this environment, else from `CAPPY_TRAINERS_PYTHON`, else from `.venv-trainers` (`make trainers`).
Without it, only `cappy score` is measured and `ratio` is null.

`--memory` measures the peak memory of `cappy score` with `--rows` pairs instead: private memory of the driver, of the largest scoring actor
and of the largest other Ray worker. The scorer is cappy-minilm, or with `--tiny` a random encoder with one layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import MIB, PeakMemory, report
from benchmarks.pairs import DATA_HELP, labelled_pairs
from benchmarks.synthetic import WORDS
from cluster import artifacts, models
from cluster.config import load
from cluster.progress import log
from cluster.runtime import ray_session

ROWS = (10_000, 100_000)
SETTINGS = ("score.scorers=1", "answer.scorer_threads=1")
_BATCH_ROWS = 10_000

# Runs in the environment of sentence-transformers, which does not have this project.
CROSS_ENCODER = """
import json, sys, time
start = time.perf_counter()
import pyarrow as pa, pyarrow.parquet as pq, torch
torch.set_num_threads(1)
from sentence_transformers import CrossEncoder
model = CrossEncoder(sys.argv[1], device="cpu", max_length=512)
model.predict([("a question", "an answer")])
print(json.dumps(time.perf_counter() - start), flush=True)
for line in sys.stdin:
    source, target = json.loads(line)
    start = time.perf_counter()
    table = pq.read_table(source)
    pairs = list(zip(table["instruction"].to_pylist(), table["response"].to_pylist()))
    scores = model.predict(pairs, show_progress_bar=False)
    pq.write_table(table.append_column("score", pa.array(scores)), target)
    print(json.dumps(time.perf_counter() - start), flush=True)
"""


def find_python() -> str | None:
    """Return a Python that has sentence-transformers, or None."""
    if importlib.util.find_spec("sentence_transformers") is not None:
        return sys.executable
    root = Path(__file__).resolve().parents[1]
    given = os.environ.get("CAPPY_TRAINERS_PYTHON")
    return next((each for each in (given, str(root / ".venv-trainers/bin/python")) if each and Path(each).exists()), None)


class Other:
    """A process with a `CrossEncoder`."""

    def __init__(self, python: str, scorer: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python, "-c", CROSS_ENCODER, scorer]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.start_s = self._read()
        """Seconds to import the library and to load the scorer."""

    def score(self, source: Path, target: Path) -> float:
        """Score a file; return the seconds."""
        assert self.process.stdin is not None
        print(json.dumps([str(source), str(target)]), file=self.process.stdin, flush=True)
        return self._read()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of sentence-transformers ended with exit code {self.process.wait()}")
        return float(json.loads(line))


def score_file(source: Path, target: Path, scorer: str) -> tuple[float, float, float]:
    """Score a file with `cappy score`; return the seconds, the seconds to merge among them, and the seconds to start the actor."""
    from serving.score import run_score

    start = time.perf_counter()
    config = load(None, [f"scorer_path={scorer}", *SETTINGS, "score.unit_rows=128"])
    run_score(config, src=str(source), dst=str(target))
    whole = time.perf_counter() - start
    manifest = artifacts.read_manifest(str(target), "scores", "score")
    summary = manifest["summary"]
    if summary["dead_letters"]:
        raise SystemExit(f"{summary['dead_letters']} pairs were not scored, so the sides are not comparable")
    rate = manifest["rates"]["pairs_per_second"]  # type: ignore[typeddict-item]
    seconds = manifest["seconds"]  # type: ignore[typeddict-item]
    worked = seconds["reading"] + seconds["merging"] + summary["pairs"] / rate
    return worked, seconds["merging"], whole - worked


def compare(pairs: int, files: int, seed: int, data: Path | None, scorer: str) -> dict[str, Any]:
    """Score the files with both sides in turn; return the rates and the ratio."""
    python = find_python()
    # `cappy score` scores a repeated pair once, so the files have no repeats.
    distinct = list(dict.fromkeys(zip(*labelled_pairs(data, pairs, seed)[:2], strict=True)))
    size = len(distinct) // files
    if not size:
        raise SystemExit(f"--pairs={pairs}: there are {len(distinct)} different pairs for {files} files; raise it, or lower --files")
    table = pa.table(dict(zip(("instruction", "response"), zip(*distinct, strict=True), strict=True)))
    ours: list[float] = []
    starts: list[float] = []
    merging: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory(prefix="cappy-score-files-") as name, ray_session():
        folder = Path(name)
        other = Other(python, str(models.resolve(scorer, "scorer"))) if python else None
        for number in range(files):
            source = folder / f"pairs-{number}.parquet"
            pq.write_table(table.slice(number * size, size), source)
            seconds, merging_s, start_s = score_file(source, folder / f"scores-{number}", scorer)
            ours.append(seconds)
            starts.append(start_s)
            merging.append(merging_s)
            if other:
                theirs.append(other.score(source, folder / f"other-{number}.parquet"))
            log(f"file {number + 1} of {files}: " + ", ".join(f"{size / each[-1]:.1f} pairs/s" for each in (ours, theirs) if each))
        if other:
            other.end()
    return {
        "ratio": round(statistics.median(other / own for own, other in zip(ours, theirs, strict=True)), 2) if theirs else None,
        "pairs_per_second": round(size * files / sum(ours), 1),
        "crossencoder_pairs_per_second": round(size * files / sum(theirs), 1) if theirs else None,
        "merging_s": round(statistics.median(merging), 1),
        "start_s": round(statistics.median(starts), 1),
        "crossencoder_start_s": round(other.start_s, 1) if other else None,
        "pairs": size * files,
        "files": files,
        "scorer": scorer,
        "without": None if theirs else "no environment has sentence-transformers; `make trainers` makes one",
    }


def write_pairs(path: Path, rows: int) -> None:
    """Write made-up pairs of about 30 words."""
    draw = random.Random(rows)
    schema = pa.schema([("instruction", pa.string()), ("response", pa.string()), ("n", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _BATCH_ROWS):
            numbers = range(start, min(start + _BATCH_ROWS, rows))
            texts = [(" ".join(draw.choices(WORDS, k=20)), " ".join(draw.choices(WORDS, k=10))) for _ in numbers]
            made = [{"instruction": one, "response": two, "n": number} for number, (one, two) in zip(numbers, texts, strict=True)]
            writer.write_table(pa.Table.from_pylist(made, schema))


def save_tiny_scorer(folder: Path) -> None:
    """Save a random encoder with one layer of 32 values as a scorer, with the tokenizer of MiniLM."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    from training.scorer import Scorer, load_tokenizer

    tokenizer = load_tokenizer(models.resolve("minilm-l6", "encoder"), "minilm-l6", "encoder")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=128, **sizes)
    Scorer(AutoModelForSequenceClassification.from_config(config), tokenizer, 128).save(folder)


def measure_memory(rows: int, folder: Path, scorer: str) -> dict[str, Any]:
    """Score `rows` pairs in a separate process; return the rate (pairs/s) and the peak memory (MiB)."""
    source, target = folder / f"{rows}.parquet", folder / f"scores-{rows}"
    write_pairs(source, rows)
    settings = [word for each in SETTINGS for word in ("--set", each)]
    command = [sys.executable, "-m", "cappy.cli", "score", str(source), str(target), "--scorer", scorer, "--top-per-instruction", "1"]
    run = subprocess.Popen([*command, *settings])
    watch = PeakMemory(run.pid, {"ScoreWorker": "actor", "": "worker"})
    code = run.wait()
    watch.end()
    if code:
        raise SystemExit(f"{rows} pairs: exit code {code}")
    manifest = artifacts.read_manifest(str(target), "scores", "score")
    seconds = manifest["seconds"]  # type: ignore[typeddict-item]
    return {
        "pairs": rows,
        "pairs_per_second": round(rows / sum(seconds.values()), 1),
        **{f"{role}_mib": round(peak / MIB) for role, peak in sorted(watch.peaks.items())},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=4000, help="pairs of all files")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--scorer", default="cappy-minilm")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of pairs of --memory")
    parser.add_argument("--tiny", action="store_true", help="with --memory: a random encoder with one layer")
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    if not options.memory:
        result = compare(options.pairs, options.files, options.seed, options.data, options.scorer)
        compared = f"CrossEncoder {result['crossencoder_pairs_per_second']}: {result['ratio']}x" if result["ratio"] else result["without"]
        print(f"{result['pairs_per_second']} pairs/s; {compared}")
        if options.json:
            print(json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory(prefix="cappy-score-memory-") as name:
        scorer = options.scorer
        if options.tiny:
            scorer = f"{name}/tiny"
            save_tiny_scorer(Path(scorer))
        results = []
        for rows in options.rows:
            results.append(measure_memory(rows, Path(name), scorer))
            log(json.dumps(results[-1]))
    report(results, ("driver_mib", "actor_mib", "worker_mib", "pairs_per_second"), bool(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
