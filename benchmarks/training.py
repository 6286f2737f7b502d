"""Compare trained pairs per second: this project, padding to 512 tokens, and Hugging Face's Trainer.

    python -m benchmarks.training --json -

Run it on an otherwise idle machine. All sides have the same model (MiniLM), optimizer (fused AdamW), number of threads and
dtype: bfloat16 autocast if the CPU multiplies it natively. All train the same pairs (of BIG-bench or of `--data`), 32 per step.
They differ in their steps:

- this project: `batch_plan.plan_steps`;
- `pad512`: random order, every pair padded to 512 tokens, in a plain loop;
- `dynamic`: Hugging Face's Trainer in random order; `grouped`: the Trainer in the order of its `LengthGroupedSampler`.

The steps of a side are sorted by length and dealt to the rounds, so that every round has short and long steps. `pad512` and `dynamic`
are slow and train only a part of their steps. The sides alternate; ratios are medians over the rounds, and only steps are timed.
By default this project trains with attention dropout 0, the other sides with the encoder's 0.1. With `equal_dropout` all have 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.pairs import DATA_HELP, labelled_pairs
from cluster import models
from cluster.config import ScorerConfig, TrainingConfig
from cluster.progress import log
from training import batch_plan, loop
from training.batch_plan import Size
from training.encoding import Encoded, encode_pairs, pad
from training.scorer import autocast, load_tokenizer, new_model, pick_dtype

BATCH, LONGEST = 32, 512
_PADDED_STEPS = 2  # per round of `pad512`; all its steps cost the same
_DYNAMIC_EVERY = 3  # `dynamic` trains one step in three; its steps have similar lengths
_WINDOW = 4096
_ENCODER_DROPOUT = 0.1
Steps = list[list[int]]
Round = tuple[int, float]
"""Pairs trained, and the seconds spent."""


class _InOrder(Trainer):  # type: ignore[misc]
    """A Trainer that trains its rows in the given order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds from the start of the first step to the end of the last step."""

    start = seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def chunks(order: Any) -> Steps:
    """Cut an order of rows into steps."""
    rows = [int(row) for row in order]
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


class Bench:
    """The pairs, tokenised once for all sides; every side gets a new model."""

    def __init__(self, pairs: int, seed: int, data: Path) -> None:
        self.folder, self.seed, self.device = models.resolve("minilm-l6", "encoder"), seed, torch.device("cpu")
        self.tokenizer = load_tokenizer(self.folder, "minilm-l6", "encoder")
        self.dtype = pick_dtype("auto", self.device)
        self.config = TrainingConfig(batch_size=BATCH, window=max(_WINDOW, pairs))
        self.encoded, self.labels = self.encode(pairs, data)
        self.lengths = self.encoded.lengths
        self.plan = self.steps(self.encoded, self.labels)
        whole = (self.encoded, self.labels) if pairs >= _WINDOW else self.encode(_WINDOW, data)
        self.padding = self.padding_share(whole[0], self.steps(*whole))

    def encode(self, pairs: int, data: Path) -> tuple[Encoded, np.ndarray]:
        instructions, responses, labels = labelled_pairs(data, pairs, self.seed)
        return encode_pairs(self.tokenizer, instructions, responses, LONGEST), np.asarray(labels, np.float32)

    def steps(self, encoded: Encoded, labels: np.ndarray) -> list[batch_plan.Step]:
        """Return the steps of `cappy train` for an epoch of one window."""
        size = Size(len(encoded), len(encoded))
        window = batch_plan.Window(0, 0, encoded, labels, np.arange(len(encoded)))
        return list(batch_plan.plan_steps([window], self.config, self.seed, 0, 1, 0, size))

    def padding_share(self, encoded: Encoded, plan: list[batch_plan.Step]) -> float:
        slots = sum(len(rows) * int(encoded.lengths[rows].max()) for step in plan for rows in step.micro_batches)
        return 1 - int(encoded.lengths.sum()) / slots

    def model(self, dropout: float) -> Any:
        return new_model(self.folder, ScorerConfig(), TrainingConfig(attention_dropout=dropout), self.seed)

    def ours(self, rounds: int, dropout: float) -> Iterator[Round]:
        model = self.model(dropout)
        optimizer = loop.new_optimizer(model, self.config)
        ordered = sorted(self.plan, key=lambda step: sum(int(self.lengths[rows].sum()) for rows in step.micro_batches))
        for number in range(rounds):
            start = time.perf_counter()
            pairs = sum(done.size for done in self.fit(model, optimizer, ordered[number::rounds], self.dtype))
            yield pairs, time.perf_counter() - start

    def fit(self, model: Any, optimizer: torch.optim.Optimizer, steps: list[batch_plan.Step], dtype: Any) -> Iterator[loop.StepResult]:
        pad_id, total = self.tokenizer.pad_token_id, len(self.plan)
        return loop.fit(model, steps, optimizer, self.config, total=total, seed=self.seed, pad_id=pad_id, dtype=dtype)

    def padded(self, rounds: int, dropout: float) -> Iterator[Round]:
        """Pad every pair to 512 tokens, as the original Cappy code does, in a plain loop with the same optimizer and dtype."""
        model = self.model(dropout).train()
        optimizer = loop.new_optimizer(model, self.config)
        steps = iter(chunks(np.random.default_rng(self.seed).permutation(len(self.lengths))))
        for _ in range(rounds):
            start = time.perf_counter()
            for rows in (np.array(next(steps)) for _ in range(_PADDED_STEPS)):
                inputs = pad(self.encoded, rows, self.tokenizer.pad_token_id, self.device)
                inputs = {name: torch.nn.functional.pad(each, (0, LONGEST - each.shape[1])) for name, each in inputs.items()}
                self.plain_step(model, optimizer, inputs, rows, self.dtype)
            yield _PADDED_STEPS * BATCH, time.perf_counter() - start

    def plain_step(self, model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, Any], rows: np.ndarray, dtype: Any) -> float:
        """Take one step of a plain training loop; return its loss."""
        with autocast(dtype, self.device):
            logits_B1 = model(**inputs).logits
        loss = (logits_B1[:, 0].float() - torch.from_numpy(self.labels[rows])).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def trainer(self, rounds: int, dropout: float, grouped: bool) -> Iterator[Round]:
        """Train each round with Hugging Face's Trainer and dynamic padding; model and optimizer are kept between rounds."""
        torch.manual_seed(self.seed)
        lengths = self.lengths.tolist()
        draw = np.random.default_rng(self.seed).permutation(len(lengths))
        steps = chunks(LengthGroupedSampler(BATCH, lengths=lengths) if grouped else draw)
        steps.sort(key=lambda rows: int(self.lengths[rows].max()) * len(rows))
        model = self.model(dropout)
        optimizer = loop.new_optimizer(model, self.config)
        for number in range(rounds):
            taken = steps[number :: rounds * (1 if grouped else _DYNAMIC_EVERY)]
            rows = [row for step in taken for row in step]
            with tempfile.TemporaryDirectory(prefix="cappy-trainer-") as folder:
                arguments = TrainingArguments(
                    folder,
                    per_device_train_batch_size=BATCH,
                    num_train_epochs=1,
                    learning_rate=self.config.learning_rate,
                    max_grad_norm=self.config.clip_norm,
                    bf16=self.dtype == "bfloat16",
                    use_cpu=True,
                    report_to=[],
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                )
                clock = _Clock()
                trainer = _InOrder(
                    model=model,
                    args=arguments,
                    train_dataset=[self.row(row) for row in rows],
                    data_collator=DataCollatorWithPadding(self.tokenizer),
                    optimizers=(optimizer, None),
                    callbacks=[clock],
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()
            yield len(rows), clock.seconds

    def row(self, row: int) -> dict[str, Any]:
        part = slice(self.encoded.starts[row], self.encoded.starts[row + 1])
        types = {} if self.encoded.types is None else {"token_type_ids": self.encoded.types[part].tolist()}
        return {"input_ids": self.encoded.tokens[part].tolist(), **types, "labels": float(self.labels[row])}

    def loss_difference(self, steps: int) -> float:
        """Return the largest loss difference between this project's steps and a plain padded step: float32, no dropout."""
        ours, plain = self.model(0.0), self.model(0.0).train()
        for module in (*ours.modules(), *plain.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizers = [loop.new_optimizer(model, self.config) for model in (ours, plain)]
        worst = 0.0
        for step, done in zip(self.plan[:steps], self.fit(ours, optimizers[0], self.plan[:steps], "float32"), strict=True):
            rows = np.concatenate(step.micro_batches)
            for group in optimizers[1].param_groups:
                group["lr"] = done.learning_rate
            inputs = pad(self.encoded, rows, self.tokenizer.pad_token_id, self.device)
            worst = max(worst, abs(self.plain_step(plain, optimizers[1], inputs, rows, "float32") - done.loss.item()))
        return worst


def compare(bench: Bench, rounds: int, loss_steps: int) -> dict[str, Any]:
    """Train with all sides alternately; return the ratios and the figures behind them."""
    sides = {
        "ours": bench.ours(rounds, TrainingConfig().attention_dropout),
        # The closest comparisons run next to each other, because a machine's speed changes within minutes.
        "grouped_dropout0": bench.trainer(rounds, 0.0, grouped=True),
        "pad512_dropout0": bench.padded(rounds, 0.0),
        "grouped": bench.trainer(rounds, _ENCODER_DROPOUT, grouped=True),
        "pad512": bench.padded(rounds, _ENCODER_DROPOUT),
        "dynamic_dropout0": bench.trainer(rounds, 0.0, grouped=False),
        "dynamic": bench.trainer(rounds, _ENCODER_DROPOUT, grouped=False),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            pairs, seconds = next(side)
            rates[name].append(pairs / seconds)
        log(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {each[-1]:.1f}" for name, each in rates.items()) + " pairs/s")

    def ratio(name: str) -> float:
        return round(statistics.median(mine / theirs for mine, theirs in zip(rates["ours"], rates[name], strict=True)), 2)

    return {
        "vs_pad512": ratio("pad512"),
        "vs_pad512_equal_dropout": ratio("pad512_dropout0"),
        "vs_hf_trainer": min(ratio("dynamic"), ratio("grouped")),
        "vs_hf_trainer_equal_dropout": min(ratio("dynamic_dropout0"), ratio("grouped_dropout0")),
        "padding_share": round(bench.padding, 5),
        "loss_max_diff": bench.loss_difference(loss_steps),
        "pairs": len(bench.lengths),
        "mean_tokens": round(float(bench.lengths.mean()), 1),
        "dtype": bench.dtype,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "pairs_per_second": {name: round(statistics.median(each), 1) for name, each in rates.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=2048, help="pairs of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss-steps", type=int, default=50, help="steps whose losses are compared with a plain loop")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    result = compare(Bench(options.pairs, options.seed, options.data), options.rounds, options.loss_steps)
    print(
        f"{result['pairs_per_second']['ours']} pairs/s: {result['vs_pad512']}x padding to 512 ({result['vs_pad512_equal_dropout']}x at "
        f"equal dropout), {result['vs_hf_trainer']}x the Trainer in its faster order ({result['vs_hf_trainer_equal_dropout']}x)"
    )
    print(f"padding {result['padding_share']:.2%}; losses within {result['loss_max_diff']:.1e} of a plain loop")
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
