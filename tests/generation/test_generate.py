import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import artifacts, lease, storage
from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation import annotate, generate, units
from generation.dataset import RegressionSet
from generation.labels import rouge_l
from tests.generation.engine_process import ProcessLLM
from tests.generation.fixed_llm import FixedLLM

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS = 60
both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


def write_rows(path):
    good = [{"instruction": f"say {n}", "references": [f"number {n}"], "dataset": "ab"[n % 2]} for n in range(ROWS)]
    bad = [{"instruction": "no references"}, {"instruction": "TOO LONG", "references": ["x"], "split": "train"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good[:30], *bad, *good[30:]]))
    return path


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


def config_for(rows, place, *overrides):
    return load(None, [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=7", *overrides])


def rows_by_split(uri):
    opened = RegressionSet(uri)
    return {split: opened.to_pandas(split).to_dict("records") for split in ("train", "validation")}


@pytest.fixture(scope="module")
def unbroken(ray_here, tmp_path_factory):
    """Return the set of a run without interruptions, and its summary."""
    folder = tmp_path_factory.mktemp("unbroken")
    summary = generate.run_generate(config_for(write_rows(folder / "rows.jsonl"), folder / "set"), load=FixedLLM)
    return str(folder / "set"), summary


def test_the_published_set_is_complete_labelled_and_counted(unbroken):
    uri, summary = unbroken
    assert summary["instructions"] == ROWS and summary["dead_letters"] == 2
    opened = RegressionSet(uri)
    assert artifacts.verify(opened.uri, opened.manifest) == []
    seen = 0
    for split in ("train", "validation"):
        for table in opened.batches(split, 16):
            for row in table.to_pylist():
                seen += 1
                for each in row["candidates"]:
                    if each["source"] == "sampled":
                        assert each["label"] == rouge_l(each["response"], row["references"])
                    else:
                        assert each["label"] == {"reference": 1.0, "mismatched": 0.0}[each["source"]]
                assert sum(each["source"] == "sampled" for each in row["candidates"]) == 17
    assert seen == ROWS and sum(summary["labels"]) == summary["pairs"] == ROWS * (17 + 2)
    letters = [json.loads(line) for line in Path(uri, "dead_letters.jsonl").read_text().splitlines()]
    assert [(letter["stage"], letter["reason"][:24]) for letter in letters] == [
        ("read", "`references` is missing;"),
        ("sample", "the prompt has 9000 toke"),
    ]
    assert {path.name for path in Path(uri).iterdir()} == {
        *("data", "dead_letters.jsonl", "config.yaml", "README.md", "labels.svg", "decontamination.json"),
        artifacts.MANIFEST,
    }


@both
def test_the_order_and_size_of_the_units_do_not_change_the_set(rows, place, unbroken):
    # `unit_rows` and `replicas` change the order and the size of the work, not the result.
    generate.run_generate(config_for(rows, place, "generate.unit_rows=64", "sampler.replicas=2"), load=FixedLLM)
    assert repr(rows_by_split(place)) == repr(rows_by_split(unbroken[0]))


def test_a_finished_set_is_only_overwritten_with_overwrite(unbroken, tmp_path):
    config = config_for(write_rows(tmp_path / "rows.jsonl"), unbroken[0])
    before = repr(rows_by_split(unbroken[0]))
    with pytest.raises(UsageError, match=r"dataset=.*already holds a finished run; choose another"):
        generate.run_generate(config, load=FixedLLM)
    assert generate.run_generate(config, overwrite=True, load=FixedLLM)["instructions"] == ROWS
    assert repr(rows_by_split(unbroken[0])) == before


@both
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["README.md", "data/thesis.txt", "data/train/part.csv", "_staging/thesis.txt", "thesis.txt"])
def test_a_folder_with_foreign_files_is_refused_and_unchanged(rows, place, name, overwrite):
    storage.write_bytes(f"{place}/{name}", b"theirs")
    if name == "thesis.txt" and not overwrite:
        return  # without --overwrite a set may share its folder with other files
    with pytest.raises(
        UsageError, match=rf"dataset={place} holds files that no `cappy generate` wrote, e\.g\. {name}; nothing was deleted"
    ):
        generate.run_generate(config_for(rows, place), overwrite=overwrite, load=FixedLLM)
    assert storage.list_files(place) == {name: 6}


def test_a_bucket_with_foreign_files_is_not_overwritten(rows, bucket):
    storage.write_bytes(f"{bucket}/photos/cat.jpg", b"theirs")
    with pytest.raises(UsageError, match=rf"dataset={bucket} holds files .*photos/cat.jpg.*choose another dataset, or move them away"):
        generate.run_generate(config_for(rows, bucket), overwrite=True, load=FixedLLM)
    assert storage.list_files(bucket) == {"photos/cat.jpg": 6}


def test_a_finished_set_with_a_foreign_file_is_not_overwritten(unbroken, rows, tmp_path):
    copy = tmp_path / "copy"
    storage.download_folder(unbroken[0], copy)
    for name in ("thesis.txt", "data/train/mine.parquet"):
        storage.write_bytes(f"{copy}/{name}", b"theirs")
        before = storage.list_files(str(copy))
        with pytest.raises(UsageError, match=rf"holds files that no `cappy generate` wrote, e\.g\. {name}"):
            generate.run_generate(config_for(rows, copy), overwrite=True, load=FixedLLM)
        assert storage.list_files(str(copy)) == before
        storage.delete(f"{copy}/{name}")


DRIVER = """
import functools, sys
from cluster.config import load
from cluster.errors import CappyError
from generation import generate
from tests.generation.fixed_llm import FixedLLM
overrides, log = sys.argv[1:-1], sys.argv[-1]
try:
    generate.run_generate(load(None, overrides), load=functools.partial(FixedLLM, delay_s=1, log=log))
except CappyError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def launch(overrides, log):
    """Start a driver in a separate process; a request to its LLM takes one second."""
    command = [sys.executable, "-c", DRIVER, *overrides, str(log)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True, stdout=subprocess.PIPE, text=True)


def wait_for_units(place, driver, count=3):
    deadline = time.monotonic() + 540
    while len(storage.list_files(f"{place}/_staging/units")) < count:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def saved_ids(place):
    """Return the ids of the rows of all finished units."""
    names = storage.list_files(f"{place}/_staging/units")
    return {row for name in names for row in units.read_unit(f"{place}/_staging/units/{name}")["id"].to_pylist()}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_killed_run_publishes_nothing_and_resumes_without_sampling_finished_units_again(rows, place, tmp_path, unbroken):
    overrides = [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=5"]
    log = tmp_path / "sampled.log"
    driver = launch(overrides, log)
    wait_for_units(place, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    done = saved_ids(place)
    assert 15 <= len(done) < ROWS
    with pytest.raises(CappyError, match="did not finish"):
        RegressionSet(place)

    log.write_text("")
    summary = generate.run_generate(load(None, overrides), load=functools.partial(FixedLLM, log=str(log)))
    assert summary["instructions"] == ROWS
    again = {line.split()[0] for line in log.read_text().splitlines()}
    assert again and not again & done
    assert repr(rows_by_split(place)) == repr(rows_by_split(unbroken[0]))


@pytest.mark.full
@pytest.mark.slow
def test_on_sigterm_the_units_in_progress_are_finished_and_the_same_command_resumes(rows, tmp_path, unbroken):
    place = str(tmp_path / "set")
    overrides = [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=5"]
    log = tmp_path / "sampled.log"
    driver = launch(overrides, log)
    wait_for_units(place, driver)
    driver.terminate()
    assert "stopped on SIGTERM; " in driver.communicate(timeout=60)[0] and driver.returncode == 143
    # Every started unit was saved, so no paid sample is sampled again.
    assert {line.split()[0] for line in log.read_text().splitlines()} == saved_ids(place)
    log.write_text("")
    generate.run_generate(load(None, overrides), load=functools.partial(FixedLLM, log=str(log)))
    assert log.read_text()
    assert repr(rows_by_split(place)) == repr(rows_by_split(unbroken[0]))


def test_a_started_run_is_not_resumed_with_other_settings(rows, tmp_path):
    staging = f"{tmp_path}/set/_staging"
    generate._claim_destination(staging, config_for(rows, tmp_path / "set"))
    storage.write_json(f"{staging}/prepared.json", {})
    with pytest.raises(UsageError, match=r"was started with other settings \(seed: 20261121 -> 5\)"):
        generate.run_generate(config_for(rows, tmp_path / "set", "seed=5"), load=FixedLLM)


def test_a_run_whose_source_cannot_be_read_does_not_block_the_destination(rows, tmp_path):
    with pytest.raises(UsageError, match=r"no \.jsonl"):
        generate.run_generate(config_for(tmp_path / "tpyo.jsonl", tmp_path / "set"), load=FixedLLM)
    assert generate.run_generate(config_for(rows, tmp_path / "set"), load=FixedLLM)["instructions"] == ROWS


class QuietLLM(FixedLLM):
    """Gives an empty response to each instruction whose number is not a multiple of `every`."""

    def __init__(self, config, every):
        super().__init__(config)
        self.every = every

    async def sample(self, token_ids, decoding, seed, request_id):
        number = int(bytes(token_ids).decode().split()[-1])
        pool = await super().sample(token_ids, decoding, seed, request_id)
        return pool if number % self.every == 0 else [{**each, "response": ""} for each in pool]


def test_a_run_of_empty_responses_ends_with_an_error_and_a_smaller_share_is_counted(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"say {n}", "references": [f"number {n}"]}) + "\n" for n in range(ROWS)))
    config = config_for(path, tmp_path / "set", "sampler.decodings=[{name: greedy, temperature: 0}]")
    with pytest.raises(CappyError, match=r"40 of 60 sampled responses are empty, above sampler\.max_empty_share=0\.5"):
        generate.run_generate(config, load=functools.partial(QuietLLM, every=3))
    assert not (tmp_path / "set" / "_MANIFEST.json").exists()
    # Saved units are not sampled again, so a higher limit publishes the same responses.
    higher = config_for(path, tmp_path / "set", "sampler.decodings=[{name: greedy, temperature: 0}]", "sampler.max_empty_share=0.7")
    assert generate.run_generate(higher, load=FixedLLM)["empty_responses"] == 40
    assert "40 of 60 sampled responses are empty and have a low label" in capsys.readouterr().err
    assert "40 sampled responses are empty" in (tmp_path / "set" / "README.md").read_text()


class LongestLLM(FixedLLM):
    """Gives responses with the largest number of tokens that a decoding allows."""

    async def sample(self, token_ids, decoding, seed, request_id):
        return [{**each, "tokens": decoding.max_tokens} for each in await super().sample(token_ids, decoding, seed, request_id)]


def test_references_limit_the_tokens_of_each_dataset_and_the_manifest_and_the_card_have_the_limits(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"instruction": f"say {n}", "references": ["long " * 8 if n % 2 else "short"], "dataset": ("short", "long")[n % 2]}
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decodings = "sampler.decodings=[{name: greedy, temperature: 0, max_tokens: 20}]"
    config = config_for(path, tmp_path / "set", decodings, "sampler.max_tokens_from=references")
    generate.run_generate(config, load=LongestLLM)
    opened = RegressionSet(str(tmp_path / "set"))
    assert opened.manifest["max_tokens"] == {"long": math.ceil(40 / 3) + 8, "short": math.ceil(5 / 3) + 8}
    frame = opened.to_pandas("train")
    sampled = frame.candidates.map(lambda pool: {each["tokens"] for each in pool if each["source"] == "sampled"})
    assert all(tokens == {10 if name == "short" else 20} for name, tokens in zip(frame.dataset, sampled, strict=True))
    assert "decide it (10 to 22 tokens" in (tmp_path / "set" / "README.md").read_text()
    annotate.run_annotate(load(None, ["generate.label.metric=exact_match"]), src=str(tmp_path / "set"), dst=str(tmp_path / "again"))
    assert RegressionSet(str(tmp_path / "again")).manifest["max_tokens"] == opened.manifest["max_tokens"]


def test_too_many_failures_stop_the_run_before_it_publishes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"FAILS {n}", "references": ["x"]}) + "\n" for n in range(9)))
    with pytest.raises(CappyError, match=r"9 of 9 rows failed, above generate.max_error_rate=0.5"):
        generate.run_generate(config_for(path, tmp_path / "set", "sampler.max_attempts=1"), load=FixedLLM)
    with pytest.raises(CappyError, match="did not finish"):
        RegressionSet(str(tmp_path / "set"))


def test_an_llm_that_cannot_be_loaded_is_a_one_line_error(rows, tmp_path):
    from cappy import jobs

    config = config_for(rows, tmp_path / "set", f"sampler.model={tmp_path}")
    with pytest.raises(CappyError, match=r"sampler.model=.*has no config.json"):
        jobs.run_verb("generate", config)


# A run that sends SIGSTOP to itself before a step, which simulates a suspended machine.
STOPPED = """
import os, signal, sys
from cluster.config import load
from cluster.errors import CappyError
from cluster.runtime import find_cappy_error
from generation import dataset_card, generate
from tests.generation.fixed_llm import FixedLLM
stop_before, *overrides = sys.argv[1:]
module, name = {"merge": (generate, "_merge"), "card": (dataset_card, "write_card")}[stop_before]
function = getattr(module, name)

def stop_first(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP)
    return function(*arguments)

setattr(module, name, stop_first)
try:
    generate.run_generate(load(None, overrides), load=FixedLLM)
except CappyError as error:
    print(find_cappy_error(error), flush=True)
    sys.exit(error.exit_code)
"""


def wait_one_second(place, setting, wait=lease._wait_until_ended):
    """Wait for the end of another run with a lease timeout of one second; no other limit changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "TIMEOUT_S", 1.0)
        wait(place, setting)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "stop_before"), [("s3", "merge"), ("disk", "card")], indirect=["place"])
