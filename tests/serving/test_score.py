"""`cappy score` on files: with a scorer without weights, and with a small random encoder that is killed and resumed."""

from __future__ import annotations

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

import cappy
from cluster import artifacts, storage
from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation import units
from serving import score
from tests.conftest import CAPPY
from tests.serving.number_scorer import load_number_scorer, score_of

pytestmark = pytest.mark.usefixtures("ray_here")
PAIRS = 40
INSTRUCTIONS = 8


def write_pairs(path):
    """Write `PAIRS` pairs, of which the last ten repeat the first ten, a row without a pair, and a pair that cannot be scored."""
    good = [{"prompt": f"say {n % INSTRUCTIONS}", "completion": f"it {n % 30}", "key": n} for n in range(PAIRS)]
    bad = [{"text": "no pair"}, {"prompt": "NO SCORE", "completion": "x", "key": -1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good[:13], *bad, *good[13:]]))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


def run(source, place, *overrides, load_scorer=load_number_scorer, **options):
    config = load(None, ["score.unit_rows=6", "score.scorers=1", "scorer_path=cappy-minilm", *overrides])
    return score.run_score(config, src=str(source), dst=str(place), load_scorer=load_scorer, **options)


def read(uri):
    manifest = artifacts.read_manifest(str(uri), "scores", "score")
    rows = []
    for name in sorted(name for name in manifest["files"] if name.startswith("data/")):
        fs, path = storage.filesystem(storage.join(str(uri), name))
        rows += pq.read_table(path, filesystem=fs).to_pylist()
    return rows


def expected_rows():
    pairs = [(n, f"say {n % INSTRUCTIONS}", f"it {n % 30}") for n in range(PAIRS)]
    return [(n, prompt, response, pytest.approx(score_of(prompt, response))) for n, prompt, response in pairs]


def kept(rows):
    return [(row["key"], row["instruction"], row["response"], row["score"]) for row in rows]


@pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
def test_every_pair_has_its_score_and_its_columns_and_a_bad_row_is_a_dead_letter(source, place):
    summary = run(source, place, "generate.max_error_rate=0.1")
    rows = read(place)
    assert kept(rows) == expected_rows()
    assert len({row["id"] for row in rows}) == PAIRS and all(row["logit"] == row["score"] for row in rows)
    counts = {"pairs": PAIRS, "rows": PAIRS, "dead_letters": 2, "dropped": {"below": 0, "ranked_out": 0}}
    assert counts.items() <= summary.items() and sum(summary["scores"]["bins"]) == PAIRS
    letters = [json.loads(line) for line in storage.read_bytes(f"{place}/dead_letters.jsonl").decode().splitlines()]
    assert [(letter["stage"], letter["reason"][:38]) for letter in letters] == [
        ("read", "the row has no columns of a pair; it h"),
        ("score", "the scorer failed (RuntimeError: out o"),
    ]
    manifest = artifacts.read_manifest(place, "scores", "score")
    assert artifacts.verify(place, manifest) == []
    others = {name for name in storage.list_files(place) if not name.startswith("data/")}
    assert others == {"dead_letters.jsonl", "config.yaml", "README.md", "scores.svg", artifacts.MANIFEST}
    card = storage.read_bytes(f"{place}/README.md").decode()
    assert "| `key` | a column of the source | int64 |" in card and "40 rows." in card


