"""Compare training speed and memory on one device, with T0's lengths: padding to 512 tokens, dynamic padding, and `cappy train`.

    python -m benchmarks.training_step --json -

It needs torch, transformers and this repository, but no data. RoBERTa-large (or MiniLM) has random weights, and token ids are random.
Lengths follow the quantiles below; `--measure-lengths T0.parquet` measures them again and needs the whole environment.

Every side trains the same 4,096 pairs, or `--steps` of its optimizer steps, with `training.loop.fit`: forward, loss, backward, clipping,
fused AdamW. Model and optimizer are shared. The sides differ in the pairs of a step, the padding, the last layer and the attention
dropout:

- `padded to 512` and `dynamic padding`: random batches, the stock last layer, RoBERTa's dropout of 0.1;
- `ours`: the steps, the kernels (`training.encoder_kernels`) and the dropout (0) of `cappy train`;
- `ours, dropout 0.1`: the same with dropout 0.1, to compare at equal dropout;
- `ours, no dropout`: `training.dropout: 0`, also on embeddings and hidden states;
- `ours, half frozen`: the same with embeddings and half of the layers frozen (`training.frozen_layers`).

The sides alternate after a warm-up turn; figures are medians over the turns. MFU counts the operations for the pairs without padding.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig

from training import batch_plan, encoder_kernels, loop
from training.batch_plan import Size
from training.encoding import Encoded
from training.flops import FlopCounter, device_peak_flops
from training.scorer import pick_dtype

LONGEST = 512
STOCK_DROPOUT = 0.1
# Tokens of T0 pairs, of MiniLM's tokenizer, cut at 512, at every 2 % of the pairs.
# fmt: off
LENGTHS = (
    11, 24, 28, 32, 35, 38, 41, 44, 47, 49, 52, 54, 57, 59, 61, 64, 67, 70, 73, 77, 80, 84, 88, 94,
    101, 109, 119, 128, 138, 150, 163, 177, 190, 204, 217, 234, 254, 274, 310, 357, 407, 447, 471, 483, 495, 510, 512, 512, 512, 512, 512,
)
# fmt: on
ROBERTA_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 50265}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522}
MODELS = {
    "roberta-large": RobertaConfig(**ROBERTA_LARGE, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=1),
    "minilm": BertConfig(**_MINILM, max_position_embeddings=512, num_labels=1),
}
# The defaults of `cappy train`, repeated here because the config needs pydantic. A test compares the two.
SETTINGS: dict[str, Any] = {
    "batch_size": 32,
    "batch_by": "pairs",
    "window": 4096,
    "micro_batch_tokens": 8192,
    "attention_dropout": 0.0,
    "parallel": "ddp",
    "learning_rate": 1e-4,
    "schedule": "linear",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "objective": {"mse": 1.0, "pairwise": 0.0, "listwise": 0.0, "temperature": 0.2, "labels": "plain", "power": 0.5, "grouped": False},
}


@dataclass(frozen=True)
class Side:
    """A way to train the pairs."""

    dropout: float
    """On attention probabilities."""
    hidden_dropout: float
    """On embeddings and hidden states."""
    frozen: int
    """Number of lower layers that are frozen; above 0 the embeddings are frozen too."""
    steps: list[batch_plan.Step]
    width: int | None
    """Tokens to which every pair is padded; None pads to the longest pair of the forward pass."""
    lean: bool
    """Whether the last layer computes only the first token (`training.encoder_kernels`)."""


@dataclass(frozen=True)
class Turn:
    """The measurements of one side in one turn."""

    seconds: float
    pairs: int
    tokens: int
    flops: float
    """Floating-point operations for the pairs, without padding."""
    padded_tokens: int
    """Tokens in the model's input, with padding."""
    memory: int | None
    """Peak bytes of tensors on the GPU, with weights and optimizer state; None on CPU."""


class Padded(nn.Module):  # type: ignore[misc]
    """A model whose batches are all padded to `width` tokens."""

    def __init__(self, model: Any, width: int) -> None:
        super().__init__()
        self.model, self.width = model, width

    def forward(self, **inputs: Tensor) -> Any:
        fills = {"input_ids": self.model.config.pad_token_id}
        missing = self.width - inputs["input_ids"].shape[1]
        return self.model(**{name: nn.functional.pad(each, (0, missing), value=fills.get(name, 0)) for name, each in inputs.items()})


