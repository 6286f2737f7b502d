import io
import json

import pytest
from rich.console import Console

from cappy import display, inspection
from cluster import artifacts, copying, storage
from cluster.errors import CappyError
from generation import export_pairs
from tests.generation.made_set import publish
from training.selection import Selection, Variant, to_text


def shown(result):
    console = Console(width=160, record=True, file=io.StringIO())
    display.show_inspection(result, console)
    return console.export_text()


def letters(*reasons):
    return "".join(json.dumps({"where": "x", "stage": "sample", "reason": reason, "row": "{}"}) + "\n" for reason in reasons)


def test_a_set_shows_sources_labels_by_source_rates_cost_and_its_dead_letters_counted(tmp_path):
    reasons = ["the prompt has 9000 tokens", "the prompt has 12 tokens", "no such token"]
    publish(str(tmp_path), letters=letters(*reasons), rates={"tokens_per_second": 80.5}, cost={"dollars": 1.25})
    result = inspection.run_inspect(str(tmp_path), samples=1)
    assert result["problems"] == [] and result["dead_letters"] == {"sample: the prompt has N tokens": 2, "sample: no such token": 1}
    text = shown(result)
    for part in ("checksums match", "rates: tokens per second 80.5", "cost: dollars 1.25", "2 x sample: the prompt has N tokens"):
        assert part in text
    (last,) = (line.split() for line in text.splitlines() if line.strip().startswith("[0.9, 1.0]"))
    assert last[-2:] == ["13", "13"]  # the 13 references, and the 13 samples that equal them
    (row,) = result["samples"]
    assert len(row["candidates"]) == 7 and f"say right {int(row['id'], 16)}, please" in text


def test_a_scorer_shows_its_fitted_selection(tmp_path):
    fitted = Selection((Variant(("score", "consensus"), (0.5, -0.25), (1.0, 1.0), rows=1200, cross_validated={"fitted": 0.316}),))
    entry = storage.write_bytes(f"{tmp_path}/selection.json", to_text(fitted).encode())
    manifest = {"kind": "scorer", "created": "now", "code_version": "x", "summary": {"steps": 3}, "files": {"selection.json": entry}}
    artifacts.publish(str(tmp_path), manifest)
    text = shown(inspection.run_inspect(str(tmp_path)))
    assert "selection fitted on 1,200 pools, weights: score 0.5, consensus -0.25" in text
    assert "cross-validated label of the picks: fitted 0.316" in text


def test_brackets_in_paths_and_names_are_shown(tmp_path):
    publish(f"{tmp_path}/set [v2]")
    result = inspection.run_inspect(f"{tmp_path}/set [v2]", samples=1)
    result["summary"]["datasets"] = {"task [bold]": 1}
    result["lineage"]["sampler"]["model"] = "model [v3]"
    text = shown(result)
    assert f"{tmp_path}/set [v2] in" in text and "model [v3];" in text and "task [bold] 1" in text


def test_a_long_list_of_datasets_and_reasons_is_cut_with_a_count(tmp_path):
    publish(str(tmp_path), letters=letters(*(f"reason {'x' * n}" for n in range(10))))
    result = inspection.run_inspect(str(tmp_path))
    result["summary"]["datasets"] = {f"task{n}": 100 - n for n in range(30)}
    text = shown(result)
    assert "task23 77" in text and "task24" not in text and "and 6 more with 441" in text and "and 2 reasons more" in text


def test_pairs_are_shown_with_their_set_and_a_copy_with_its_source(tmp_path):
    publish(f"{tmp_path}/a")
    export_pairs.export_pairs(f"{tmp_path}/a", f"{tmp_path}/b")
    copying.copy_folder(f"{tmp_path}/b", f"{tmp_path}/c")
    result = inspection.run_inspect(f"{tmp_path}/c", samples=2)
    assert result["kind"] == "pairs" and [row["source"] for row in result["samples"]] == ["reference", "mismatched"]
    text = shown(result)
    assert f"pairs of {tmp_path}/a" in text and f"copied from {tmp_path}/b" in text and f"{tmp_path}/c in" in text


def test_every_damaged_file_is_named_in_order(tmp_path):
    manifest = publish(str(tmp_path))
    names = [name for name in manifest["files"] if name.startswith(("data/", "dead_letters"))]
    for name in names:
        storage.write_bytes(f"{tmp_path}/{name}", b"PAR1")
    result = inspection.run_inspect(str(tmp_path))
    assert [problem.split()[0] for problem in result["problems"]] == names and "samples" not in result
    assert "4 DAMAGED" in shown(result)
    with pytest.raises(CappyError, match=r"is damaged \(.+\); copy or make it again"):
        inspection.run_inspect(str(tmp_path), verify=False)


def test_a_training_summary_shows_the_measured_values_and_no_plot_data():
    console = Console(width=160, record=True, file=io.StringIO())
    summary = {"steps": 3, "validation": {"mse": 0.25, "accuracy": None}, "calibration": [{"count": 9, "score": 0.1, "label": 0.2}]}
    display.show_summary("scorer", summary, console)
    assert [line.split() for line in console.export_text().splitlines()] == [["steps", "3"], ["validation.mse", "0.25"]]


def test_the_folder_of_adapt_shows_its_tasks_and_names_the_damaged_file_of_a_task(tmp_path):
    outcome = {"figures": None, "gate": None, "use": "cappy-minilm"}
    tasks = [
        outcome | {"task": "tense", "dataset": "tense", "state": "published", "uri": f"/elsewhere/{tmp_path.name}/tense"},
        outcome | {"task": "rephrase", "dataset": "rephrase", "state": "rejected", "uri": None},
    ]
    summary = {"uri": str(tmp_path), "tasks": tasks, "published": 1, "averages": {}, "seconds": 3.0, "identity": {"seed": 1}}
    storage.write_json(f"{tmp_path}/results.json", summary)
    entry = storage.write_bytes(f"{tmp_path}/tense/model.safetensors", b"weights")
    artifacts.publish_folder(f"{tmp_path}/tense", "scorer", files={"model.safetensors": entry}, summary={}, config={})
    result = inspection.run_inspect(str(tmp_path))
    assert (result["files"], result["bytes"], result["problems"]) == (1, 7, []) and "identity" not in result["summary"]
    text = shown(result)
    assert "checksums match" in text and "use cappy-minilm: rephrase" in text and "1 of 2 tasks published" in text
    storage.write_bytes(f"{tmp_path}/tense/model.safetensors", b"Weights")
    (problem,) = inspection.run_inspect(str(tmp_path))["problems"]
    assert problem.startswith("tense: model.safetensors")


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"averages": {}}', b"not JSON"])
def test_the_results_of_an_unfinished_evaluation_are_not_taken_for_adapted_scorers(content, tmp_path):
    storage.write_bytes(f"{tmp_path}/results.json", content)
    with pytest.raises(CappyError, match="its run did not finish; run its command again"):
        inspection.run_inspect(str(tmp_path))
