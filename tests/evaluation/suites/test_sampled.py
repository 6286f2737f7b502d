"""A suite in folds, from a published set to its report, with a tiny encoder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cappy.display_suites import show_suite
from cluster import artifacts, storage
from cluster.config import AdaptiveConfig, Config
from cluster.errors import UsageError
from evaluation.suites import sampled
from evaluation.suites.cost import order_pool, stop_size
from evaluation.suites.run import run_suite
from generation import dataset as datasets
from generation.dataset import RegressionSet
from generation.schema import DATASET
from tests.training.conftest import encoder, one_thread  # noqa: F401
from tests.training.test_adapt_one import published_scorer, settings, task_rows

DECODINGS = [{"name": "greedy", "n": 1, "temperature": 0.0}, {"name": "sample", "n": 2}]


def publish(config: Config) -> None:
    """Publish a set with two tasks whose three candidates are sampled: one greedy, two with temperature 1."""
    counts, files, total = {}, {}, {}
    for split, seeds in (("train", (1, 2)), ("validation", (3, 4))):
        rows = [row for name, seed in zip(("colors", "sides"), seeds, strict=True) for row in task_rows(name, 24, seed)]
        for number, row in enumerate(rows):
            row["id"] = f"{split}-{number}"
            for each, decoding in zip(row["candidates"], ("sample", "greedy", "sample"), strict=True):
                each |= {"source": "sampled", "decoding": decoding, "tokens": 2, "logprob": -1.0 - len(each["response"]) / 10}
        table = pa.Table.from_pylist(rows, DATASET)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True)
        name = f"data/{split}/part-00000.parquet"
        storage.write_bytes(storage.join(config.dataset_uri, name), sink.getvalue().to_pybytes())
        files[name] = {**artifacts.checksums(config.dataset_uri, [name])[name], "rows": len(rows)}
        numbers = datasets.compute_statistics(table)
        counts[split] = {key: numbers[key] for key in ("instructions", "pairs")}
        total = datasets.add_statistics(total, numbers)
    storage.write_bytes(storage.join(config.dataset_uri, "config.yaml"), config.to_yaml().encode())
    files |= artifacts.checksums(config.dataset_uri, ["config.yaml"])
    facts: dict[str, Any] = {"schema": {}, "metric": {"name": "rouge_l", "mode": "paper", "version": 1}, "lineage": {}}
    facts["rates"] = {"tokens_per_second": 100.0}
    summary = {**total, "uri": config.dataset_uri, "merged": 0}
    artifacts.publish_folder(
        config.dataset_uri, "dataset", files=files, summary=summary, config=config, counts=counts, command="cappy generate", **facts
    )


@pytest.fixture(scope="module")
def suite(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:  # noqa: F811
    workspace = tmp_path_factory.mktemp("suite")
    base = published_scorer(encoder, str(workspace / "base"))
    # No gate: it would keep the base, because other signals than the score find the right candidates of these rows.
    tree = settings(workspace, encoder, base=base, pairs=600, gate=False).model_dump(mode="json")
    tree["sampler"]["decodings"] = DECODINGS
    config = Config.model_validate(
        {**tree, "suite": {"folds": 2, "pool_sizes": [1, 2, 3]}, "evaluation": {"resamples": 200}, "generate": {"mismatched": 0}}
    )
    publish(config)
    return config


def figures(config: Config) -> dict[str, Any]:
    """Return the results without times and creation."""
    results = storage.read_json(storage.join(config.evaluation_uri, "results.json"))
    for each in results["cost"]:
        each["scoring_seconds"] = None
    for each in results["adapt"]:
        each["seconds"] = None
    return {key: value for key, value in results.items() if key not in ("steps", "made")}


def test_the_order_of_a_pool_is_that_of_sampling():
    names = ["hot", "hot", "greedy", "top-k", "top-k"]
    temperatures = [{"name": "hot", "temperature": 0.9}, {"name": "greedy", "temperature": 0}, {"name": "top-k", "temperature": 1.0}]
    assert order_pool([{"decoding": name} for name in names], temperatures) == [2, 0, 3, 1, 4]


def test_early_stopping_ends_a_pool_with_a_good_score_and_draws_all_of_a_pool_without_one():
    decodings = [{"name": "greedy", "temperature": 0}, {"name": "hot", "n": 6, "temperature": 1.0}]
    names = ["greedy"] + ["hot"] * 6
    settings = AdaptiveConfig(min_gain=0.01, round_size=2)

    def pool(best: float) -> list[dict[str, Any]]:
        scores = [best, 0.05, 0.1, 0.05, 0.1, 0.05, 0.1]
        pairs = zip(names, scores, strict=True)
        return [
            {"response": f"{number}", "decoding": name, "logprob": -9.0, "adapted": value} for number, (name, value) in enumerate(pairs)
        ]

    assert stop_size(pool(0.95), "adapted", decodings, settings) == 1
    assert stop_size(pool(0.1), "adapted", decodings, settings) == 7


@pytest.mark.slow
def test_a_suite_killed_in_the_middle_and_resumed_gives_the_same_figures(suite: Config, ray_here: None, monkeypatch: pytest.MonkeyPatch):
    original = sampled.adapt.run_adapt

    def stop_in_the_second_fold(config: Config, **arguments: Any) -> Any:
        if config.adapted_uri.endswith("folds/1/adapted"):
            raise KeyboardInterrupt
        return original(config, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sampled.adapt, "run_adapt", stop_in_the_second_fold)
        with pytest.raises(KeyboardInterrupt):
            run_suite(suite)
    assert not storage.exists(storage.join(suite.evaluation_uri, artifacts.MANIFEST))
    summary = run_suite(suite)
    resumed = figures(suite)
    assert resumed["rows"] == 96
    assert set(resumed["per_task"]) == {"colors", "sides"}
    # Every scorer was trained without the rows of its fold.
    table = pq.read_table(storage.join(suite.evaluation_uri, "rows.parquet"))
    for fold in (0, 1):
        of_fold = {row["id"] for row in table.to_pylist() if row["fold"] == fold}
        split = RegressionSet(storage.join(suite.workspace, "folds", str(fold), "dataset"))
        assert of_fold == {row_id for each in split.batches("validation") for row_id in each["id"].to_pylist()}
    # The candidates show whether a scorer learned the task: the adapted one gains over the untrained one.
    assert resumed["gains"]["adapted"]["greedy"]["low"] > 0
    assert [each["candidates"] for each in resumed["cost"]][:3] == [1, 2, 3]
    assert [each["min_gain"] for each in resumed["cost"]] == [None, None, None, 0.003, 0.01, 0.03]
    assert resumed["cost"][0]["points"]["greedy"] == resumed["cost"][0]["points"]["fitted"]
    assert resumed["cost"][2]["points"]["adapted"]["mean"] == pytest.approx(resumed["averages"]["adapted"]["mean"])
    with pytest.raises(UsageError, match="already holds a finished run"):
        run_suite(suite)
    run_suite(suite, overwrite=True)
    assert figures(suite) == resumed
    console = Console(file=io.StringIO(), width=120)
    show_suite(json.loads(json.dumps(summary)), console)
    assert "of the gap from greedy to the oracle" in console.file.getvalue()  # type: ignore[attr-defined]
    page = storage.read_bytes(storage.join(suite.evaluation_uri, "report.html")).decode()
    assert "colors" in page and "NaN" not in page
    steps = storage.read_json(storage.join(suite.workspace, "steps.json"))
    assert np.isfinite([each["seconds"] for each in steps.values()]).all()


@pytest.mark.slow
def test_rivals_are_baselines_of_a_sampled_suite(suite: Config, ray_here: None, tmp_path: Path):
    tree = {**suite.model_dump(mode="json"), "evaluation_path": str(tmp_path / "evaluation")}
    tree["suite"] |= {"rivals": ["embedding"], "scorers": [str(suite.adapt.base)]}
    summary = run_suite(Config.model_validate(tree))
    assert summary["roles"]["embedding"] == summary["roles"]["scorer:base"] == "baseline"
    assert summary["averages"]["scorer:base"]["mean"] == pytest.approx(summary["averages"]["scorer"]["mean"])
    assert {"embedding", "scorer:base"} <= set(summary["gains"]["fitted"])
    table = pq.read_table(storage.join(str(tmp_path / "evaluation"), "rows.parquet"))
    assert table["value_embedding"].null_count == 0
