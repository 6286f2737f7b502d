from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForSequenceClassification

from cluster import artifacts, storage
from cluster.config import AdaptConfig, Config, ObjectiveConfig, ScorerConfig, TrainingConfig
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from generation.schema import DATASET
from tests.training.conftest import rows
from training import adapt_one, lora
from training.adapt_one import Base, Task
from training.scorer import Scorer, load_tokenizer, new_model
from training.selection import VARIANTS
from training.task_rows import candidate_rows


def task_rows(name: str, count: int, seed: int, choices: bool = False) -> list[dict[str, Any]]:
    """Return rows of one task. With `choices` the candidates are answer choices instead of samples."""
    made = [{**row, "dataset": name} for row in rows(count, seed)]
    for row in made if choices else []:
        row["answer_choices"] = [each["response"] for each in row["candidates"]]
        for each, source in zip(row["candidates"], ("reference", "choice", "choice"), strict=True):
            each |= {"source": source, "label": float(source == "reference"), "decoding": None, "tokens": None, "logprob": None}
    return made


def publish_tasks(uri: str, train: list[dict[str, Any]], validation: list[dict[str, Any]], row_group: int = 16) -> str:
    """Publish a set of these rows, in the layout of `cappy generate`; return `uri`."""
    counts, names = {}, []
    for split, made in (("train", train), ("validation", validation)):
        name = f"data/{split}/part-00000.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(made, DATASET), sink, row_group_size=row_group, write_page_checksum=True)
        storage.write_bytes(storage.join(uri, name), sink.getvalue().to_pybytes())
        counts[split] = {"instructions": len(made), "pairs": sum(len(row["candidates"]) for row in made)}
        names.append(name)
    metric = {"name": "rouge_l", "mode": "paper", "version": 1}
    artifacts.publish(uri, {"kind": "dataset", "version": 1, "counts": counts, "metric": metric, "files": artifacts.checksums(uri, names)})
    return uri


def published_scorer(encoder: Path, uri: str) -> str:
    """Publish the encoder with a fresh head as a scorer; return `uri`."""
    model = new_model(encoder, ScorerConfig(max_length=32), TrainingConfig(), seed=3)
    Scorer(model, load_tokenizer(encoder, "x", "s"), 32).save(uri)
    artifacts.publish(uri, {"kind": "scorer", "files": {}})
    return uri


def settings(workspace: Path, encoder: Path, **chosen: Any) -> Config:
    return Config.model_validate(
        {
            "workspace": str(workspace),
            "scorer": {"encoder": str(encoder), "max_length": 32, "dtype": "float32"},
            "training": {"window": 64, "batch_size": 16},
            "adapt": {"pairs": 2400, "batch_size": 16, "learning_rate": 3e-3} | chosen,
        }
    )


def base_of(uri: str) -> Base:
    return Base(uri, True, lora.weights_sha256(Path(uri)), storage.read_json(f"{uri}/_MANIFEST.json")["writer"], 32)


def task_of(config: Config, name: str, only: str | None = None) -> Task:
    return Task(name, only or name, f"{config.adapted_uri}/{name}", {"task": name})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    train = [*task_rows("colors", 40, 1), *task_rows("lonely", 5, 2), *task_rows("sides", 30, 3, choices=True)]
    validation = [*task_rows("colors", 30, 4), *task_rows("sides", 40, 5, choices=True), *task_rows("untrained", 3, 6)]
    return publish_tasks(str(tmp_path_factory.mktemp("adapt") / "set"), train, validation)


def test_a_task_is_trained_by_one_worker_and_adapt_settings_override_training_settings():
    shared = TrainingConfig(workers=4, min_workers=2, parallel="fsdp", batch_size=16, window=64, weight_decay=0.05, epochs=9)
    mine = AdaptConfig(batch_size=128, warmup=0.2).training(shared)
    assert (mine.workers, mine.min_workers, mine.parallel, mine.epochs, mine.batch_size) == (1, None, "ddp", 1, 128)
    assert (mine.window, mine.warmup, mine.weight_decay, mine.learning_rate) == (128, 0.2, 0.05, 2e-5)
    assert AdaptConfig(base="x", method="lora").training(shared).learning_rate == 5e-4
    assert AdaptConfig(base="x", method="lora", learning_rate=1e-3).training(shared).learning_rate == 1e-3


