"""Compare prompt forms by the quality of their candidate pools, on train rows only.

    python -m benchmarks.prompts --rows 12 --json -

Each form samples the same train rows of the demo's tasks with the demo's decodings. The table shows the Rouge-L of the baselines and
of the oracle, averaged over tasks. Choose a form from this table, before any measurement on validation rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.config import Config, DecodingConfig, PromptConfig, load
from cluster.progress import Bar
from evaluation import statistics
from evaluation.comparison import pad_field, pick_baselines
from generation import engines, few_shot
from generation.engines import contract
from generation.sampler import Sampler
from generation.schema import PREPARED
from generation.units import label_rows

FORMS = {
    "chat, zero-shot": (PromptConfig(form="chat"), ()),
    "chat, zero-shot, stop at newline": (PromptConfig(form="chat"), ("\n",)),
    "chat, 3 shots, stop at newline": (PromptConfig(form="chat", shots=3), ("\n",)),
    "raw, zero-shot, stop at newline": (PromptConfig(form="raw"), ("\n",)),
    "raw, 3 shots, stop at newline": (PromptConfig(form="raw", shots=3), ("\n",)),
    "raw, 5 shots, stop at newline": (PromptConfig(form="raw", shots=5), ("\n",)),
}


def with_form(config: Config, prompt: PromptConfig, stop: tuple[str, ...]) -> Config:
    """Return the config with another prompt form and other stop strings."""
    decodings: tuple[DecodingConfig, ...] = tuple(each.model_copy(update={"stop": stop}) for each in config.sampler.decodings)
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"prompt": prompt, "decodings": decodings})})


def train_rows(config: Config, count: int) -> list[dict[str, Any]]:
    """Return the first `count` train rows of each task, prepared with the config's prompt form."""
    taken: dict[str, int] = {}
    rows = []
    for each in few_shot.prepare_rows(config):
        if isinstance(each, tuple) and each[0] == "train" and taken.get(each[1]["dataset"], 0) < count:
            taken[each[1]["dataset"]] = taken.get(each[1]["dataset"], 0) + 1
            rows.append(each[1])
    return rows


async def measure(engine: contract.LLM, config: Config, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sample and label the rows; return the average over tasks of each baseline and of the oracle, in points."""
    sampler = Sampler(config.sampler, config.seed, load=lambda _: engine)
    start = time.perf_counter()
    (sampled,) = [batch async for batch in sampler(pa.Table.from_pylist(rows, PREPARED))]
    seconds = time.perf_counter() - start
    done, _ = label_rows(sampled.to_pylist(), config)
    for row in done:
        row["candidates"] = [each for each in row["candidates"] if each["source"] == "sampled"]
    base = pick_baselines(done, [each.model_dump() for each in config.sampler.decodings])
    labels_RC, present_RC = pad_field(base.rows, "label")
    picks = {**base.picks, "oracle": statistics.pick_best(labels_RC, present_RC)}
    values_RM = np.stack([labels_RC[np.arange(len(base.rows)), pick] for pick in picks.values()], axis=1)
    _, tasks_R = np.unique([row["dataset"] for row in base.rows], return_inverse=True)
    averages = 100 * statistics.macro_average(values_RM, tasks_R)
    return {**{name: round(float(value), 1) for name, value in zip(picks, averages, strict=True)}, "seconds": round(seconds, 1)}


async def compare(config: Config, count: int) -> dict[str, dict[str, float]]:
    """Return the figures of every form by name; all forms use one engine."""
    engine = engines.load_engine(config.sampler)
    results = {}
    with Bar("prompt forms", len(FORMS), "forms") as bar:
        for name, (prompt, stop) in FORMS.items():
            formed = with_form(config, prompt, stop)
            results[name] = await measure(engine, formed, train_rows(formed, count))
            bar.advance(note=name)
    engine.close()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--rows", type=int, default=12, help="train rows of each task")
    parser.add_argument("--json", metavar="-", help="print the result as one JSON object on the last line")
    options = parser.parse_args()
    results = asyncio.run(compare(load(options.config), options.rows))
    names = list(next(iter(results.values())))
    print(f"{'prompt form':<36}" + "".join(f"{name:>11}" for name in names))
    for form, figures in results.items():
        print(f"{form:<36}" + "".join(f"{figures[name]:>11}" for name in names))
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
