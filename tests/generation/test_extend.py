"""`cappy extend`: a set with the rows and candidates of an earlier set; only the missing candidates are sampled."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import lease, storage
from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation import extend, generate, prepared_units, units
from generation.dataset import RegressionSet
from tests.generation.fixed_llm import FixedLLM
from tests.generation.made_set import publish
from tests.generation.test_generate import rows_by_split, wait_for_units
from tests.generation.test_reuse import DECODINGS, ROWS, OtherLLM, refuse_to_load, write_rows

HOT = "sampler.decodings=[{name: greedy, temperature: 0}, {name: hot, n: 2, temperature: 1.5}, {name: warm, n: 3}]"


def config_for(rows, place, *overrides):
    return load(None, [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=7", DECODINGS, *overrides])


@pytest.fixture(scope="module")
def first(ray_here, tmp_path_factory):
    """Return a set with two decodings of 30 rows, and a classification row."""
    folder = tmp_path_factory.mktemp("first")
    generate.run_generate(config_for(write_rows(folder / "rows.jsonl"), folder / "set"), load=FixedLLM)
    return folder / "set"


def run_extend(src, dst, *settings, load=FixedLLM):
    return extend.run_extend(extend.read_config(str(src), str(dst), settings), src=str(src), dst=str(dst), load=load)


def read(uri):
    """Return the rows of a set by instruction and references, each with its split."""
    frames = rows_by_split(str(uri))
    return {(row["instruction"], tuple(row["references"])): row | {"split": split} for split, rows in frames.items() for row in rows}


def sampled(row):
    return [each for each in row["candidates"] if each["source"] == "sampled"]


def prepare(src, dst, *settings):
    """Prepare an extension; return the counts and the prepared rows, each with its split."""
    config = extend.read_config(str(src), str(dst), settings)
    config = config.model_copy(update={"generate": config.generate.model_copy(update={"extend": str(src)})})
    with lease.hold(f"{dst}/_lease", "dataset=set") as run_lease:
        counts = prepared_units.prepare(f"{dst}/_staging", config, run_lease)
    rows = []
    for name in prepared_units.unit_names(counts):
        table = units.read_unit(units.unit_uri(f"{dst}/_staging", "prepared", name))
        rows += [row | {"split": name.split("-")[0]} for row in table.to_pylist()]
    return counts, rows


def test_new_rows_and_decodings_give_the_set_of_one_run_and_nothing_is_sampled_twice(first, tmp_path, capsys):
    before = {name: storage.sha256(f"{first}/{name}") for name in storage.list_files(str(first))}
    rows = write_rows(tmp_path / "rows.jsonl", ROWS + 10)
    log = tmp_path / "sampled.log"
    summary = run_extend(first, tmp_path / "more", f"source.path={rows}", HOT, load=functools.partial(FixedLLM, log=str(log)))
    generate.run_generate(config_for(rows, tmp_path / "at_once", HOT), load=FixedLLM)
    assert repr(rows_by_split(str(tmp_path / "more"))) == repr(rows_by_split(str(tmp_path / "at_once")))
    drawn = [tuple(line.split()[:2]) for line in log.read_text().splitlines()]
    earlier = {row["id"] for row in read(first).values()}
    new = {row["id"] for row in read(tmp_path / "more").values()} - earlier
    assert len(drawn) == len(set(drawn)) == ROWS + 3 * 10 and len(new) == 10
    assert {name for row_id, name in drawn if row_id in earlier} == {"hot"}
    assert summary["kept_rows"] == ROWS + 1 and summary["kept_candidates"] == 4 * ROWS and summary["merged"] == 0
    manifest = RegressionSet(str(tmp_path / "more")).manifest
    version = RegressionSet(str(first)).manifest["writer"]
    assert manifest["extends"] == {"uri": str(first), "version": version, "rows": ROWS + 1, "candidates": 4 * ROWS, "tokens": 12 * ROWS}
    assert manifest["lineage"]["inputs"] == {"generate.extend": version}
    assert f"extends the set `{first}`" in (tmp_path / "more" / "README.md").read_text()
    assert {name: storage.sha256(f"{first}/{name}") for name in storage.list_files(str(first))} == before
    error = capsys.readouterr().err
    assert "31 rows and 120 sampled candidates are kept; 10 rows are new; 120 candidates are missing and are sampled" in error


def test_another_llm_is_added_beside_the_first_and_the_set_is_extended_again(first, tmp_path):
    run_extend(first, tmp_path / "two", "sampler.model=other/llm", "sampler.prompt.shots=2", load=OtherLLM)
    summary = run_extend(tmp_path / "two", tmp_path / "three", "sampler.decodings=[{name: cold, temperature: 0.2}]", load=OtherLLM)
    earlier, now = read(first), read(tmp_path / "three")
    assert earlier.keys() == now.keys()
    for key, row in earlier.items():
        old, pool = sampled(row), sampled(now[key])
        names = [(each["model"], each["decoding"]) for each in pool]
        warm = ["warm"] * 3
        if row["answer_choices"] is None:
            assert names[0] == ("other/llm", "cold") and pool[-4:] == old
            assert names[1:-4] == [("other/llm", name) for name in ("greedy", *warm)]
        assert row["split"] == now[key]["split"]
    assert summary["kept_candidates"] == 8 * ROWS and summary["sources"]["sampled"] == 9 * ROWS
    manifest = RegressionSet(str(tmp_path / "three")).manifest
    records = [(each["model"], each["prompt"]["shots"], len(each["decodings"])) for each in manifest["sampling"]]
    assert records == [("other/llm", 2, 1), ("other/llm", 2, 2), ("smollm2-135m-instruct", 0, 2)]
    assert "earlier responses of `smollm2-135m-instruct`" in (tmp_path / "three" / "README.md").read_text()
    with pytest.raises(
        UsageError, match=r"candidates of smollm2-135m-instruct with decoding 'warm' and other settings \(prompt.shots: 0 -> 2\)"
    ):
        run_extend(tmp_path / "three", tmp_path / "four", "sampler.model=smollm2-135m-instruct", "sampler.decodings=[{name: warm}]")


def test_with_nothing_new_no_llm_is_started_and_the_set_is_the_same(first, tmp_path, capsys):
    summary = run_extend(first, tmp_path / "again", load=refuse_to_load)
    assert repr(rows_by_split(str(tmp_path / "again"))) == repr(rows_by_split(str(first)))
    assert summary["kept_candidates"] == 4 * ROWS
    error = capsys.readouterr().err
    assert "0 rows are new; 0 candidates are missing" in error and "no LLM is started" in error


def test_more_candidates_of_a_decoding_are_drawn_after_the_earlier_ones(first, tmp_path):
    log = tmp_path / "sampled.log"
    five = "sampler.decodings=[{name: greedy, temperature: 0}, {name: warm, n: 5}]"
    run_extend(first, tmp_path / "five", five, load=functools.partial(FixedLLM, log=str(log)))
    earlier, now = read(first), read(tmp_path / "five")
    for key, row in earlier.items():
        assert sampled(now[key])[:4] == sampled(row)
        assert len(sampled(now[key])) == (6 if row["answer_choices"] is None else 0)
    assert {tuple(line.split()[:2]) for line in log.read_text().splitlines()} == {
        (f"{row['id']}.after3", "warm") for row in earlier.values() if row["answer_choices"] is None
    }
    counts, _ = prepare(tmp_path / "five", tmp_path / "six", "sampler.decodings=[{name: warm, n: 2}]")
    assert counts["complete"] == counts["sampled_rows"] == ROWS


class ShortLLM(OtherLLM):
    """Refuses the prompts with a 1."""

    def encode(self, turns, form, room):
        return super().encode([{"role": "user", "content": "TOO LONG"}] if "1" in turns[-1]["content"] else turns, form, room)


def test_rows_that_the_new_llm_cannot_answer_keep_their_earlier_candidates(first, tmp_path):
    summary = run_extend(first, tmp_path / "short", "sampler.model=other/llm", load=ShortLLM)
    failed = [n for n in range(ROWS) if "1" in str(n)]
    assert summary["incomplete"] == summary["dead_letters"] == len(failed)
    assert summary["instructions"] == ROWS + 1 and summary["sources"]["sampled"] == 4 * (2 * ROWS - len(failed))
    earlier, now = read(first), read(tmp_path / "short")
    for key, row in earlier.items():
        if "1" in row["instruction"]:
            assert sampled(now[key]) == sampled(row)
    letters = [json.loads(line) for line in (tmp_path / "short" / "dead_letters.jsonl").read_text().splitlines()]
    assert {each["reason"] for each in letters} == {"the prompt has 9000 tokens"} and len(letters) == len(failed)
    # The failed rows are sampled again by the next extension, and only they.
    counts, rows = prepare(tmp_path / "short", tmp_path / "next")
    assert counts["complete"] == ROWS - len(failed)
    assert {row["instruction"] for row in rows if any(row["draw"] or [0])} == {f"say {n}" for n in failed}


def test_rows_that_the_source_no_longer_has_are_kept_and_no_row_changes_its_split(first, tmp_path):
    rows = [{"instruction": f"say {n}", "references": [f"number {n}"], "dataset": "ab"[n % 2], "split": "validation"} for n in range(5)]
    rows += [{"instruction": f"name {n}", "references": ["x"], "dataset": "a"} for n in range(9)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"source.path={tmp_path}/new.jsonl", "source.validation_fraction=0.5")
    counts, prepared = prepare(first, tmp_path / "set", *settings)
    splits = {row["id"]: row["split"] for row in read(first).values()}
    assert {row["id"]: row["split"] for row in prepared if row["id"] in splits} == splits
    assert counts["rows"] == ROWS + 1 + 9 and counts["merged"] == 0 and counts["extends"]["rows"] == ROWS + 1
    assert counts["sampled_rows"] - counts["complete"] == 9
    assert [row["instruction"] for row in prepared if row["draw"] and any(row["draw"])] == [
        row["instruction"] for row in prepared if row["instruction"].startswith("name")
    ]


def test_a_row_with_other_references_keeps_its_candidates_and_gets_new_labels(first, tmp_path):
    row = {"instruction": "say 4", "references": ["four"], "dataset": "a"}
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n")
    counts, prepared = prepare(first, tmp_path / "set", f"source.path={tmp_path}/new.jsonl")
    found = next(each for each in prepared if each["instruction"] == "say 4")
    assert found["references"] == ["four", "number 4"] and counts["rows"] == ROWS + 1
    assert [each["label"] for each in found["reused"]] == [None] * 4 and found["draw"] == [0, 0]
    earlier = read(first)
    for each in prepared:
        if each["reused"] and each is not found:
            kept = sampled(earlier[each["instruction"], tuple(each["references"])])
            assert [one["label"] for one in each["reused"]] == [one["label"] for one in kept]


def test_another_metric_labels_the_earlier_candidates_again(first, tmp_path):
    run_extend(first, tmp_path / "exact", "generate.label.metric=exact_match", load=refuse_to_load)
    now = read(tmp_path / "exact")
    assert {each["label"] for row in now.values() for each in sampled(row)} <= {0.0, 1.0}
    assert any(0 < each["label"] < 1 for row in read(first).values() for each in sampled(row))


def test_a_set_is_extended_without_its_source(first, tmp_path):
    counts, prepared = prepare(first, tmp_path / "set", f"source={{kind: files, path: '{first}/data'}}", HOT)
    assert counts["rows"] == ROWS + 1 and counts["merged"] == 0 and counts["complete"] == 0
    assert {row["id"]: row["split"] for row in prepared} == {row["id"]: row["split"] for row in read(first).values()}
    assert {tuple(row["draw"]) for row in prepared if row["draw"]} == {(0, 2, 0)}


def test_candidates_of_other_sets_are_reused_for_the_new_decodings_and_rows(first, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS + 5)
    generate.run_generate(config_for(rows, tmp_path / "hot", HOT), load=OtherLLM)
    settings = (f"source.path={rows}", HOT, f"generate.reuse=[{tmp_path}/hot]")
    counts, prepared = prepare(first, tmp_path / "set", *settings)
    assert counts["complete"] == counts["sampled_rows"] == ROWS + 5
    assert counts["reused"]["candidates"] == 2 * ROWS + 6 * 5 and counts["extends"]["candidates"] == 4 * ROWS
    earlier = read(first)
    for row in prepared:
        key = row["instruction"], tuple(row["references"])
        if key in earlier and row["answer_choices"] is None:
            kept = [each["response"] for each in sampled(earlier[key])]
            assert [each["response"] for each in row["reused"]] == [*kept, "other", "other"]


def test_a_balanced_set_is_extended_to_the_balanced_set_of_one_run(first, tmp_path):
    rows = first.parent / "rows.jsonl"
    balanced = "generate.max_per_bin=1"
    generate.run_generate(config_for(rows, tmp_path / "set", balanced), load=FixedLLM)
    run_extend(tmp_path / "set", tmp_path / "more", HOT)
    generate.run_generate(config_for(rows, tmp_path / "at_once", HOT, balanced), load=FixedLLM)
    assert repr(rows_by_split(str(tmp_path / "more"))) == repr(rows_by_split(str(tmp_path / "at_once")))
    with pytest.raises(UsageError, match=r"generate\.max_per_bin: 1 -> None: .* use max_per_bin=1 or less"):
        run_extend(tmp_path / "set", tmp_path / "other", "generate.max_per_bin=null")
    with pytest.raises(UsageError, match=r"generate\.label: rouge_l -> chrf: .*keep the metric"):
        run_extend(tmp_path / "set", tmp_path / "another", "generate.label.metric=chrf")


def test_an_interrupted_extension_resumes_after_the_earlier_set_was_deleted(first, tmp_path, monkeypatch):
    given = shutil.copytree(first, tmp_path / "given")
    settings = (HOT, "generate.unit_rows=9")

    def fail(*arguments):
        raise CappyError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_sample", fail)
        with pytest.raises(CappyError, match="stopped here"):
            run_extend(given, tmp_path / "set", *settings)
    shutil.rmtree(given)
    assert run_extend(given, tmp_path / "set", *settings)["kept_candidates"] == 4 * ROWS
    assert RegressionSet(str(tmp_path / "set")).manifest["extends"]["version"] == RegressionSet(str(first)).manifest["writer"]
    with pytest.raises(CappyError, match="given is not there"):
        run_extend(given, tmp_path / "new", *settings)


def test_an_earlier_set_that_was_published_again_does_not_resume_the_run(first, tmp_path, monkeypatch):
    given = shutil.copytree(first, tmp_path / "given")
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_sample", lambda *arguments: (_ for _ in ()).throw(CappyError("stopped here")))
        with pytest.raises(CappyError, match="stopped here"):
            run_extend(given, tmp_path / "set")
    manifest = json.loads((given / "_MANIFEST.json").read_text())
    (given / "_MANIFEST.json").write_text(json.dumps(manifest | {"writer": "another"}))
    with pytest.raises(UsageError, match=r"was started with other settings \(inputs\.generate\.extend: "):
        run_extend(given, tmp_path / "set")


DRIVER = """
import functools, sys
from generation import extend
from tests.generation.fixed_llm import FixedLLM
src, dst, log, *settings = sys.argv[1:]
config = extend.read_config(src, dst, settings)
extend.run_extend(config, src=src, dst=dst, load=functools.partial(FixedLLM, delay_s=1, log=log))
"""


@pytest.mark.slow
def test_a_killed_extension_resumes_and_samples_no_finished_unit_again(first, tmp_path):
    place, log = str(tmp_path / "set"), tmp_path / "sampled.log"
    settings = [HOT, "generate.unit_rows=3"]
    command = [sys.executable, "-c", DRIVER, str(first), place, str(log), *settings]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    wait_for_units(place, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    staged = storage.list_files(f"{place}/_staging/units")
    done = {row for name in staged for row in units.read_unit(f"{place}/_staging/units/{name}")["id"].to_pylist()}
    log.write_text("")
    run_extend(first, place, *settings, load=functools.partial(FixedLLM, log=str(log)))
    again = {line.split()[0] for line in log.read_text().splitlines()}
    assert again and not again & done
    generate.run_generate(config_for(first.parent / "rows.jsonl", tmp_path / "at_once", HOT), load=FixedLLM)
    assert repr(rows_by_split(place)) == repr(rows_by_split(str(tmp_path / "at_once")))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["dataset=elsewhere"], r"dataset=elsewhere beside SRC and DST; leave it out"),
        (["generate.extend=elsewhere"], r"generate\.extend=elsewhere beside SRC and DST"),
        (["generate.unit_row=3"], r"the config of SRC=.*set: unknown key generate\.unit_row; did you mean 'unit_rows'"),
    ],
)
def test_an_invalid_setting_is_a_one_line_error(settings, error, tmp_path):
    publish(f"{tmp_path}/set")
    with pytest.raises(UsageError, match=error) as caught:
        extend.read_config(f"{tmp_path}/set", f"{tmp_path}/new", settings)
    assert "\n" not in str(caught.value)


def test_a_missing_set_and_a_set_that_contains_the_destination_are_refused(tmp_path):
    with pytest.raises(CappyError, match=f"{tmp_path}/gone is not there"):
        extend.read_config(f"{tmp_path}/gone", f"{tmp_path}/new")
    publish(f"{tmp_path}/set")
    for dst in (f"{tmp_path}/set", f"{tmp_path}/set/new"):
        with pytest.raises(UsageError, match="are the same folder or one is in the other"):
            run_extend(f"{tmp_path}/set", dst)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["set"]


def test_a_recorded_value_without_its_credentials_must_be_given_again(tmp_path):
    publish(f"{tmp_path}/set")
    path = Path(f"{tmp_path}/set/_MANIFEST.json")
    manifest = json.loads(path.read_text())
    manifest["config"]["source"] = {"kind": "files", "path": "https://<redacted>@host/rows.jsonl"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"source\.path of SRC=.* was recorded without its credentials; .*--set source\.path="):
        extend.read_config(f"{tmp_path}/set", f"{tmp_path}/new")
    assert extend.read_config(f"{tmp_path}/set", f"{tmp_path}/new", {"source.path": "rows.jsonl"}).source.path == "rows.jsonl"


def test_a_set_of_a_log_is_refused(tmp_path):
    publish(f"{tmp_path}/set")
    path = Path(f"{tmp_path}/set/_MANIFEST.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lineage": {"log": "s3://bucket/log"}}))
    with pytest.raises(UsageError, match=r"generate\.extend=.*set was made from a log of serve"):
        prepare(f"{tmp_path}/set", f"{tmp_path}/new")


def test_a_row_whose_new_labels_fail_keeps_its_labelled_candidates():
    config = load(None, ["generate.label.metric=tests.generation.user_labels:fails_on_three", DECODINGS])
    drawn = {"response": "new", "decoding": "greedy", "tokens": 1, "finish_reason": "stop", "logprob": -1.0}
    kept = [
        {**drawn, "response": name, "decoding": "warm", "model": model, "label": 0.25} for name, model in (("a", "old/llm"), ("b", None))
    ]
    row = {"dataset": "d", "template": None, "references": ["x"], "answer_choices": None, "mismatched": [], "error": None, "reused": kept}
    rows = [{**row, "id": f"{n}", "instruction": f"say {n}", "sampled": [drawn]} for n in (3, 4)]
    rows.append({**rows[0], "id": "5", "instruction": "say 5", "sampled": [], "error": "too long"})
    found, letters = units.label_rows(rows, config)
    assert [json.loads(letter)["where"] for letter in letters] == ["5", "3"]
    own = config.sampler.model
    expected = {"3": [("b", own, 0.25), ("a", "old/llm", 0.25)], "4": [("new", own, 0.5), ("b", own, 0.25), ("a", "old/llm", 0.25)]}
    expected["5"] = expected["3"]
    assert {each["id"]: [(one["response"], one["model"], one["label"]) for one in sampled(each)] for each in found} == expected