@pytest.fixture(scope="module")
def base(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return published_scorer(encoder, str(tmp_path_factory.mktemp("base") / "scorer"))


def after(task: Task, config: Config) -> float:
    """Return the mean label, in points, of the picks of a published scorer on the validation rows."""
    scorer = Scorer.load(task.uri)
    rows = candidate_rows(RegressionSet(config.dataset_uri), "validation", task.dataset, 1000, config.seed).to_pylist()
    return 100 * float(np.mean([row["candidates"][scorer.best(row["instruction"], answers(row)).index]["label"] for row in rows]))


def answers(row: dict[str, Any]) -> list[str]:
    return [each["response"] for each in row["candidates"]]


def test_full_adaptation_publishes_a_plain_scorer_with_better_picks(dataset: str, base: str, encoder: Path, tmp_path: Path):
    # By the scores alone: the log-probabilities of these rows leave a fitted selection nothing to gain.
    config = settings(tmp_path, encoder, base=base, metric="pairwise_accuracy").model_copy(update={"dataset": dataset})
    task = task_of(config, "colors")
    result = adapt_one.adapt_task(config, task, base_of(base))
    assert result["state"] == "published" and result["use"] == result["uri"] == task.uri
    assert result["gate"]["gain"] > 0 and result["figures"]["after"] > result["figures"]["before"]
    assert (result["label"], result["steps"], result["pairs"], result["train_rows"]) == ("rouge_l", 150, 2400, 40)
    assert (result["gate"]["rows"], result["gate"]["split"], result["gate"]["folds"]) == (40, "train", 2)
    assert (result["figures"]["rows"], result["figures"]["apart"]) == (30, True)
    manifest = artifacts.read_manifest(task.uri, "scorer", "adapt")
    assert (
        {**manifest["summary"], "identity": task.identity}
        == json.loads(json.dumps(result))
        == storage.read_json(f"{task.uri}/results.json")
    )
    assert artifacts.verify(task.uri, manifest) == []
    assert set(storage.list_files(task.uri)) == {*manifest["files"], artifacts.MANIFEST}
    assert AutoModelForSequenceClassification.from_pretrained(task.uri).config.num_labels == 1
    assert after(task, config) == pytest.approx(result["figures"]["after"])
    fitted = Scorer.load(task.uri).selection
    assert fitted.made["scores"] == "held out" and [each.signals for each in fitted.variants] == list(VARIANTS)
    assert result["selection"]["cross_validated"]["fitted"] >= result["selection"]["cross_validated"]["random"]
    assert "selection.json" in manifest["files"]
    assert "Scorer.load" in Path(task.uri, "README.md").read_text()
    assert adapt_one.adapt_task(config, task, base_of(base)) == storage.read_json(
        f"{task.uri}/results.json"
    )  # a finished task is not repeated


@pytest.mark.parametrize("objective", [{"mse": 0, "listwise": 1}, {"pairwise": 0.1}], ids=["listwise", "pairwise"])
def test_an_objective_that_compares_candidates_trains_whole_instructions(objective, dataset: str, base: str, encoder: Path, tmp_path: Path):
    config = settings(tmp_path, encoder, base=base, pairs=1200, epochs=2, metric="pairwise_accuracy")
    training = config.training.model_copy(update={"objective": ObjectiveConfig(**objective)})
    config = config.model_copy(update={"dataset": dataset, "training": training})
    result = adapt_one.adapt_task(config, task_of(config, "colors"), base_of(base))
    assert result["state"] == "published" and result["figures"]["after"] > result["figures"]["before"]
    assert result["pairs"] == pytest.approx(2400, rel=0.02) and result["steps"] == pytest.approx(150, rel=0.1)


def test_lora_publishes_adapters_only_and_they_load_as_a_scorer(dataset: str, base: str, encoder: Path, tmp_path: Path):
    # No gate: whether a base this small gains from adapters is chance.
    config = settings(tmp_path, encoder, base=base, method="lora", learning_rate=1e-2, gate=False).model_copy(update={"dataset": dataset})
    task = task_of(config, "sides")
    result = adapt_one.adapt_task(config, task, base_of(base))
    assert result["state"] == "published" and result["figures"]["self"] is None
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json"} <= set(storage.list_files(task.uri))
    assert not storage.exists(f"{task.uri}/model.safetensors")
    assert artifacts.read_manifest(task.uri, "scorer", "adapt")["base"]["writer"] == base_of(base).writer
    assert after(task, config) == pytest.approx(result["figures"]["after"])


def test_cross_validation_needs_no_validation_rows_and_does_not_change_the_weights(dataset: str, base: str, encoder: Path, tmp_path: Path):
    config = settings(tmp_path, encoder, base=base, pairs=64, gate=False).model_copy(update={"dataset": dataset})
    plain = config.model_copy(update={"adapt": config.adapt.model_copy(update={"folds": 0})})
    crossed = adapt_one.adapt_task(config, task_of(config, "crossed", "lonely"), base_of(base))
    alone = adapt_one.adapt_task(plain, task_of(plain, "alone", "lonely"), base_of(base))
    assert (crossed["gate"]["rows"], crossed["figures"], alone["gate"]) == (5, None, None)
    for key in ("steps", "pairs", "train_mse"):
        assert crossed[key] == alone[key]
    weights = [Path(each["uri"], "model.safetensors").read_bytes() for each in (crossed, alone)]
    assert weights[0] == weights[1]
    assert alone["selection"] is None and Scorer.load(alone["uri"]).selection is None


def test_without_folds_the_gate_takes_a_part_of_the_validation_rows(dataset: str, base: str, encoder: Path, tmp_path: Path):
    config = settings(tmp_path, encoder, base=base, folds=0).model_copy(update={"dataset": dataset})
    result = adapt_one.adapt_task(config, task_of(config, "colors"), base_of(base))
    assert (result["gate"]["rows"], result["gate"]["split"], result["figures"]["rows"]) == (15, "validation", 15)
    assert result["gate"]["gain"] > 0 and result["figures"]["apart"] and "low" not in result["gate"]


def test_a_scorer_that_does_not_gain_is_not_published(dataset: str, base: str, encoder: Path, tmp_path: Path):
    config = settings(tmp_path, encoder, base=base, pairs=32, learning_rate=1e-12, metric="pairwise_accuracy")
    config = config.model_copy(update={"dataset": dataset})
    task = task_of(config, "colors")
    result = adapt_one.adapt_task(config, task, base_of(base))
    assert (result["state"], result["uri"], result["use"]) == ("rejected", None, base)
    assert storage.list_files(task.uri).keys() == {"results.json"} and adapt_one.read_outcome(task) == result
    with pytest.raises(CappyError, match=r"no config\.json, so it is not a model"):
        Scorer.load(task.uri)
    free = config.model_copy(update={"adapt": config.adapt.model_copy(update={"gate": False})})
    assert adapt_one.adapt_task(free, task_of(free, "free", "colors"), base_of(base))["state"] == "published"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_base_is_published_with_a_fitted_selection_where_training_does_not_help(
    method: str, dataset: str, base: str, encoder: Path, tmp_path: Path
):
    # The log-probabilities of these rows are informative, and the training changes nothing.
    config = settings(tmp_path, encoder, base=base, pairs=32, learning_rate=1e-12, method=method).model_copy(update={"dataset": dataset})
    task = task_of(config, "colors")
    result = adapt_one.adapt_task(config, task, base_of(base))
    assert (result["state"], result["gate"]["weights"], result["use"]) == ("published", "base", task.uri)
    assert result["gate"]["after"] > result["gate"]["before"]
    assert result["figures"]["fitted"] > result["figures"]["before"] == result["figures"]["after"]
    published = Scorer.load(task.uri)
    pairs = (["Name a color.", "Name a color."], ["red", "a stone"])
    assert np.array_equal(published.score(*pairs), Scorer.load(base).score(*pairs))
    assert published.selection.made["trainings"] == 0
    assert "These are the weights of the base" in Path(task.uri, "README.md").read_text()


def test_a_task_that_cannot_be_adapted_raises_the_reason(dataset: str, base: str, encoder: Path, tmp_path: Path):
    config = settings(tmp_path, encoder, base=base, pairs=32).model_copy(update={"dataset": dataset})
    with pytest.raises(CappyError, match="no train rows of untrained"):
        adapt_one.adapt_task(config, task_of(config, "untrained"), base_of(base))
    config = settings(tmp_path, encoder, base=base, pairs=32, folds=0).model_copy(update={"dataset": dataset})
    with pytest.raises(CappyError, match=r"no validation rows of lonely .* set adapt\.gate=false to publish without a gate"):
        adapt_one.adapt_task(config, task_of(config, "lonely"), base_of(base))
    free = config.model_copy(update={"adapt": config.adapt.model_copy(update={"gate": False})})
    result = adapt_one.adapt_task(free, task_of(config, "lonely"), base_of(base))
    assert (result["state"], result["gate"], result["figures"]) == ("published", None, None)
    hot = settings(tmp_path, encoder, base=base, pairs=64, learning_rate=1e30).model_copy(update={"dataset": dataset})
    hot = hot.model_copy(update={"training": hot.training.model_copy(update={"clip_norm": 1e30})})
    with pytest.raises(CappyError, match=r"the loss is (nan|inf) at step \d+; lower adapt\.learning_rate"):
        adapt_one.adapt_task(hot, task_of(hot, "hot", "colors"), base_of(base))


def test_the_files_of_a_lost_run_are_neither_a_scorer_nor_an_outcome(dataset: str, base: str, encoder: Path, tmp_path: Path):
    config = settings(tmp_path, encoder, base=base).model_copy(update={"dataset": dataset})
    task = task_of(config, "colors")
    published_scorer(encoder, task.uri)
    storage.delete(f"{task.uri}/{artifacts.MANIFEST}")
    storage.write_json(f"{task.uri}/results.json", {"state": "published", "identity": task.identity})
    storage.write_bytes(f"{task.uri}/_checkpoints/adapting", b"")
    assert adapt_one.read_outcome(task) is None
    with pytest.raises(CappyError, match="the run writing it did not finish"):
        Scorer.load(task.uri)
