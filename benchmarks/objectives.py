"""Compare training objectives, training data and initial weights at equal compute, on one published set.

Each variant trains the same encoder on the set's train rows with the same seed, steps and optimizer, in this process. It is measured
once, on the validation rows. Three variants change more than the objective:

- `without LLM samples` trains only on references, choices and mismatched references. It repeats them for the same number of steps.
- `without pretrained encoder` starts from random weights.
- `attention dropout 0.1` has the paper's objective and the dropout on attention probabilities of the encoder's pretraining. The
  default of `cappy train` is 0.

    python -m benchmarks.objectives --data runs/demo/dataset --json -
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.demo import demo_set
from cluster import models
from cluster.config import ObjectiveConfig, ScorerConfig, TrainingConfig
from cluster.progress import log
from generation.dataset import RegressionSet, explode
from training import batch_plan, blend, loop, validation
from training.batch_plan import Size
from training.encoding import encode_pairs
from training.scorer import Scorer, load_tokenizer, new_model, pick_dtype

OBJECTIVES: dict[str, dict[str, Any]] = {
    "mse (paper)": {},
    "mse, label ** 0.5": {"labels": "power", "power": 0.5},
    "mse, rank of label": {"labels": "rank"},
    "mse + pairwise": {"pairwise": 0.1},
    "pairwise": {"mse": 0, "pairwise": 1},
    "mse + listwise": {"listwise": 0.1},
    "listwise": {"mse": 0, "listwise": 1},
}
WITHOUT = ("without LLM samples", "without pretrained encoder")
DROPOUT = "attention dropout 0.1"
COLUMNS = ["dataset", "instruction", "candidates"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a published set with sampled candidates; default: the demo's set, generated if it is missing")
    parser.add_argument("--encoder", default="minilm-l6")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant, averaged")
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        default="validation",
        help="rows to measure on; train holds out a fifth of the train rows",
    )
    parser.add_argument(
        "--hold-out", nargs="+", default=[], help="datasets to measure on; with --split train, instead of a fifth of the rows"
    )
    parser.add_argument("--measured", type=int, help="measured rows of each dataset; default: all")
    parser.add_argument("--instructions", type=int, help="train rows used, the same for each seed; default: all")
    parser.add_argument("--learning-rate", type=float, default=TrainingConfig().learning_rate)
    parser.add_argument("--only", nargs="*", choices=(*OBJECTIVES, DROPOUT, *WITHOUT))
    parser.add_argument("--json", help="file for the result; - prints it")
    options = parser.parse_args()
    options.data = options.data or demo_set()
    train, held_out, greedy = read(options.data, options.split, options.hold_out)
    if options.measured:
        held_out = first_of_each(held_out, options.measured)
    log(f"{len(train):,} train rows, {len(held_out):,} measured rows")
    if options.instructions and options.instructions < len(train):
        train = train.take(pa.array(np.sort(np.random.default_rng(0).permutation(len(train))[: options.instructions])))
    kept = ("data", "encoder", "epochs", "max_length", "instructions", "learning_rate", "split", "hold_out", "measured", "seeds")
    result: dict[str, Any] = {name: getattr(options, name) for name in kept} | {"variants": {}}
    for name in options.only or (*OBJECTIVES, DROPOUT, *WITHOUT):
        runs = [train_variant(name, train, held_out, greedy, options, seed) for seed in range(options.seeds)]
        result["variants"][name] = {key: _mean([each[key] for each in runs]) for key in runs[0]}
        result["variants"][name]["selection_by_seed"] = [each["selection"] for each in runs]
        log(f"{name}: {json.dumps(result['variants'][name])}")
    text = json.dumps(result)
    if options.json and options.json != "-":
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    print(text)


def read(uri: str, split: str, hold_out: Sequence[str] = ()) -> tuple[pa.Table, pa.Table, str | None]:
    """Return the rows for training, the rows for measurement and the name of the greedy decoding.

    With `split` train, the rows of the datasets `hold_out` are measured, else a fifth of the rows.
    """
    dataset = RegressionSet(uri)
    train = pa.concat_tables(dataset.batches("train", columns=COLUMNS)).combine_chunks()
    if split == "validation":
        return train, pa.concat_tables(dataset.batches("validation", columns=COLUMNS)).combine_chunks(), dataset.greedy()
    held = np.random.default_rng(0).permutation(len(train)) < len(train) // 5
    if hold_out:
        held = np.isin(train["dataset"].to_numpy(zero_copy_only=False), list(hold_out))
    return train.filter(pa.array(~held)), train.filter(pa.array(held)), dataset.greedy()


def train_variant(
    name: str, train: pa.Table, held_out: pa.Table, greedy: str | None, options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Train one variant and return its metrics on the rows held out."""
    objective = ObjectiveConfig.model_validate(OBJECTIVES.get(name, {}))
    dropout = 0.1 if name == DROPOUT else TrainingConfig().attention_dropout
    training = TrainingConfig(epochs=options.epochs, objective=objective, attention_dropout=dropout, learning_rate=options.learning_rate)
    scorer_config = ScorerConfig(encoder=options.encoder, max_length=options.max_length)
    folder = models.resolve(options.encoder, "--encoder")
    model = new_model(folder, scorer_config, training, seed)
    if name == "without pretrained encoder":
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = Scorer(model, load_tokenizer(folder, options.encoder, "--encoder"), options.max_length, "auto", device)
    total = batch_plan.steps_in_epoch(size_of(train), training) * options.epochs
    rows = without_samples(train) if name == "without LLM samples" else train
    size = size_of(rows)
    start = time.monotonic()
    trained = 0
    fitting = loop.fit(
        model,
        batch_plan.plan_steps(windows(rows, scorer, training, seed, total), training, seed, 0, 1, 0, size),
        loop.new_optimizer(model, training),
        training,
        total=total,
        seed=seed,
        pad_id=scorer.tokenizer.pad_token_id,
        dtype=pick_dtype("auto", device),
    )
    for done in fitting:
        trained += done.size
        if done.index + 1 == total:
            break
    seconds = time.monotonic() - start
    model.eval()
    weight = blend.fit_weight(blend.tally_picks(train.slice(0, 400), scorer.score))
    figures = validation.measure_scores(held_out, scorer.score, greedy).metrics()
    return {
        **figures,
        "blend": blend.mean_label(blend.tally_picks(held_out, scorer.score), weight),
        "blend_weight": weight,
        "steps": total,
        "trained": trained,
        "seconds": round(seconds, 1),
    }


