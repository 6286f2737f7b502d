import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation import pipeline
from generation.annotate import rouge_l
from generation.dataset import RegressionSet
from tests.generation.fixed_llm import FixedLLM

ROWS = 60
both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def ray_here(s3_server):
    """One embedded Ray for the module; its workers get the S3 server's environment, as those of `cappy` do."""
    from cluster.runtime import ray_session

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        with ray_session():
            yield


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [{"instruction": f"say {n}", "references": [f"number {n}"], "dataset": "ab"[n % 2]} for n in range(ROWS)]
    bad = [{"instruction": "no references"}, {"instruction": "TOO LONG", "references": ["x"], "split": "train"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good[:30], *bad, *good[30:]]))
    return path


def config_for(rows, place, *overrides):
    return load(None, [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=7", *overrides])


def content(uri):
    opened = RegressionSet(uri)
    return {split: opened.to_pandas(split).to_dict("records") for split in ("train", "validation")}


def test_the_published_set_is_complete_labelled_and_counted(rows, tmp_path):
    summary = pipeline.run(config_for(rows, tmp_path / "set"), load=FixedLLM)
    assert summary["instructions"] == ROWS and summary["dead_letters"] == 2
    opened = RegressionSet(str(tmp_path / "set"))
    assert storage.verify(opened.uri, opened.manifest) == []
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
    letters = [json.loads(line) for line in (tmp_path / "set" / "dead_letters.jsonl").read_text().splitlines()]
    assert [(letter["stage"], letter["reason"][:24]) for letter in letters] == [
        ("read", "`references` is missing;"),
        ("sample", "the prompt has 9000 toke"),
    ]
    assert not (tmp_path / "set" / "_staging").exists()


@both
def test_any_order_and_cut_of_the_work_gives_the_same_set(rows, place):
    # `unit_rows` decides only what is saved at once, `shard_mib` only how much a file holds.
    pipeline.run(config_for(rows, f"{place}/a"), load=FixedLLM)
    pipeline.run(config_for(rows, f"{place}/b", "generate.unit_rows=64", "sampler.replicas=2"), load=FixedLLM)
    assert repr(content(f"{place}/a")) == repr(content(f"{place}/b"))


def test_a_finished_set_is_not_overwritten_unless_told(rows, tmp_path):
    config = config_for(rows, tmp_path / "set")
    pipeline.run(config, load=FixedLLM)
    with pytest.raises(UsageError, match=r"dataset=.*already holds a finished run; choose another"):
        pipeline.run(config, load=FixedLLM)
    assert pipeline.run(config, overwrite=True, load=FixedLLM)["instructions"] == ROWS


DRIVER = """
import functools, sys
from cluster.config import load
from generation import pipeline
from tests.generation.fixed_llm import FixedLLM
overrides, log = sys.argv[1:-1], sys.argv[-1]
pipeline.run(load(None, overrides), load=functools.partial(FixedLLM, delay_s=0.25, log=log))
"""


@pytest.mark.slow
@both
def test_killed_midway_it_publishes_nothing_and_goes_on_without_sampling_finished_units_again(rows, place, tmp_path):
    overrides = [f"source={{kind: files, path: '{rows}'}}", f"dataset={place}", "generate.unit_rows=5"]
    log = tmp_path / "sampled.log"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *overrides, str(log)], cwd=Path(__file__).parents[2], start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(storage.list_files(f"{place}/_staging/units")) < 3:
        assert driver.poll() is None
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    finished = storage.list_files(f"{place}/_staging/units")
    assert 3 <= len(finished) < 13
    with pytest.raises(CappyError, match="did not finish"):
        RegressionSet(place)

    done = set()
    for name in finished:
        fs, path = storage.filesystem(f"{place}/_staging/units/{name}")
        done |= set(pq.read_table(path, filesystem=fs)["id"].to_pylist())
    log.write_text("")
    summary = pipeline.run(load(None, overrides), load=functools.partial(FixedLLM, log=str(log)))
    assert summary["instructions"] == ROWS
    again = {line.split()[0] for line in log.read_text().splitlines()}
    assert again and not again & done

    pipeline.run(load(None, [*overrides, f"dataset={place}-unbroken"]), load=FixedLLM)
    assert repr(content(place)) == repr(content(f"{place}-unbroken"))


def test_changed_settings_do_not_go_on_from_a_begun_run(rows, tmp_path):
    config = config_for(rows, tmp_path / "set")
    pipeline._claim(f"{tmp_path}/set/_staging", config)
    with pytest.raises(UsageError, match=r"was begun with other settings \(seed: 20261121 -> 5\)"):
        pipeline.run(config_for(rows, tmp_path / "set", "seed=5"), load=FixedLLM)


def test_too_many_failures_stop_the_run_before_it_publishes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"FAILS {n}", "references": ["x"]}) + "\n" for n in range(9)))
    with pytest.raises(CappyError, match=r"9 of 9 rows failed, above generate.max_error_rate=0.5"):
        pipeline.run(config_for(path, tmp_path / "set", "sampler.max_attempts=1"), load=FixedLLM)
    with pytest.raises(CappyError, match="did not finish"):
        RegressionSet(str(tmp_path / "set"))


def test_units_fill_shards_in_order_up_to_the_limit():
    assert list(pipeline.fill({"a": 4, "b": 4, "c": 9, "d": 1, "e": 1}, 8)) == [["a", "b"], ["c"], ["d", "e"]]


def test_an_llm_that_cannot_load_is_one_clean_error(rows, tmp_path):
    from cluster import jobs

    config = config_for(rows, tmp_path / "set", f"sampler.model={tmp_path}")
    with pytest.raises(CappyError, match=r"sampler.model=.*has no config.json"):
        jobs.submit("generate", config)
