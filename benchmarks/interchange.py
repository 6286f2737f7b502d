"""Compare the scores of one scorer folder in this project, plain transformers, sentence-transformers' CrossEncoder and vLLM.

Every library loads the same folder and scores the same pairs in float32. The result holds the largest difference of each library's
scores to this project's scores. Pairs above the model's length limit are left out, because each library cuts them differently.

    python -m benchmarks.interchange --scorer runs/demo/scorer --data runs/demo/dataset --json -

`--random roberta-large` writes a folder in the layout of the published `btan2/cappy-large`, with random weights, and uses that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from benchmarks.demo import demo_scorer, demo_set
from benchmarks.training_step import ROBERTA_LARGE
from cluster import models, storage
from cluster.progress import log
from generation.dataset import RegressionSet
from training.scorer import Scorer

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 600}
SHAPES = {"roberta-large": ROBERTA_LARGE, "roberta-tiny": TINY}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--scorer", help="a published scorer, or any one-label model; default: the demo's scorer, trained if it is missing")
    model.add_argument("--random", choices=tuple(SHAPES))
    parser.add_argument(
        "--data", help="a published set whose validation pairs are scored; default: the demo's set, generated if it is missing"
    )
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--without", nargs="*", default=[], choices=("transformers", "crossencoder", "vllm"))
    parser.add_argument("--json", help="file for the result; - prints it")
    options = parser.parse_args()
    options.data = options.data or demo_set()
    if not options.random:
        options.scorer = options.scorer or demo_scorer()
    instructions, responses = read(options.data, options.pairs)
    if options.random:
        folder = storage.new_temporary_folder("interchange")
        write_published_layout(folder, SHAPES[options.random], instructions + responses)
    else:
        folder = models.resolve(options.scorer, "--scorer")
    try:
        result = {"scorer": options.random or options.scorer, **compare(folder, instructions, responses, options.without)}
    finally:
        if options.random:
            shutil.rmtree(folder)
    text = json.dumps(result)
    if options.json and options.json != "-":
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    print(text)


def read(uri: str, count: int) -> tuple[list[str], list[str]]:
    """Return the first `count` validation pairs of a set, without empty responses: some tokenizers treat such a pair as a single text."""
    pairs: list[tuple[str, str]] = []
    for read in RegressionSet(uri).pairs("validation"):
        pairs += [pair for pair in zip(read.instructions, read.responses, strict=True) if pair[1].strip()]
        if len(pairs) >= count:
            break
    return [one for one, _ in pairs[:count]], [two for _, two in pairs[:count]]


def write_published_layout(folder: Path, shape: dict[str, int], texts: Sequence[str]) -> None:
    """Write a random model in the layout of `btan2/cappy-large`: RoBERTa, one label, safetensors, a byte-level BPE tokenizer."""
    torch.manual_seed(0)
    config = RobertaConfig(**shape, num_labels=1, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(texts, vocab_size=min(shape["vocab_size"], 5000), special_tokens=specials, show_progress=False)
    trained._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def compare(folder: Path, instructions: Sequence[str], responses: Sequence[str], without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the largest difference of each library's scores to this project's scores; libraries in `without` are left out."""
    scorer = Scorer.load(str(folder), dtype="float32", device="cpu")
    lengths = [len(ids) for ids in scorer.tokenizer(list(instructions), list(responses))["input_ids"]]
    fitting = [place for place, length in enumerate(lengths) if length <= scorer.max_length]
    pairs = [(instructions[place], responses[place]) for place in fitting]
    ours = scorer.score([one for one, _ in pairs], [two for _, two in pairs])
    scoring = {"transformers": by_transformers, "crossencoder": by_crossencoder, "vllm": by_vllm}
    differences = {}
    for name, score in scoring.items():
        if name not in without:
            scores = score(folder, pairs)
            differences[f"{name}_max_diff"] = float(np.abs(scores - ours).max())
            differences[f"{name}_squashed_max_diff"] = float(np.abs(scores - 1 / (1 + np.exp(-ours))).max())
            log(f"{name}: {differences[f'{name}_max_diff']:.2e}")
    return {"pairs": len(pairs), "too_long": len(lengths) - len(pairs), "score_std": float(ours.std()), **differences}


def by_transformers(folder: Path, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval(),
    )
    with torch.inference_mode():
        logits = [model(**tokenizer([one], [two], return_tensors="pt")).logits.item() for one, two in pairs]
    return np.array(logits)


def by_crossencoder(folder: Path, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    scores: np.ndarray = CrossEncoder(str(folder), device="cpu").predict(list(pairs), show_progress_bar=False)
    return scores


def by_vllm(folder: Path, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(model=str(folder), runner="pooling", dtype="float32", enforce_eager=True, disable_log_stats=True)
    outputs = llm.score([one for one, _ in pairs], [two for _, two in pairs], use_tqdm=False)
    return np.array([output.outputs.score for output in outputs])


if __name__ == "__main__":
    main()