def test_filters_can_change_on_resume_and_an_empty_result_names_the_largest_score(source, tmp_path):
    place = tmp_path / "scores"
    with pytest.raises(UsageError, match=r"--keep-above=1\.5 drops all 40 pairs, whose largest score is about 0\.9\d*; run the command"):
        run(source, place, "score.keep_above=1.5")

    def refuse_to_load(config):
        raise AssertionError("the scorer was loaded")

    with pytest.raises(UsageError, match=r"DST=.* was started with other settings \(unit_rows: 6 -> 7\)"):
        run(source, place, "score.unit_rows=7")
    summary = run(source, place, "score.keep_above=0.5", "score.top_per_instruction=1", load_scorer=refuse_to_load)
    best = {}
    for row in expected_rows():
        value = score_of(*row[1:3])
        if value >= 0.5 and value > best.get(row[1], (0.0, None))[0]:
            best[row[1]] = (value, row)
    assert kept(read(place)) == sorted(row for _, row in best.values())
    below = sum(score_of(*row[1:3]) < 0.5 for row in expected_rows())
    assert summary["dropped"] == {"below": below, "ranked_out": PAIRS - below - len(best)} and summary["rows"] == len(best)
    with pytest.raises(UsageError, match="already holds a finished run; choose another DST"):
        run(source, place)
    assert run(source, place, overwrite=True)["rows"] == PAIRS


def test_a_run_resumes_if_the_glob_of_its_source_matches_its_own_files(source, tmp_path):
    place = tmp_path / "scores"
    with pytest.raises(UsageError, match=r"--keep-above=1\.5 drops all 40 pairs"):
        run(tmp_path / "**/*.jsonl", place, "score.keep_above=1.5")
    assert run(tmp_path / "**/*.jsonl", place)["rows"] == PAIRS
    with pytest.raises(UsageError, match=r"DST=.*/scores holds files of SRC=.*; choose a separate folder for DST"):
        run(tmp_path / "**/*.parquet", place, overwrite=True)


def test_scores_are_a_source_of_exports_and_of_further_scores(source, tmp_path):
    run(source, tmp_path / "scores")
    for form, rows in (("dpo", INSTRUCTIONS), ("reward", INSTRUCTIONS), ("ranking", INSTRUCTIONS), ("sft", INSTRUCTIONS)):
        found = cappy.export(f"{tmp_path}/scores", f"{tmp_path}/{form}", form)
        assert (found["rows"], found["by"]) == (rows, "score")
    summary = run(tmp_path / "dpo", tmp_path / "again")
    chosen = {row["instruction"]: row["score"] for row in read(tmp_path / "again") if row["preference"] == "chosen"}
    assert summary["rows"] == 2 * INSTRUCTIONS and len(chosen) == INSTRUCTIONS
    for row in read(tmp_path / "scores"):
        assert row["score"] <= chosen[row["instruction"]]
    assert run(tmp_path / "scores", tmp_path / "third")["rows"] == PAIRS
    assert [row["source_score"] for row in read(tmp_path / "third")] == [row["score"] for row in read(tmp_path / "scores")]


@pytest.mark.parametrize(
    ("place", "setting", "error"),
    [
        ("scores", "score.scorers=500", r"score\.scorers=500 needs 500 CPU slots, and this machine has \d+; lower it"),
        ("scores", "score.prompt=question", r"no row can be scored; .* --prompt=question: the row has no such column; it has prompt, com"),
        ("scores", "generate.max_error_rate=0.01", r"1 of 42 rows failed, above generate\.max_error_rate=0\.01"),
        ("pairs.jsonl", "seed=1", r"SRC=.*pairs\.jsonl are the same folder or one is in the other|DST=.*pairs\.jsonl"),
    ],
)
def test_bad_input_is_a_one_line_error_that_names_it(source, tmp_path, place, setting, error):
    with pytest.raises(CappyError, match=error) as caught:
        run(source, tmp_path / place, setting)
    assert len(str(caught.value).splitlines()) == 1


def scored_pairs(place):
    """Return the pairs of finished units."""
    staging = f"{place}/_staging"
    names = [name.removesuffix(".parquet") for name in storage.list_files(f"{staging}/units")]
    rows = [row for name in names for row in units.read_unit(units.unit_uri(staging, "prepared", name)).to_pylist()]
    return {f"{row['instruction']}\t{row['response']}" for row in rows}


def test_a_killed_scorer_does_not_change_the_scores(source, tmp_path):
    (tmp_path / "kills").mkdir()
    run(source, tmp_path / "scores", load_scorer=functools.partial(load_number_scorer, kill=str(tmp_path / "kills"), kills=3))
    assert len(list((tmp_path / "kills").iterdir())) == 3 and kept(read(tmp_path / "scores")) == expected_rows()


