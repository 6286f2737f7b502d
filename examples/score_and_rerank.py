"""Use a scorer from Python: score pairs, choose the best response, rank a list, filter a file.

    python examples/score_and_rerank.py [SCORER]

SCORER is a folder, a hub name or an s3:// folder. The default is the scorer of `examples/own_jsonl.py`; run that first.
"""

import sys

import numpy as np

import cappy

scorer = cappy.Scorer.load(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/scorer")

# A score estimates the Rouge-L of a response, from 0 to 1. It is a raw regression output, so it may lie a little outside.
instruction = "What is the capital of Iceland?"
candidates = ["I like trains.", "Reykjavik", "The capital of Iceland is the capital of Iceland.", "Oslo"]
scores = scorer.score([instruction] * len(candidates), candidates)  # float32, one for each pair

# Choose one: best-of-n.
choice = scorer.best(instruction, candidates)
print(f"best     {choice.response!r} with score {choice.score:.3f}")

# Rank all.
for index in np.argsort(-scores):
    print(f"{scores[index]:8.3f} {candidates[index]}")

# Keep the good pairs of a data set, here those above the median score. Pairs of different instructions go in one call.
pairs = [
    ("Put into the past tense: We paint the wall.", "We painted the wall."),
    ("Put into the past tense: We paint the wall.", "blue"),
    ("What is the capital of Belgium?", "Brussels"),
    ("What is the capital of Belgium?", "What is the capital of Belgium?"),
]
scores = scorer.score(*zip(*pairs, strict=True))
kept = [pair for pair, score in zip(pairs, scores, strict=True) if score > np.median(scores)]
print(f"kept     {len(kept)} of {len(pairs)} pairs: {[response for _, response in kept]}")