def first_of_each(rows: pa.Table, count: int) -> pa.Table:
    """Return `count` rows of each dataset, drawn with a fixed seed."""
    names = rows["dataset"].to_numpy(zero_copy_only=False)
    order = np.random.default_rng(1).permutation(len(rows))
    kept = [order[names[order] == name][:count] for name in np.unique(names)]
    return rows.take(pa.array(np.sort(np.concatenate(kept))))


def size_of(rows: pa.Table) -> Size:
    pairs = explode(rows)
    return Size(len(pairs), len(np.unique(pairs.groups)))


def without_samples(rows: pa.Table) -> pa.Table:
    """Return the rows without sampled candidates; rows that would have none are left out."""
    kept = [[each for each in row if each["source"] != "sampled"] for row in rows["candidates"].to_pylist()]
    candidates = pa.array(kept, rows.schema.field("candidates").type)
    changed = rows.set_column(rows.schema.get_field_index("candidates"), "candidates", candidates)
    return changed.filter(pc.greater(pc.list_value_length(changed["candidates"]), 0))


def windows(rows: pa.Table, scorer: Scorer, training: TrainingConfig, seed: int, total: int) -> Iterator[batch_plan.Window]:
    """Yield windows, epoch after epoch, enough for `total` steps."""
    size = size_of(rows)
    held = batch_plan.window_size(size, training)
    for epoch in range(-(-total // batch_plan.steps_in_epoch(size, training))):
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        pairs = explode(rows.take(pa.array(order)))
        starts = np.concatenate([[0], np.flatnonzero(np.diff(pairs.groups)) + 1, [len(pairs)]])
        ends = starts[::held] if training.objective.grouped else np.arange(0, len(pairs), held)
        for number, start in enumerate(ends):
            if start == len(pairs):
                break
            end = ends[number + 1] if number + 1 < len(ends) else len(pairs)
            encoded = encode_pairs(scorer.tokenizer, pairs.instructions[start:end], pairs.responses[start:end], scorer.max_length)
            yield batch_plan.Window(epoch, number, encoded, pairs.labels[start:end], pairs.groups[start:end])


def _mean(values: list[Any]) -> Any:
    return None if None in values else round(float(np.mean(values)), 5)


if __name__ == "__main__":
    main()