class Bench:
    """The pairs, the model, its optimizer and the sides."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.dtype = pick_dtype(options.dtype, self.device)
        chosen = {**SETTINGS, "batch_size": options.batch_size, "micro_batch_tokens": options.micro_batch_tokens}
        settings: Any = SimpleNamespace(**{**chosen, "objective": SimpleNamespace(**chosen["objective"])})
        self.settings = settings
        self.seed = options.seed
        config = MODELS[options.model]
        torch.manual_seed(self.seed)
        with self.device:
            self.model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        self.pad_id: int = config.pad_token_id
        self.optimizer = loop.new_optimizer(self.model, self.settings)
        window = self.window(config)
        ours, random = self.sorted_steps(window, options.steps), self.random_steps(window, options.steps)
        self.sides = {
            "padded to 512": Side(STOCK_DROPOUT, STOCK_DROPOUT, 0, random, LONGEST, lean=False),
            "dynamic padding": Side(STOCK_DROPOUT, STOCK_DROPOUT, 0, random, None, lean=False),
            "ours": Side(self.settings.attention_dropout, STOCK_DROPOUT, 0, ours, None, lean=True),
            "ours, dropout 0.1": Side(STOCK_DROPOUT, STOCK_DROPOUT, 0, ours, None, lean=True),
            "ours, no dropout": Side(0.0, 0.0, 0, ours, None, lean=True),
            "ours, half frozen": Side(0.0, 0.0, config.num_hidden_layers // 2, ours, None, lean=True),
        }

    def window(self, config: Any) -> batch_plan.Window:
        """Return a window of pairs with T0's lengths: exactly the quantiles of the table, in random order."""
        draw = np.random.default_rng(self.seed)
        count = self.settings.window
        lengths = lengths_of(count)[draw.permutation(count)]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # The first ids of both vocabularies are special tokens, such as padding.
        tokens = draw.integers(1000, config.vocab_size, starts[-1], dtype=np.int32)
        types = np.zeros(starts[-1], np.int8) if config.type_vocab_size > 1 else None
        return batch_plan.Window(0, 0, Encoded(tokens, types, starts, 0, 0), draw.random(count, np.float32), np.arange(count))

    def sorted_steps(self, window: batch_plan.Window, count: int | None) -> list[batch_plan.Step]:
        """Return the steps of `cappy train` for a window; a smaller `count` keeps the mix of short and long steps."""
        size = Size(self.settings.window, self.settings.window)
        steps = list(batch_plan.plan_steps([window], self.settings, self.seed, 0, 1, 0, size))
        steps.sort(key=lambda step: sum(int(window.encoded.lengths[rows].sum()) for rows in step.micro_batches))
        places = (np.arange(count or len(steps)) + 0.5) / (count or len(steps)) * len(steps)
        return [steps[int(place)] for place in np.random.default_rng(self.seed).permutation(places)]

    def random_steps(self, window: batch_plan.Window, count: int | None) -> list[batch_plan.Step]:
        """Return steps of pairs in random order, with one forward pass per step."""
        order = np.random.default_rng(self.seed).permutation(self.settings.window)
        batches = [order[start : start + self.settings.batch_size] for start in range(0, len(order), self.settings.batch_size)]
        steps = []
        for index, rows in enumerate(batches[:count]):
            steps.append(batch_plan.Step(index, window, Size(len(rows), len(rows)), 1.0, [rows], 1, index == len(batches) - 1))
        return steps

    def turn(self, side: Side) -> Turn:
        """Train the steps of one side once; return the measurements."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = side.hidden_dropout
        for layer in self.model.base_model.encoder.layer:
            layer.attention.self.dropout.p = side.dropout
        self.model.base_model.embeddings.requires_grad_(not side.frozen)
        for number, layer in enumerate(self.model.base_model.encoder.layer):
            layer.requires_grad_(number >= side.frozen)
        (encoder_kernels.compute_first_token_only if side.lean else encoder_kernels.restore_last_layer)(self.model)
        needed = FlopCounter(self.model)
        model = Padded(self.model, side.width) if side.width else self.model
        total = -(-self.settings.window // self.settings.batch_size)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.wait()
        start = time.perf_counter()
        fitting = loop.fit(
            model, side.steps, self.optimizer, self.settings, total=total, seed=self.seed, pad_id=self.pad_id, dtype=self.dtype
        )
        done = list(fitting)
        self.wait()
        seconds = time.perf_counter() - start
        pairs = sum(each.size for each in done)
        padded = pairs * side.width if side.width else sum(each.padded_tokens for each in done)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        tokens = sum(each.tokens for each in done)
        return Turn(seconds, pairs, tokens, needed(tokens, sum(each.squared_lengths for each in done)), padded, memory)

    def wait(self) -> None:
        """Wait until the GPU has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def lengths_of(count: int) -> np.ndarray:
    """Return the lengths of `count` pairs with T0's quantiles, in rising order, int64 (count,)."""
    shares = (np.arange(count) + 0.5) / count
    lengths: np.ndarray = np.interp(shares, np.linspace(0, 1, len(LENGTHS)), LENGTHS).round().astype(np.int64)
    return lengths


