from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cappy.jobs import run_verb
from cluster import artifacts
from cluster.config import Config, LabelConfig, load
from cluster.errors import CappyError, UsageError
from generation import annotate, generate, labels, units
from generation.dataset import RegressionSet
from generation.user_metric import load_metric
from tests.generation.fixed_llm import FixedLLM

HERE = "tests.generation.user_labels"
RESPONSES = pa.array([["a1", "22"], [], ["see b"]], labels.TEXTS)
REFERENCES = pa.array([["x"], ["y"], ["z"]], labels.TEXTS)
INSTRUCTIONS = ["say a", "say", "say b"]


def compute(name: str) -> list[float]:
    return labels.compute_labels(RESPONSES, REFERENCES, LabelConfig(metric=f"{HERE}:{name}"), INSTRUCTIONS).tolist()


def test_a_function_labels_the_responses_of_a_batch_and_gets_the_instructions_if_it_has_that_parameter():
    assert compute("share_of_digits") == [0.5, 1.0, 0.0]
    assert compute("is_named") == [1.0, 0.0, 1.0]


def test_the_manifest_entry_has_the_name_and_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def describe(name: str) -> dict[str, Any]:
        return labels.describe_metric(LabelConfig(metric=name))

    assert describe(f"{HERE}:share_of_digits") == {"name": f"{HERE}:share_of_digits", "mode": None, "version": "1.2"}
    assert describe(f"{HERE}:is_named")["version"] == "7"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels_without_version.py").write_text("def zero(responses, references):\n    return [0] * len(responses)\n")
    assert describe("labels_without_version:zero")["version"].startswith("sha256 ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_a_number", "returned nan for 'a1'; labels are in [0, 1]"),
        ("too_large", "returned 1.5 for 'a1'; labels are in [0, 1]"),
        ("one_label", "returned labels of shape (1,) for 3 responses; it must return one number for each"),
        ("nothing", "raised TypeError"),
        ("exits", "raised SystemExit: 3"),
    ],
)
def test_a_function_that_returns_no_labels_is_a_one_line_error(name: str, message: str):
    with pytest.raises(CappyError) as raised:
        compute(name)
    assert str(raised.value).startswith(f"generate.label.metric={HERE}:{name} {message}") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot import no_such_module (ModuleNotFoundError: No module named 'no_such_module') on "),
        (f"{HERE}:absent", f"{HERE} has no function absent; give package.module:function"),
        (f"{HERE}:VERSION", f"{HERE} has no function VERSION"),
        (f"{HERE}:wrong_parameters", "the function cannot be called with (responses, references)"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_anything_starts(name: str, message: str, tmp_path: Path):
    config = load(None, [f"generate.label.metric={name}", f"workspace={tmp_path}"])
    with pytest.raises(UsageError) as raised:
        run_verb("generate", config)
    assert f"generate.label.metric={name}: {message}" in str(raised.value) and not (tmp_path / "dataset/_MANIFEST.json").exists()


def test_a_function_does_not_check_mismatched_references():
    config = LabelConfig(metric=f"{HERE}:too_large")
    assert labels.are_right(["Yes.", "no"], [["yes"], ["yes"]], config) == [True, False]
    assert not labels.has_unseen_words("मौसम", config)


def source(tmp_path: Path) -> list[str]:
    rows = [{"instruction": f"say {n}", "references": [str(n)], "dataset": "numbers"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"source={{kind: files, path: '{tmp_path}/rows.jsonl', validation_fraction: 0}}", f"workspace={tmp_path}/run"]


def sampled_row(number: int, config: Config) -> dict[str, Any]:
    candidate = {"response": "x", "decoding": "greedy", "tokens": 1, "finish_reason": "stop", "logprob": 0.0}
    plain = {"id": f"{number:032x}", "dataset": "numbers", "template": None, "references": [str(number)], "answer_choices": None}
    return {**plain, "instruction": f"say {number}", "mismatched": [], "sampled": [candidate], "error": None}


def test_only_the_rows_for_which_the_function_fails_become_dead_letters():
    config = load(None, [f"generate.label.metric={HERE}:fails_on_three"])
    rows, letters = units.label_rows([sampled_row(number, config) for number in range(5)], config)
    assert [row["instruction"] for row in rows] == ["say 0", "say 1", "say 2", "say 4"]
    assert {row["candidates"][-1]["label"] for row in rows} == {0.5}
    (letter,) = map(json.loads, letters)
    assert (letter["stage"], letter["where"]) == ("label", f"{3:032x}")
    assert letter["reason"] == f"generate.label.metric={HERE}:fails_on_three raised KeyError: 'no test for 3'"


@pytest.mark.slow
def test_ray_workers_label_with_the_function_and_annotate_labels_again(tmp_path: Path, ray_here: None):
    config = load(None, [*source(tmp_path), f"generate.label.metric={HERE}:fails_on_three"])
    summary = generate.run_generate(config, load=FixedLLM)
    assert (summary["instructions"], summary["dead_letters"]) == (7, 1)
    manifest = artifacts.read_manifest(config.dataset_uri, "dataset", "generate")
    assert manifest["metric"] == {"name": f"{HERE}:fails_on_three", "mode": None, "version": "1.2"}
    digits = load(None, [f"generate.label.metric={HERE}:share_of_digits"])
    annotate.run_annotate(digits, src=config.dataset_uri, dst=f"{tmp_path}/digits")
    opened = RegressionSet(f"{tmp_path}/digits")
    assert opened.manifest["metric"]["name"] == f"{HERE}:share_of_digits"
    sampled = [each for row in opened.to_pandas("train")["candidates"] for each in row if each["source"] == "sampled"]
    function = load_metric(f"{HERE}:share_of_digits").function
    assert sampled and [each["label"] for each in sampled] == function([each["response"] for each in sampled], [])
    failing = load(None, [f"generate.label.metric={HERE}:not_a_number"])
    with pytest.raises(CappyError, match=r"not_a_number returned nan for 'number .*; labels are in \[0, 1\] \(row [0-9a-f]{32}\)"):
        run_verb("annotate", failing, src=config.dataset_uri, dst=f"{tmp_path}/failing")
