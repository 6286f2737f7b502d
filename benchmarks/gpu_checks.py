"""Check three parts on one GPU: a vLLM engine samples, the scorer trains in bfloat16, the scorer scores. Run by `benchmarks/gpu.sh`.

    python -m benchmarks.gpu_checks training --json -

`training` and `scoring` need torch and transformers only, and no data: models have random weights and the pairs have T0's lengths
(`benchmarks.training_step`). `engine` needs the whole environment and the embedded LLM. With `--device cpu` a check runs without
a GPU, to test the check itself. A check that fails ends with exit code 1 and one line that states the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.training_step import MODELS, SETTINGS, Bench

MAX_LOSS_DIFFERENCE = 0.05
"""Largest difference accepted between the losses of one step in bfloat16 and in float32, relative to the float32 loss."""
MAX_SCORE_DIFFERENCE = 0.05
"""Largest difference accepted between the scores of one pair in bfloat16 and in float32."""


class CheckFailed(Exception):
    """A check found a wrong result; the message states it."""


def check_training(options: argparse.Namespace) -> dict[str, Any]:
    """Train the same steps in float32 and in bfloat16 from the same weights; return the losses and their largest difference."""
    losses = {dtype: _losses(options, dtype) for dtype in ("float32", "bfloat16")}
    if not all(math.isfinite(loss) for each in losses.values() for loss in each):
        raise CheckFailed(f"training: a loss is not finite: {losses}")
    difference = max(abs(half - full) / full for full, half in zip(*losses.values(), strict=True))
    if difference > MAX_LOSS_DIFFERENCE:
        raise CheckFailed(f"training: bfloat16 losses differ from float32 losses by {difference:.1%}, more than {MAX_LOSS_DIFFERENCE:.0%}")
    return {"steps": options.steps, "losses": losses, "max_difference": round(difference, 5)}


def _losses(options: argparse.Namespace, dtype: str) -> list[float]:
    """Return the loss of each step that `cappy train` takes, without dropout."""
    from training import loop

    bench = _bench(options, dtype)
    for module in bench.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    done = loop.fit(
        bench.model,
        bench.sides["ours"].steps,
        bench.optimizer,
        bench.settings,
        total=len(bench.sides["ours"].steps),
        seed=bench.seed,
        pad_id=bench.pad_id,
        dtype=bench.dtype,
    )
    return [float(each.loss) for each in done]


def check_scoring(options: argparse.Namespace) -> dict[str, Any]:
    """Score a window of 4,096 pairs in bfloat16; return pairs/s and the largest difference to float32 scores."""
    from training.scorer import Scorer

    bench = _bench(options, "float32")
    encoded = bench.sides["ours"].steps[0].window.encoded
    some = _first(encoded, options.pairs)
    tokenizer = SimpleNamespace(pad_token_id=bench.pad_id)
    full = Scorer(bench.model, tokenizer, 512, "float32", bench.device).score_encoded(some)
    half = Scorer(bench.model.to(torch.bfloat16), tokenizer, 512, "bfloat16", bench.device)
    scores = half.score_encoded(some)  # also the warm-up
    difference = float(abs(full - scores).max())
    if not difference <= MAX_SCORE_DIFFERENCE:
        raise CheckFailed(f"scoring: bfloat16 scores differ from float32 scores by {difference:.3f}, more than {MAX_SCORE_DIFFERENCE}")
    timed = encoded if options.device == "cuda" else some
    bench.wait()
    start = time.perf_counter()
    half.score_encoded(timed)
    seconds = time.perf_counter() - start
    return {"pairs": len(timed), "pairs_per_second": round(len(timed) / seconds, 1), "max_difference": round(difference, 5)}


def _first(encoded: Any, pairs: int) -> Any:
    """Return the first pairs of some encoded pairs."""
    from training.encoding import Encoded

    end = encoded.starts[pairs]
    types = None if encoded.types is None else encoded.types[:end]
    return Encoded(encoded.tokens[:end], types, encoded.starts[: pairs + 1], 0, 0)


def _bench(options: argparse.Namespace, dtype: str) -> Bench:
    settings = {"batch_size": SETTINGS["batch_size"], "micro_batch_tokens": SETTINGS["micro_batch_tokens"]}
    return Bench(argparse.Namespace(**vars(options) | settings | {"dtype": dtype, "seed": 0}))


def check_engine(options: argparse.Namespace) -> dict[str, Any]:
    """Sample with vLLM: a known greedy answer, equal seeds give equal responses, and tokens/s of a batch of prompts."""
    import asyncio

    from cluster.config import DecodingConfig, SamplerConfig, VLLMConfig
    from generation import engines
    from generation.prompts import messages

    if (options.device == "cuda") != torch.cuda.is_available():
        raise CheckFailed(f"engine: --device={options.device}, but vLLM takes the GPU if there is one, else the CPU; give that device")
    llm = engines.load_engine(SamplerConfig(engine=VLLMConfig(max_model_len=512)))
    greedy = DecodingConfig(name="greedy", temperature=0, max_tokens=12)
    warm = DecodingConfig(name="warm", n=4, temperature=0.9, max_tokens=64)
    question = llm.encode(messages("Where is the Eiffel Tower? Answer with the city."), "chat", 64)
    prompts = [llm.encode(messages(f"Write a sentence with the number {number}."), "chat", 64) for number in range(options.prompts)]

    async def sample() -> tuple[Any, list[Any], list[Any], float]:
        answer = await llm.sample(question, greedy, 1, "greedy")
        start = time.perf_counter()
        pools = await asyncio.gather(*(llm.sample(prompt, warm, at, f"row-{at}") for at, prompt in enumerate(prompts)))
        seconds = time.perf_counter() - start
        again = await asyncio.gather(*(llm.sample(prompt, warm, at, f"again-{at}") for at, prompt in enumerate(prompts)))
        return answer, pools, again, seconds

    try:
        answer, pools, again, seconds = asyncio.run(sample())
    finally:
        llm.close()
    drawn, repeated = ([each for pool in side for each in pool] for side in (pools, again))
    if "Paris" not in answer[0]["response"]:
        raise CheckFailed(f"engine: the greedy answer is {answer[0]['response']!r}, without 'Paris'")
    if not all(each["logprob"] < 0 for each in drawn):
        raise CheckFailed("engine: a candidate's log-probability is not below 0")
    # Rounding depends on the rest of the batch, so some responses differ.
    equal = sum(one["response"] == two["response"] for one, two in zip(drawn, repeated, strict=True)) / len(drawn)
    if equal < 0.5:
        raise CheckFailed(f"engine: only {equal:.0%} of the responses are equal when their seeds are equal")
    tokens = sum(each["tokens"] for each in drawn)
    return {"candidates": len(drawn), "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1), "equal_with_equal_seeds": equal}


CHECKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "engine": check_engine,
    "training": check_training,
    "scoring": check_scoring,
}


def run_check(arguments: list[str] | None = None) -> int:
    """Run the check that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("check", choices=tuple(CHECKS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=tuple(MODELS), default="roberta-large", help="shape of the scorer in training and scoring")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps in training, of 32 pairs each")
    parser.add_argument("--pairs", type=int, default=256, help="pairs whose scores are compared in scoring")
    parser.add_argument("--prompts", type=int, default=64, help="prompts in engine; each has 4 candidates")
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{options.check}: --device=cuda, but torch {torch.__version__} finds no GPU; check `nvidia-smi`", file=sys.stderr)
        return 1
    try:
        result = CHECKS[options.check](options)
    except CheckFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.check}: " + ", ".join(f"{name} {value}" for name, value in result.items() if name != "losses"))
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_check())
