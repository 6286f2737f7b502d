"""Compare scored pairs per second: this project, sentence-transformers' CrossEncoder and the Hugging Face pipeline, same weights.

    python -m benchmarks.scoring --json -

The pairs are instructions with a reference, from BIG-bench or `--data`. The scorer is MiniLM with a random head. All sides cut pairs to
512 tokens. `CrossEncoder.predict` runs with its defaults (float32, batches of 32), and with weights in the same dtype as this project's
scorer. The pipeline runs with its defaults, which score one pair at a time. The pairs are divided into parts; the sides alternate on
each part, and a ratio is the median over the parts. Needs `pip install 'cappy-ray[bench]'`.

Score differences are to CrossEncoder's float32 scores, on pairs short enough not to be cut. Cutting differs by design: this project
removes the middle of the instruction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

from benchmarks.pairs import DATA_HELP, labelled_pairs
from cluster import models
from cluster.config import ScorerConfig, TrainingConfig
from cluster.progress import log
from training.encoding import encode_pairs
from training.scorer import Scorer, load_tokenizer, new_model, pick_dtype

Score = Callable[[list[str], list[str]], np.ndarray]


def sides(folder: str, dtype: str) -> dict[str, Score]:
    """Return each way to score by name, as a function of instructions and responses."""
    from sentence_transformers import CrossEncoder

    ours, ours32 = Scorer.load(folder, "auto", "cpu"), Scorer.load(folder, "float32", "cpu")
    default = CrossEncoder(folder, device="cpu", max_length=512)
    same = CrossEncoder(folder, device="cpu", max_length=512, model_kwargs={"dtype": getattr(torch, dtype)})
    classify: Any = pipeline("text-classification", model=folder, device="cpu", function_to_apply="none")

    def piped(instructions: list[str], responses: list[str]) -> np.ndarray:
        inputs = [{"text": one, "text_pair": two} for one, two in zip(instructions, responses, strict=True)]
        return np.array([each["score"] for each in classify(inputs, truncation=True, max_length=512)])

    return {
        "ours": ours.score,
        "ours_float32": ours32.score,
        "crossencoder_default": lambda one, two: default.predict(list(zip(one, two, strict=True))),
        "crossencoder_same_dtype": lambda one, two: same.predict(list(zip(one, two, strict=True))),
        "pipeline": piped,
    }


def compare(folder: str, pairs: int, parts: int, seed: int, data: Path | None) -> dict[str, Any]:
    dtype = pick_dtype("auto", torch.device("cpu"))
    instructions, responses, _ = labelled_pairs(data, pairs, seed)
    lengths = encode_pairs(load_tokenizer(Path(folder), folder, "folder"), instructions, responses, 1 << 20).lengths
    whole = lengths <= 512
    scorers = sides(folder, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    for score in scorers.values():
        score(instructions[:16], responses[:16])
    for part in range(parts):
        rows = range(part, pairs, parts)
        one, two = [instructions[row] for row in rows], [responses[row] for row in rows]
        for name, score in scorers.items():
            start = time.perf_counter()
            scores[name].append(np.asarray(score(one, two)))
            seconds[name].append(time.perf_counter() - start)
        log(f"part {part + 1} of {parts}: " + ", ".join(f"{name} {len(one) / spent[-1]:.1f}/s" for name, spent in seconds.items()))
    uncut = np.concatenate([whole[part::parts] for part in range(parts)])
    flat = {name: np.concatenate(each)[uncut] for name, each in scores.items()}

    def ratio(name: str, to: str = "ours") -> float:
        return round(statistics.median(theirs / mine for theirs, mine in zip(seconds[name], seconds[to], strict=True)), 2)

    def difference(name: str) -> float:
        return float(np.abs(flat[name] - flat["crossencoder_default"]).max())

    return {
        "vs_crossencoder_default": ratio("crossencoder_default"),
        "vs_crossencoder_same_dtype": ratio("crossencoder_same_dtype"),
        "vs_pipeline": ratio("pipeline"),
        "float32_vs_crossencoder_default": ratio("crossencoder_default", "ours_float32"),
        "score_max_diff": difference("ours"),
        "score_max_diff_float32": difference("ours_float32"),
        "score_max_diff_crossencoder_same_dtype": difference("crossencoder_same_dtype"),
        "score_std": float(flat["crossencoder_default"].std()),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "pairs_compared": int(uncut.sum()),
        **{f"{name}_pairs_per_second": round(pairs / sum(spent), 1) for name, spent in seconds.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    encoder = models.resolve("minilm-l6", "encoder")
    with tempfile.TemporaryDirectory(prefix="cappy-scoring-") as folder:
        model = new_model(encoder, ScorerConfig(), TrainingConfig(), options.seed)
        Scorer(model, load_tokenizer(encoder, "minilm-l6", "encoder"), 512).save(folder)
        result = compare(folder, options.pairs, options.parts, options.seed, options.data)
    print(
        f"{result['ours_pairs_per_second']} pairs/s in {result['dtype']}: {result['vs_crossencoder_default']}x default CrossEncoder, "
        f"{result['vs_crossencoder_same_dtype']}x at equal dtype, {result['vs_pipeline']}x the pipeline"
    )
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
