import json
from pathlib import Path

import pytest

from cluster import lease
from cluster.config import load
from cluster.errors import UsageError
from generation import dataset_card, plan, prepared_units, units
from tests.generation.made_set import publish
from tests.generation.sources.row_files import ROWS, files_config, write_jsonl

ODD = Path(__file__).parents[1] / "data" / "odd"


def prepare(config, folder):
    """Prepare the units of a config; return the counts and the prepared rows of both splits."""
    staging = f"{folder}/set/_staging"
    with lease.hold(f"{folder}/set/_lease", "dataset=set") as run_lease:
        counts = prepared_units.prepare(staging, config, run_lease)
    names = prepared_units.unit_names(counts)
    return counts, [row for name in names for row in units.read_unit(units.unit_uri(staging, "prepared", name)).to_pylist()]


def test_every_row_of_the_source_is_a_prepared_row_a_dead_letter_or_merged(tmp_path):
    rows = [*ROWS, *ROWS[:5], {"instruction": "no references"}, {**ROWS[0], "references": ["new"]}]
    counts, prepared = prepare(files_config(write_jsonl(tmp_path / "d.jsonl", rows)), tmp_path)
    assert (counts["rows"], counts["dead_letters"], counts["merged"]) == (40, 1, 6)
    assert counts["rows"] + counts["dead_letters"] + counts["merged"] == len(rows) and len(prepared) == 40
    assert next(row for row in prepared if row["instruction"] == "say 0")["references"] == ["0", "number 0", "new"]
    planned = plan.run_plan(files_config(tmp_path / "d.jsonl"))
    assert (planned["totals"]["instructions"], planned["dead_letters"], planned["merged"], planned["warnings"]) == (40, 1, 6, [])


@pytest.mark.parametrize(
    ("rows", "overrides", "error"),
    [
        (
            ROWS[:3],
            ["source.validation_fraction=0.001"],
            r"source.validation_fraction=0.001 leaves the split validation empty .*; raise it, or",
        ),
        (ROWS[:3], ["source.validation_fraction=0.999"], r"source.validation_fraction=0.999 leaves the split train empty .*; lower it, or"),
        (ROWS, ["source.split_by=dataset"], r"source.split_by=dataset leaves the split validation empty .*; use split_by=example"),
    ],
)
def test_an_empty_split_is_an_error_that_names_the_setting(rows, overrides, error, tmp_path):
    config = files_config(write_jsonl(tmp_path / "d.jsonl", rows), *overrides)
    with pytest.raises(UsageError, match=error):
        prepare(config, tmp_path)
    (warning,) = plan.run_plan(config)["warnings"]
    assert "would stop" in warning and "empty" in warning


def test_an_empty_split_of_a_mixture_names_the_part(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS[:3])
    part = f"{{source: {{kind: files, path: '{path}', validation_fraction: 0.001}}}}"
    with pytest.raises(UsageError, match=r"source.parts.0.source.validation_fraction=0.001 leaves the split validation empty"):
        prepare(load(None, [f"source={{kind: mixture, parts: [{part}]}}"]), tmp_path)


@pytest.mark.parametrize("split", ["train", None])
def test_a_set_without_validation_rows_is_allowed_if_the_rows_or_the_setting_request_it(split, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{**row, "split": split} for row in ROWS])
    counts, _ = prepare(files_config(path, *([] if split else ["source.validation_fraction=0"])), tmp_path)
    assert counts["counts"] == {"train": 40, "validation": 0}


def test_a_train_split_that_decontamination_empties_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    evaluation = write_jsonl(tmp_path / "e.jsonl", ROWS)
    config = files_config(path, f"decontaminate.files=['{evaluation}']")
    with pytest.raises(UsageError, match=r"decontaminate.files: all \d+ train instructions overlap"):
        prepare(config, tmp_path)


@pytest.mark.parametrize(
    ("references", "label", "unseen"),
    [
        (["北京市"], "{}", 1),
        (["Москва"], "{metric: token_f1}", 1),
        (["हिन्दी 7"], "{}", 1),
        (["number 7", "+"], "{}", 1),
        (["北京市"], "{mode: unicode}", 0),
        (["北京市"], "{metric: chrf}", 0),
        (["Zürich", "café 5"], "{}", 0),
    ],
)
def test_references_that_the_metric_cannot_see_are_counted_and_warned_about(references, label, unseen, tmp_path, capsys):
    rows = [{**row, "split": "train"} for row in ROWS]
    path = write_jsonl(tmp_path / "d.jsonl", [*rows, {"instruction": "q", "references": references, "split": "train"}])
    config = files_config(path, f"generate.label={label}")
    counts, _ = prepare(config, tmp_path)
    assert (counts["unseen_references"], counts["sampled_rows"]) == (unseen, 41)
    prepared_units.warn_about_labels(counts, config)
    warnings = plan.run_plan(config)["warnings"]
    for text in (capsys.readouterr().err, " ".join(warnings)):
        assert ("set generate.label.mode=unicode" in text) == bool(unseen)


def test_the_odd_input_in_chinese_is_warned_about_in_the_card(tmp_path):
    counts, _ = prepare(files_config(ODD / "zh.jsonl"), tmp_path)
    manifest = publish(str(tmp_path / "published"))
    summary = {**manifest["summary"], "unseen_references": counts["unseen_references"], "merged": 1200}
    card = dataset_card.render_card({**manifest, "summary": summary})
    assert f"{counts['rows']} instructions have references that Rouge-L in paper mode cannot see" in card
    assert "- 1,200 repeated rows of the source were merged" in card
    relabelled = {**manifest, "summary": summary, "metric": {**manifest["metric"], "mode": "unicode"}}
    assert "cannot see" not in dataset_card.render_card(relabelled) and "cannot see" not in dataset_card.render_card(manifest)


def test_classification_rows_are_not_counted_as_sampled(tmp_path):
    rows = [{"instruction": f"fox {n}?", "references": ["是"], "answer_choices": ["是", "no"], "split": "train"} for n in range(3)]
    counts, _ = prepare(files_config(write_jsonl(tmp_path / "d.jsonl", rows)), tmp_path)
    assert (counts["sampled_rows"], counts["unseen_references"]) == (0, 0)


def test_a_second_attempt_reads_the_counts_of_the_first(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    first, _ = prepare(files_config(path), tmp_path)
    path.unlink()
    again, _ = prepare(files_config(path), tmp_path)
    assert again == first == json.loads((tmp_path / "set/_staging/prepared.json").read_text())
