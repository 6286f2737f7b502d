"""Candidates of earlier sets are reused instead of sampled, by `generate.reuse` and compact candidate files."""

import functools
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation import candidate_file, combine, generate, plan, reuse
from generation.dataset import RegressionSet
from generation.labels import rouge_l
from tests.generation.fixed_llm import FixedLLM

DECODINGS = "sampler.decodings=[{name: greedy, temperature: 0}, {name: warm, n: 3}]"
ROWS = 30


def write_rows(path, count=ROWS):
    rows = [{"instruction": f"say {n}", "references": [f"number {n}"], "dataset": "ab"[n % 2]} for n in range(count)]
    rows += [{"instruction": "yes?", "references": ["yes"], "answer_choices": ["yes", "no"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(rows, place, *overrides):
    return load(None, [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=7", DECODINGS, *overrides])


def sampled(uri):
    """Return the sampled candidates of a set, by row."""
    opened = RegressionSet(str(uri))
    rows = [row for split in opened.manifest["counts"] for table in opened.batches(split) for row in table.to_pylist()]
    return {row["id"]: [each for each in row["candidates"] if each["source"] == "sampled"] for row in rows if row["answer_choices"] is None}


@pytest.fixture(scope="module")
def first(ray_here, tmp_path_factory):
    """Return a set of 30 sampled rows."""
    folder = tmp_path_factory.mktemp("first")
    generate.run_generate(config_for(write_rows(folder / "rows.jsonl"), folder / "set"), load=FixedLLM)
    return folder / "set"


@pytest.fixture(scope="module")
def compact(first):
    candidate_file.write_candidate_file(f"{first.parent}/compact.parquet", [str(first)])
    return first.parent / "compact.parquet"


class OtherLLM(FixedLLM):
    """Gives responses that `FixedLLM` never gives."""

    async def sample(self, token_ids, decoding, seed, request_id):
        found = await super().sample(token_ids, decoding, seed, request_id)
        return [{**each, "response": "other", "tokens": 5} for each in found]


@pytest.mark.parametrize("kind", ["set", "file"])
def test_rows_of_an_earlier_set_are_not_sampled_and_new_rows_are(kind, first, compact, tmp_path, capsys):
    given = first if kind == "set" else compact
    log = tmp_path / "sampled.log"
    config = config_for(write_rows(tmp_path / "rows.jsonl", ROWS + 10), tmp_path / "set", f"generate.reuse=[{given}]")
    summary = generate.run_generate(config, load=functools.partial(OtherLLM, log=str(log)))
    earlier, now = sampled(first), sampled(tmp_path / "set")
    assert len(earlier) == ROWS and len(now) == ROWS + 10
    assert {row_id: now[row_id] for row_id in earlier} == earlier
    new = now.keys() - earlier.keys()
    assert {line.split()[0] for line in log.read_text().splitlines()} == new
    assert {each["response"] for row_id in new for each in now[row_id]} == {"other"}
    assert summary["reused"] == ROWS and summary["sources"]["sampled"] == 4 * (ROWS + 10)
    manifest = RegressionSet(str(tmp_path / "set")).manifest
    counts = {"rows": ROWS, "complete": ROWS, "candidates": 4 * ROWS, "tokens": 3 * 4 * ROWS, "sources": {str(given): ROWS}}
    assert manifest["reused"] == counts
    assert "responses of 30 instructions are from earlier sets" in (tmp_path / "set" / "README.md").read_text()
    error = capsys.readouterr().err
    assert "generate.reuse has the candidates of 30 of 40 rows to sample" in error and "warning: generate.reuse" not in error


def refuse_to_load(config):
    raise AssertionError("no row is sampled")


def test_an_interrupted_run_resumes_with_its_reused_rows_after_their_set_was_deleted(first, tmp_path, monkeypatch):
    given = shutil.copytree(first, tmp_path / "given")
    config = config_for(
        write_rows(tmp_path / "rows.jsonl"), tmp_path / "set", f"generate.reuse=[{given}]", "generate.label.metric=exact_match"
    )

    def fail(*arguments):
        raise CappyError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_sample", fail)
        with pytest.raises(CappyError, match="stopped here"):
            generate.run_generate(config, load=refuse_to_load)
    shutil.rmtree(given)
    summary = generate.run_generate(config, load=refuse_to_load)
    assert summary["reused"] == ROWS
    rates = RegressionSet(str(tmp_path / "set")).manifest["rates"]
    assert rates["tokens_per_second"] == 0
    plain = [[{**each, "label": None} for each in pool] for pool in sampled(first).values()]
    again = sampled(tmp_path / "set")
    assert [[{**each, "label": None} for each in pool] for pool in again.values()] == plain
    assert {each["label"] for pool in again.values() for each in pool} <= {0.0, 1.0}


def test_a_run_that_was_started_without_reuse_is_not_resumed_with_it(first, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    staging = f"{tmp_path}/set/_staging"
    generate._claim_destination(staging, config_for(rows, tmp_path / "set"))
    Path(staging, "prepared.json").write_text("{}")
    with pytest.raises(UsageError, match=r"started with other settings \(generate\.reuse: null -> "):
        generate.run_generate(config_for(rows, tmp_path / "set", f"generate.reuse=[{first}]"), load=FixedLLM)


def test_with_reuse_only_the_rows_without_candidates_are_left_out(compact, tmp_path, capsys):
    overrides = [f"generate.reuse=[{compact}]", "generate.reuse_only=true"]
    config = config_for(write_rows(tmp_path / "rows.jsonl", ROWS + 10), tmp_path / "set", *overrides)
    summary = generate.run_generate(config, load=refuse_to_load)
    assert summary["reused"] == ROWS and summary["instructions"] == ROWS + 1
    assert "generate.reuse_only: 10 rows are left out" in capsys.readouterr().err


def test_only_decodings_with_all_candidates_are_usable():
    config = load(None, [DECODINGS]).sampler
    greedy, warm = {"decoding": "greedy", "response": "g"}, [{"decoding": "warm", "response": str(n)} for n in range(5)]
    assert reuse.select_decodings([*warm, greedy], config) == {"greedy": [greedy], "warm": warm[:3]}
    assert reuse.select_decodings([greedy, *warm[:2]], config) == {"greedy": [greedy]}
    assert reuse.select_decodings(warm, config) == {"warm": warm[:3]}


def test_of_a_row_only_the_decodings_that_the_set_does_not_have_are_sampled(first, tmp_path, capsys):
    log = tmp_path / "sampled.log"
    more = "sampler.decodings=[{name: hot, n: 2, temperature: 1.5}, {name: greedy, temperature: 0}, {name: warm, n: 4}]"
    config = config_for(write_rows(tmp_path / "rows.jsonl"), tmp_path / "set", f"generate.reuse=[{first}]", more)
    summary = generate.run_generate(config, load=functools.partial(OtherLLM, log=str(log)))
    drawn = {tuple(line.split()[:2]) for line in log.read_text().splitlines()}
    now = sampled(tmp_path / "set")
    assert drawn == {(row_id, name) for row_id in now for name in ("hot", "warm")}  # of warm the set has three of four
    for row_id, pool in sampled(first).items():
        assert [each["decoding"] for each in now[row_id]] == ["hot"] * 2 + ["greedy"] + ["warm"] * 4
        assert now[row_id][2] == pool[0] and {each["response"] for each in now[row_id][3:]} == {"other"}
    assert summary["reused"] == ROWS and summary["sources"]["sampled"] == 7 * ROWS
    manifest = RegressionSet(str(tmp_path / "set")).manifest
    assert manifest["reused"] == {"rows": ROWS, "complete": 0, "candidates": ROWS, "tokens": 3 * ROWS, "sources": {str(first): ROWS}}
    assert "has the candidates of 0 of 30 rows to sample, and some of the candidates of 30 rows" in capsys.readouterr().err


def test_two_sets_with_different_decodings_complete_a_row(first, tmp_path):
    config = config_for(write_rows(tmp_path / "rows.jsonl"), tmp_path / "hot", "sampler.decodings=[{name: hot, n: 2, temperature: 1.5}]")
    generate.run_generate(config, load=OtherLLM)
    both = "sampler.decodings=[{name: warm, n: 3}, {name: hot, n: 2, temperature: 1.5}]"
    again = config_for(tmp_path / "rows.jsonl", tmp_path / "both", f"generate.reuse=[{first}, {tmp_path}/hot]", both)
    summary = generate.run_generate(again, load=refuse_to_load)
    assert summary["reused"] == ROWS and summary["decodings"] == {"hot": 2 * ROWS, "warm": 3 * ROWS}


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["sampler.model=other/model"],
            "of a decoding of this run (sampler.model=other/model; 1 of greedy, 3 of warm)",
        ),
        (["sampler.decodings=[{name: cold, n: 2}]"], "has no row with all candidates of a decoding of this run"),
        (["sampler.decodings=[{name: warm, n: 4}]"], "4 of warm); its candidates are of smollm2-135m-instruct; leave it out"),
    ],
)
def test_a_set_without_a_usable_row_is_a_one_line_error(overrides, reason, compact):
    with pytest.raises(UsageError) as caught, reuse.reuse_candidates(load(None, [DECODINGS, f"generate.reuse=[{compact}]", *overrides])):
        pass
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_other_settings_of_the_sampling_are_logged_and_other_lengths_are_not(compact, capsys):
    warm = "sampler.decodings=[{name: greedy, temperature: 0, max_tokens: 9}, {name: warm, n: 2, temperature: 0.5}]"
    with reuse.reuse_candidates(load(None, [warm, f"generate.reuse=[{compact}]", "sampler.prompt.shots=3"])) as found:
        assert found.counts["rows"] == 0
    error = capsys.readouterr().err
    assert "decodings.warm.temperature: 1.0 -> 0.5; prompt.shots: 0 -> 3" in error and "max_tokens" not in error


def test_a_candidate_file_has_no_source_text_and_the_same_bytes_from_the_same_sets(first, compact, tmp_path):
    again = tmp_path / "again.parquet"
    assert candidate_file.write_candidate_file(str(again), [str(first), str(compact)])["candidates"] == 4 * ROWS
    assert again.read_bytes() == compact.read_bytes()
    table = pq.read_table(compact)
    assert table.column_names == ["id", "candidates"] and b"say 1" not in compact.read_bytes()
    opened = candidate_file.open_sampled(str(compact), "SET")
    assert opened.model == "smollm2-135m-instruct" and [each["seed"] for each in opened.settings] == [20261121]
    fields = ("response", "decoding", "tokens", "finish_reason", "logprob")
    assert dict(opened.rows) == {
        row_id: [{name: each[name] for name in fields} for each in pool] for row_id, pool in sampled(first).items()
    }


def test_a_candidate_file_takes_the_finished_units_of_an_interrupted_run(first, tmp_path, monkeypatch):
    config = config_for(write_rows(tmp_path / "rows.jsonl"), tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_merge", lambda *arguments: (_ for _ in ()).throw(CappyError("stopped here")))
        with pytest.raises(CappyError, match="stopped here"):
            generate.run_generate(config, load=FixedLLM)
    counts = candidate_file.write_candidate_file(f"{tmp_path}/part.parquet", [str(tmp_path / "set")])
    assert counts["rows"] == ROWS
    expected = dict(candidate_file.open_sampled(str(first), "SET").rows)
    assert dict(candidate_file.open_sampled(f"{tmp_path}/part.parquet", "SET").rows) == expected


def test_a_damaged_missing_or_foreign_candidate_file_is_a_one_line_error(first, compact, tmp_path):
    damaged = bytearray(compact.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    shard = next((first / "data" / "train").iterdir())
    for path, reason in [
        (tmp_path / "damaged.parquet", "is damaged"),
        (tmp_path / "gone.parquet", "no such file"),
        (shard, "is not a candidate file"),
        (tmp_path / "gone", "is not a published set"),
    ]:
        with pytest.raises(CappyError, match=rf"generate\.reuse={path}.*({reason})") as caught:
            list(candidate_file.open_sampled(str(path), "generate.reuse").rows)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"OUT=.*must end with \.parquet"):
        candidate_file.write_candidate_file(f"{tmp_path}/out", [str(first)])


def test_a_set_of_reused_rows_alone_has_labels_and_reference_limits(first, tmp_path):
    overrides = [f"generate.reuse=[{first}]", "sampler.max_tokens_from=references"]
    config = config_for(write_rows(tmp_path / "rows.jsonl"), tmp_path / "set", *overrides)
    generate.run_generate(config, load=refuse_to_load)
    manifest = RegressionSet(str(tmp_path / "set")).manifest
    assert set(manifest["max_tokens"]) == {"a", "b"} and manifest["reused"]["rows"] == ROWS
    rows = RegressionSet(str(tmp_path / "set")).to_pandas("train")
    for references, pool in zip(rows.references, rows.candidates, strict=True):
        assert all(each["label"] == rouge_l(each["response"], list(references)) for each in pool if each["source"] == "sampled")


def test_the_candidates_of_a_combined_set_are_reused(first, tmp_path):
    rows = [{"instruction": f"tell {n}", "references": [f"number {n}"], "dataset": "c"} for n in range(10)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate.run_generate(config_for(tmp_path / "other.jsonl", tmp_path / "other"), load=FixedLLM)
    combine.run_combine([str(first), f"{tmp_path}/other"], f"{tmp_path}/both")
    (tmp_path / "rows.jsonl").write_text((first.parent / "rows.jsonl").read_text() + (tmp_path / "other.jsonl").read_text())
    config = config_for(tmp_path / "rows.jsonl", tmp_path / "set", f"generate.reuse=[{tmp_path}/both]")
    assert generate.run_generate(config, load=refuse_to_load)["reused"] == ROWS + 10
    assert sampled(tmp_path / "set") == sampled(first) | sampled(tmp_path / "other")


def test_the_plan_has_no_tokens_for_candidates_of_earlier_sets(first, compact, tmp_path):
    def totals(rows, *settings):
        return plan.run_plan(config_for(rows, tmp_path / "set", *settings))["totals"]

    same, more = first.parent / "rows.jsonl", write_rows(tmp_path / "more.jsonl", ROWS + 10)
    plain = totals(same)
    assert plain["candidates"] == 4 * ROWS and plain["reused_candidates"] == 0 and plain["sampled_tokens"]["expected"] > 0
    whole = totals(same, f"generate.reuse=[{compact}]")
    assert whole["reused_candidates"] == 4 * ROWS and whole["pairs"] == plain["pairs"]
    assert whole["prompt_tokens"] == whole["sampled_tokens"]["expected"] == whole["sampled_tokens"]["most"] == 0
    ten_new = totals(more, f"generate.reuse=[{first}]")
    assert ten_new["candidates"] == 4 * (ROWS + 10) and ten_new["reused_candidates"] == 4 * ROWS
    assert ten_new["sampled_tokens"]["most"] == pytest.approx(totals(more)["sampled_tokens"]["most"] / 4, abs=1)
    known = totals(more, f"generate.reuse=[{first}]", "generate.reuse_only=true")
    assert known["sampled_instructions"] == ROWS and known["sampled_tokens"]["most"] == 0
    warmer = totals(same, f"generate.reuse=[{first}]", "sampler.decodings=[{name: greedy, temperature: 0}, {name: warm, n: 7}]")
    assert warmer["candidates"] == 8 * ROWS and warmer["reused_candidates"] == ROWS
    extended = totals(more, f"generate.extend={first}")
    # The row with choices has the name of its file as the dataset, so it is a row of both.
    assert extended["instructions"] == ROWS + 12 and extended["reused_candidates"] == 4 * ROWS
