"""Make `cappy-minilm`, the pretrained scorer of the package: `make cappy-minilm`, or `python -m cappy.pretrain`.

    python -m cappy.pretrain [--held-out [--train-share SHARE]] [--out FOLDER] [--set KEY=VALUE ...]

The steps, with `cappy/configs/cappy-minilm.yaml`: generate the set, train the scorer and fit its selection, pack it into
`cluster/packaged/cappy-minilm`, and write its card. Finished steps are kept, and the same command resumes an interrupted one.

`--held-out` makes a twin instead, in `{workspace}/held-out`: the same set without the datasets of `HELD_OUT` in training. It is
evaluated on their rows, so the figures are of tasks without training. This run does not pack a scorer. With `--train-share 0.25` the
twin trains on a quarter of the rows, in `{workspace}/held-out-0.25`: several shares give a scaling curve.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import artifacts, packed_scorer, storage
from cluster.config import DEFAULT_SCORER, Config, load
from cluster.errors import CappyError
from cluster.progress import log
from generation import resplit
from generation.dataset import RegressionSet
from generation.sources.row import hash_to_unit_interval

CONFIG = "cappy-minilm"
HELD_OUT = (
    "kilt_tasks_hotpotqa",  # questions without a text
    "ropes",  # questions about a text
    "cosmos_qa",  # commonsense, with choices and with free answers
    "common_gen",  # sentences from given words
    "samsum",  # summaries
    "glue_mrpc",  # paraphrases; both datasets of this task are held out, so that no other one is like them
    "paws_labeled_final",
)
"""The datasets of the twin's evaluation, chosen before the first run: the kinds of tasks in T0's mixture, short enough for 192 tokens."""


def make_scorer(config: Config, out: Path, max_mb: float = 10.0) -> dict[str, Any]:
    """Run the steps that are not finished, pack the scorer into the folder `out`, and return the content of its `pack.json`."""
    from training import pack

    _run("generate", config, config.dataset_uri)
    _run("train", config, config.scorer_uri)
    packed = pack.pack_scorer(config.scorer_uri, out, max_mb, config.dataset_uri, config.scorer.encoder)
    card = (out / "README.md").read_text(encoding="utf-8")
    manifest = artifacts.read_manifest(config.dataset_uri, "dataset", "generate")
    (out / "README.md").write_text(card.rstrip() + "\n" + render_training(config, dict(manifest)), encoding="utf-8")
    return packed


def make_twin(config: Config, train_share: float = 1.0) -> dict[str, Any]:
    """Train the scorer without the datasets of `HELD_OUT`, evaluate it on them, and return the summary of the evaluation.

    `train_share` is the share of the other rows that it trains on, in (0, 1].
    """
    _run("generate", config, config.dataset_uri)
    source = RegressionSet(config.dataset_uri)
    part = "" if train_share == 1 else f"-{train_share}"
    twin = config.model_copy(update={"workspace": f"{config.workspace.rstrip('/')}/held-out{part}", "dataset": None, "scorer_path": None})
    note = {"held_out": list(HELD_OUT)} | ({} if train_share == 1 else {"train_share": train_share})
    chosen = choose_share(held_out_rows(source), train_share, config.seed)
    resplit.publish_resplit(source, twin.dataset_uri, "dataset", chosen, note)
    _run("train", twin, twin.scorer_uri)
    _run("evaluate", twin, twin.evaluation_uri)
    return dict(artifacts.read_any_manifest(twin.evaluation_uri, "evaluation_path")["summary"])


def held_out_rows(source: RegressionSet) -> dict[str, bool]:
    """Return for each row id whether its dataset is held out. Raises `CappyError` if a dataset of `HELD_OUT` has no row."""
    tables = [table for split in source.manifest["counts"] for table in source.batches(split, columns=["id", "dataset"])]
    rows = [row for table in tables for row in table.to_pylist()]
    missing = sorted(set(HELD_OUT) - {row["dataset"] for row in rows})
    if missing:
        raise CappyError(
            f"dataset={source.uri} has no rows of {', '.join(missing)}; use the set of {CONFIG}.yaml with all of T0's datasets"
        )
    return {row["id"]: row["dataset"] in HELD_OUT for row in rows}


def choose_share(held_out: Mapping[str, bool], share: float, seed: int) -> dict[str, bool]:
    """Return all held-out rows and a share of the others, chosen by a hash, so that a larger share has the rows of a smaller one.

    `held_out` has for each row id whether its dataset is held out; `share` is in (0, 1].
    """
    return {row_id: held for row_id, held in held_out.items() if held or hash_to_unit_interval(f"{seed}\0{row_id}") < share}


def render_training(config: Config, manifest: dict[str, Any]) -> str:
    """Return the part of the card about data, seed, command and limits. `manifest` is that of the set."""
    summary = manifest["summary"]
    datasets = textwrap.fill(", ".join(sorted(summary["datasets"])), 120)
    sources = ", ".join(f"{count:,} {name}" for name, count in summary["sources"].items())
    return f"""
## Data, command and limits

- data: {summary["instructions"]:,} instructions and {summary["pairs"]:,} pairs ({sources}) of T0's training mixture
- sampled candidates: `{config.sampler.model}`, raw prompts with {config.sampler.prompt.shots} examples
- seed: {config.seed}
- command: `python -m cappy.pretrain`, with `cappy/configs/{CONFIG}.yaml`
- selection: fitted on {config.training.selection_share:.0%} of the train instructions, which the training left out
- limits: English; instructions of up to {config.scorer.max_length} tokens together with the response; a small encoder with little
  knowledge of facts. The score is not a probability. `--held-out` measures tasks that the training did not have.

The datasets:

```text
{datasets}
```
"""


def _run(verb: str, config: Config, uri: str) -> None:
    from cappy import jobs

    if storage.exists(storage.join(uri, artifacts.MANIFEST)):
        log(f"pretrain: {uri} is finished and kept")
    else:
        jobs.run_verb(verb, config)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1; give for example 0.25")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the steps, and print the result as JSON; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cappy.pretrain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--held-out", action="store_true", help="train the twin without the held-out datasets, and evaluate it on them")
    parser.add_argument("--train-share", type=_share, default=1.0, help="with --held-out: share of the rows to train on, above 0 up to 1")
    parser.add_argument("--out", type=Path, default=packed_scorer.FOLDER / DEFAULT_SCORER, help="folder of the packed scorer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a setting of the config")
    given = parser.parse_args(arguments)
    if given.train_share < 1 and not given.held_out:
        parser.error("--train-share is for --held-out; the scorer of the package trains on all rows")
    try:
        config = load(CONFIG, given.settings)
        print(json.dumps(make_twin(config, given.train_share) if given.held_out else make_scorer(config, given.out)))
    except CappyError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