def test_a_suspended_run_does_not_change_the_set_of_the_run_that_took_over(place, stop_before, rows, monkeypatch):
    overrides = [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=7"]
    driver = subprocess.Popen(
        [sys.executable, "-c", STOPPED, stop_before, *overrides], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    try:
        os.waitid(os.P_PID, driver.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # after its last unit
        assert psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED
        monkeypatch.setattr(lease, "_wait_until_ended", wait_one_second)
        assert generate.run_generate(load(None, overrides), load=FixedLLM)["instructions"] == ROWS
        before = storage.read_json(f"{place}/{artifacts.MANIFEST}")
        driver.send_signal(signal.SIGCONT)
        output = driver.communicate()[0]
    finally:
        driver.kill()
    manifest = storage.read_json(f"{place}/{artifacts.MANIFEST}")
    assert manifest == before and artifacts.verify(place, manifest) == []
    assert set(storage.list_files(place)) == {*manifest["files"], artifacts.MANIFEST}
    listed = {uri.removeprefix(f"{place}/") for uri in storage.glob(f"{place}/data/*/*.parquet")}
    assert listed == {name for name in manifest["files"] if name.startswith("data/")}
    assert driver.returncode == 1
    assert output.startswith(f"dataset={place}: lease lost: another run took over") and output.count("\n") == 1


@both
def test_unpublished_shards_of_earlier_runs_are_removed(place, rows):
    superseded = ["data/train/part-00000.parquet", "data/train/part-00007-0123abcd.parquet", "data/validation/part-00000-0123abcd.parquet"]
    for name in superseded:
        storage.write_bytes(f"{place}/{name}", b"left")
    storage.write_bytes(f"{place}/_staging/letters/train-part-00000.parquet.jsonl", b"")
    generate.run_generate(config_for(rows, place), load=FixedLLM)
    manifest = RegressionSet(place).manifest
    assert set(storage.list_files(place)) == {*manifest["files"], artifacts.MANIFEST}
    assert not set(superseded) & manifest["files"].keys()


def test_foreign_files_among_the_shards_are_refused_before_sampling(tmp_path, rows):
    storage.write_bytes(f"{tmp_path}/set/data/train/mine.parquet", b"mine")
    with pytest.raises(UsageError, match=r"dataset=.*/set holds files that no `cappy generate` wrote, e.g. data/train/mine.parquet"):
        generate.run_generate(config_for(rows, tmp_path / "set"), load=FixedLLM)
    assert set(storage.list_files(f"{tmp_path}/set/data")) == {"train/mine.parquet"}


def test_shard_names_have_the_run_id_and_the_manifest_lists_them(unbroken):
    uri, _ = unbroken
    opened = RegressionSet(uri)
    names = [name for name in opened.manifest["files"] if name.startswith("data/")]
    assert all(re.fullmatch(r"data/(train|validation)/part-\d{5}-[0-9a-f]{8}\.parquet", name) for name in names)
    assert sorted(storage.glob(f"{uri}/data/*/*.parquet")) == sorted(f"{uri}/{name}" for name in names)
    assert [shard for split in ("train", "validation") for shard in opened.shards(split)] == sorted(f"{uri}/{name}" for name in names)


def refuse_to_load(config):
    raise AssertionError("the LLM was loaded")


def test_a_source_of_classification_rows_starts_no_llm(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"is {n} even?", "references": ["yes"], "answer_choices": ["yes", "no"]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    summary = generate.run_generate(config_for(path, tmp_path / "set"), load=refuse_to_load)
    assert summary["sources"] == {"choice": 12, "reference": 12} and summary["merged"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("killer", [True, False], ids=["one row kills the engine", "the engine is killed at random"])
def test_a_run_with_killed_engines_loses_only_the_row_that_kills_them(killer, tmp_path):
    texts = [f"say {n}" for n in range(199)] + (["KILL"] if killer else ["say 199"])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": text, "references": ["x"], "split": "train"}) + "\n" for text in texts))
    config = config_for(path, tmp_path / "set", "generate.unit_rows=32", "sampler.decodings=[{name: greedy, temperature: 0}]")
    plan = () if killer else (20, 90, 150, 155, 240, 333)
    summary = generate.run_generate(config, load=functools.partial(ProcessLLM, log=tmp_path / "log", plan=plan))
    assert (summary["instructions"], summary["dead_letters"]) == ((199, 1) if killer else (200, 0))
    letters = [json.loads(line) for line in (tmp_path / "set" / "dead_letters.jsonl").read_text().splitlines()]
    assert [("ended 2 times" in letter["reason"], "KILL" in letter["row"]) for letter in letters] == [(True, True)] * killer
    assert set(storage.list_files(str(tmp_path / "set"))) == {*RegressionSet(str(tmp_path / "set")).manifest["files"], artifacts.MANIFEST}