def measure_lengths(path: Path, count: int = 50_000, seed: int = 0) -> list[int]:
    """Return the quantiles of the lengths of T0 pairs, in the form of `LENGTHS`."""
    from benchmarks.pairs import labelled_pairs
    from cluster import models
    from training.encoding import encode_pairs
    from training.scorer import load_tokenizer

    tokenizer = load_tokenizer(models.resolve("minilm-l6", "encoder"), "minilm-l6", "encoder")
    instructions, responses, _ = labelled_pairs(path, count, seed)
    lengths = encode_pairs(tokenizer, instructions, responses, LONGEST).lengths
    return [int(each) for each in np.quantile(lengths, np.linspace(0, 1, 51), method="nearest")]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Train all sides alternately; return the figures of each side and the ratios."""
    bench = Bench(options)
    peak = device_peak_flops(bench.device) if bench.dtype == "bfloat16" else None
    turns: dict[str, list[Turn]] = {name: [] for name in bench.sides}
    for number in range(options.turns + 1):
        for name, side in bench.sides.items():
            try:
                turns[name].append(bench.turn(side))
            except torch.OutOfMemoryError:
                raise SystemExit(f"{name}: {options.model} does not fit; lower --batch-size (now {options.batch_size})") from None
        rates = ", ".join(f"{name} {each[-1].pairs / each[-1].seconds:.1f}" for name, each in turns.items())
        print(f"{f'turn {number} of {options.turns}' if number else 'warm-up'}: {rates} pairs/s", file=sys.stderr, flush=True)

    def median(name: str, figure: Any) -> float:
        return float(statistics.median(map(figure, turns[name][1:])))

    def ratio(mine: str, theirs: str) -> float:
        pairs = zip(turns[mine][1:], turns[theirs][1:], strict=True)
        return round(statistics.median(one.pairs / one.seconds / (two.pairs / two.seconds) for one, two in pairs), 2)

    sides = {}
    for name, side in bench.sides.items():
        first = turns[name][0]
        memory = max((each.memory for each in turns[name] if each.memory is not None), default=None)
        sides[name] = {
            "pairs_per_second": round(median(name, lambda turn: turn.pairs / turn.seconds), 1),
            "tokens_per_second": round(median(name, lambda turn: turn.tokens / turn.seconds)),
            "mfu": round(median(name, lambda turn: turn.flops / turn.seconds) / peak, 4) if peak else None,
            "memory_gib": round(memory / 2**30, 2) if memory is not None else None,
            "padding_share": round(1 - first.tokens / first.padded_tokens, 4),
            "attention_dropout": side.dropout,
            "hidden_dropout": side.hidden_dropout,
            "frozen_layers": side.frozen,
            "pairs": first.pairs,
            "tokens": first.tokens,
        }
    on_gpu = bench.device.type == "cuda"
    return {
        "vs_pad512": ratio("ours", "padded to 512"),
        "vs_dynamic": ratio("ours", "dynamic padding"),
        "vs_pad512_equal_dropout": ratio("ours, dropout 0.1", "padded to 512"),
        "vs_dynamic_equal_dropout": ratio("ours, dropout 0.1", "dynamic padding"),
        "no_dropout": ratio("ours, no dropout", "ours"),
        "half_frozen": ratio("ours, half frozen", "ours, no dropout"),
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "model": options.model,
        "dtype": bench.dtype,
        "batch_size": options.batch_size,
        "micro_batch_tokens": options.micro_batch_tokens,
        "steps": {name: len(side.steps) for name, side in bench.sides.items()},
        "turns": options.turns,
        "peak_tflops": peak and peak / 1e12,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sides": sides,
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{result['model']}, {result['dtype']}, {result['batch_size']} pairs per step, on {result['device']}")
    print(f"{'':18} {'pairs/s':>9} {'tokens/s':>10} {'MFU':>6} {'memory':>10} {'padding':>8} {'dropout':>8}")
    for name, side in result["sides"].items():
        mfu = "n/a" if side["mfu"] is None else f"{side['mfu']:.1%}"
        memory = "n/a" if side["memory_gib"] is None else f"{side['memory_gib']:.1f} GiB"
        speed = f"{side['pairs_per_second']:9,.1f} {side['tokens_per_second']:10,}"
        print(f"{name:18} {speed} {mfu:>6} {memory:>10} {side['padding_share']:>8.1%} {side['attention_dropout']:>8g}")
    print(
        f"cappy train: {result['vs_pad512']}x padding to 512 ({result['vs_pad512_equal_dropout']}x at equal dropout), "
        f"{result['vs_dynamic']}x dynamic padding ({result['vs_dynamic_equal_dropout']}x); without dropout {result['no_dropout']}x, "
        f"and with half of the layers frozen {result['half_frozen']}x of that"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="roberta-large")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="dtype of matrix products; weights are float32"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps per turn; default: all steps of a window of 4,096 pairs")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--batch-size", type=int, default=SETTINGS["batch_size"], help="pairs per step")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=SETTINGS["micro_batch_tokens"], help="padded tokens of a forward pass of `ours`"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    parser.add_argument("--measure-lengths", type=Path, metavar="T0.parquet", help="print the table of lengths and exit")
    options = parser.parse_args(arguments)
    if options.measure_lengths:
        print(measure_lengths(options.measure_lengths))
        return 0
    result = compare(options)
    show(result)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