DRIVER = """
import functools, sys
from cluster.config import load
from cluster.errors import CappyError
from serving import score
from tests.serving.number_scorer import load_number_scorer
src, dst, delay_s, *overrides = sys.argv[1:]
try:
    score.run_score(load(None, overrides), src=src, dst=dst, load_scorer=functools.partial(load_number_scorer, delay_s=float(delay_s)))
except CappyError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def wait_for_units(place, driver, count):
    deadline = time.monotonic() + 900
    while len(storage.list_files(f"{place}/_staging/units")) < count:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_on_sigterm_the_unit_in_progress_is_finished_and_no_finished_unit_is_scored_again(source, place, tmp_path):
    overrides = ["score.unit_rows=1", "score.scorers=1", "scorer_path=cappy-minilm"]
    command = [sys.executable, "-c", DRIVER, source, place, "1", *overrides]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True, stdout=subprocess.PIPE, text=True)
    wait_for_units(place, driver, 3)
    driver.terminate()
    told = driver.communicate(timeout=120)[0]
    assert "stopped on SIGTERM; " in told and "of 41 pairs are finished and saved; run the same command again" in told
    assert driver.returncode == 143
    with pytest.raises(CappyError, match="did not finish"):
        read(place)
    done, log = scored_pairs(place), tmp_path / "log"
    run(source, place, "score.unit_rows=1", load_scorer=functools.partial(load_number_scorer, log=str(log)))
    # Repeated pairs are in several units, so a pair of a finished unit can be scored for another unit.
    again = log.read_text().splitlines()
    assert len(done) >= 3 and len(again) + len(done) <= PAIRS + 1
    assert kept(read(place)) == expected_rows()


def tiny_scorer(folder):
    """Save a random encoder of two layers as a scorer, with the tokenizer of MiniLM."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

    from cluster import models
    from training.scorer import Scorer

    tokenizer = AutoTokenizer.from_pretrained(models.resolve("minilm-l6", "encoder"))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=128, initializer_range=0.5, **sizes)
    Scorer(AutoModelForSequenceClassification.from_config(config), tokenizer, 128).save(folder)


@pytest.mark.full
def test_a_killed_run_publishes_nothing_and_resumes_to_the_same_scores_bit_for_bit(tmp_path):
    tiny_scorer(tmp_path / "tiny")
    rows = [{"question": f"what is {'very ' * (n % 40)}{n}?", "answer": f"{n % 7} " * (1 + n % 5), "n": n} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--scorer", f"{tmp_path}/tiny", "--set", "score.unit_rows=5", "--set", "score.scorers=1"]
    command = [*CAPPY, "score", f"{tmp_path}/rows.jsonl", f"{tmp_path}/scores", *options]
    driver = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    wait_for_units(f"{tmp_path}/scores", driver, 5)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = len(storage.list_files(f"{tmp_path}/scores/_staging/units"))
    assert 5 <= before < 80
    with pytest.raises(CappyError, match="did not finish"):
        read(tmp_path / "scores")
    settings = {"score.unit_rows": 5, "score.scorers": 2}
    for name in ("scores", "whole"):
        summary = cappy.score(f"{tmp_path}/rows.jsonl", f"{tmp_path}/{name}", scorer=tmp_path / "tiny", settings=settings)
        assert summary["rows"] == len(rows)
    assert read(tmp_path / "scores") == read(tmp_path / "whole")
    from training.scorer import Scorer

    texts = [(row["instruction"], row["response"]) for row in read(tmp_path / "whole")[:50]]
    direct = Scorer.load(str(tmp_path / "tiny")).score(*map(list, zip(*texts, strict=True)))
    assert [row["logit"] for row in read(tmp_path / "whole")[:50]] == pytest.approx(direct.tolist(), abs=0.02)
