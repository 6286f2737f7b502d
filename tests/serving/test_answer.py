"""`cappy answer` with an LLM and a scorer without weights."""

from __future__ import annotations

import asyncio
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

from cluster import artifacts, storage
from cluster.config import load
from cluster.errors import CappyError, UsageError
from generation.engines.contract import Candidate, request_seed
from serving import answer
from serving.best_of_n import draw_pool
from serving.boosted import BoostedDecoding
from serving.prometheus import Metrics
from serving.sampling_policy import select_decodings
from tests.generation.engine_process import ProcessLLM
from tests.generation.fixed_llm import FixedLLM
from tests.serving.number_scorer import load_number_scorer, score_of
from tests.serving.test_completions_api import request
from training.scorer import Scorer
from training.selection import VARIANTS, Selection, Variant

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS = 24
DECODINGS = "sampler.decodings=[{name: greedy, temperature: 0}, {name: sample, n: 4}]"


def write_rows(path):
    good = [{"prompt": f"say {n}", "key": n, "references": None} for n in range(ROWS)]
    choices = [{"instruction": f"is {n} even?", "answer_choices": ["yes", "no"], "key": n} for n in range(3)]
    bad = [{"text": "no prompt"}, {"prompt": "TOO LONG", "key": 99}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good[:10], *bad, *choices, *good[10:]]))
    return path


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


def config_for(rows, place, *overrides):
    settings = [f"source={{kind: files, path: '{rows}'}}", f"answers_path={place}", "generate.unit_rows=5", DECODINGS]
    return load(None, [*settings, "answer.keep_candidates=true", *overrides])


def run(config, load_llm=FixedLLM, load_scorer=load_number_scorer, **options):
    return answer.run_answer(config, load=load_llm, load_scorer=load_scorer, **options)


def read(uri):
    manifest = artifacts.read_manifest(str(uri), "answers", "answer")
    names = sorted(name for name in manifest["files"] if name.startswith("data/"))
    tables = []
    for name in names:
        fs, path = storage.filesystem(storage.join(str(uri), name))
        tables += pq.read_table(path, filesystem=fs).to_pylist()
    return tables


@pytest.fixture(scope="module")
def unbroken(ray_here, tmp_path_factory):
    """Return the answers of a run without interruptions, and its summary."""
    folder = tmp_path_factory.mktemp("unbroken")
    summary = run(config_for(write_rows(folder / "rows.jsonl"), folder / "answers"))
    return str(folder / "answers"), summary


def test_every_row_has_the_best_candidate_its_own_columns_and_its_counts(unbroken):
    uri, summary = unbroken
    found = read(uri)
    assert [row["key"] for row in found] == [*range(10), *range(3), *range(10, ROWS)]
    for row in found:
        scores = [score_of(row["instruction"], each["response"]) for each in row["candidates"]]
        assert [each["score"] for each in row["candidates"]] == pytest.approx(scores)
        best = scores.index(max(scores))
        assert (row["response"], row["score"]) == (row["candidates"][best]["response"], pytest.approx(scores[best]))
        chosen = ("choices", 2, 0) if row["answer_choices"] else ("score", 5, 15)
        assert (row["selected_by"], row["n_candidates"], row["tokens"], row["abstained"]) == (*chosen, False)
    counts = {"answers": ROWS + 3, "classified": 3, "abstained": 0, "candidates": 5 * ROWS, "tokens": 15 * ROWS, "dead_letters": 2}
    assert counts.items() <= summary.items() and summary["selected_by"] == {"choices": 3, "score": ROWS}
    letters = [json.loads(line) for line in Path(uri, "dead_letters.jsonl").read_text().splitlines()]
    assert [(letter["stage"], letter["reason"][:24]) for letter in letters] == [
        ("read", "`instruction` is missing"),
        ("sample", "the prompt has 9000 toke"),
    ]
    manifest = artifacts.read_manifest(uri, "answers", "answer")
    assert artifacts.verify(uri, manifest) == []
    assert {path.name for path in Path(uri).iterdir()} == {"data", "dead_letters.jsonl", "config.yaml", "README.md", artifacts.MANIFEST}
    assert "| `key` | a column of the source | int64 |" in Path(uri, "README.md").read_text()


@pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
def test_the_size_of_the_units_and_the_number_of_actors_do_not_change_the_answers(rows, place, unbroken):
    run(config_for(rows, place, "generate.unit_rows=64", "answer.scorers=2"))
    assert read(place) == read(unbroken[0])


def refuse_to_load(config):
    raise AssertionError("the model was loaded")


def test_a_source_of_choices_starts_no_llm_and_consensus_starts_no_scorer(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"{n}?", "answer_choices": ["yes", "no"]}) + "\n" for n in range(6)))
    summary = run(config_for(path, tmp_path / "answers"), load_llm=refuse_to_load)
    assert (summary["classified"], summary["candidates"]) == (6, 0)
    path.write_text('{"instruction": "say it"}\n')
    plain = config_for(path, tmp_path / "consensus", "answer.keep_candidates=false", "serving.selection=consensus")
    assert run(plain, load_scorer=refuse_to_load)["selected_by"] == {"consensus": 1}
    (row,) = read(tmp_path / "consensus")
    assert row["score"] is None and row["response"].startswith("number") and "candidates" not in row


@pytest.mark.slow
def test_the_scorer_of_the_package_classifies_rows_with_choices(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Is {n} even?", "answer_choices": ["yes", "no", "maybe"]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(path, tmp_path / "answers", f"workspace={tmp_path}/empty", "serving.scorer_dtype=float32")
    answer.run_answer(config, load=refuse_to_load)
    scorer = Scorer.load("cappy-minilm")
    for row in read(tmp_path / "answers"):
        best = scorer.best(row["instruction"], row["answer_choices"])
        assert row["response"] == best.response and row["score"] == pytest.approx(best.score, abs=1e-4)


def test_a_row_below_min_score_abstains(rows, tmp_path, unbroken):
    before = {row["id"]: row for row in read(unbroken[0])}
    limit = sorted(row["score"] for row in before.values())[6]
    summary = run(config_for(rows, tmp_path / "answers", f"answer.min_score={limit}"))
    assert summary["abstained"] == 6
    for row in read(tmp_path / "answers"):
        assert row["abstained"] == (before[row["id"]]["score"] < limit) == (row["response"] is None)
        assert row["score"] == before[row["id"]]["score"]


@pytest.mark.parametrize("fallback", ["none", "first"])
def test_a_row_that_the_scorer_cannot_score_is_a_dead_letter_or_takes_the_fallback(fallback, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("say 1", "NO SCORE", "say 2")))
    run(config_for(path, tmp_path / "answers", f"serving.fallback={fallback}"))
    found = {row["instruction"]: row for row in read(tmp_path / "answers")}
    letters = [json.loads(line) for line in (tmp_path / "answers" / "dead_letters.jsonl").read_text().splitlines()]
    if fallback == "none":
        assert set(found) == {"say 1", "say 2"}
        assert [letter["reason"] for letter in letters] == ["the scorer failed (RuntimeError: out of memory), and serving.fallback=none"]
    else:
        row = found["NO SCORE"]
        assert not letters and (row["selected_by"], row["score"], row["response"]) == ("first", None, row["candidates"][0]["response"])


def test_a_started_run_is_not_resumed_with_other_settings_and_a_finished_one_is_not_replaced(rows, tmp_path, unbroken):
    place = tmp_path / "answers"
    with pytest.raises(CappyError, match=r"2 of 29 rows failed, above generate\.max_error_rate=0\.05; the reasons are in .*/answers/_stag"):
        run(config_for(rows, place, "generate.max_error_rate=0.05"))
    with pytest.raises(UsageError, match=r"answers_path=.* was started with other settings \(answer\.min_score: null -> 0\.5\)"):
        run(config_for(rows, place, "answer.min_score=0.5"))
    run(config_for(rows, place), load_llm=refuse_to_load)  # the units are finished, so only the merge is left
    assert read(place) == read(unbroken[0])
    with pytest.raises(UsageError, match="already holds a finished run; choose another answers_path"):
        run(config_for(rows, place))
    assert run(config_for(rows, place, "answer.candidates=2"), overwrite=True)["candidates"] == 2 * ROWS


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("answer.candidates=0", "answer.candidates=0"),
        ("answer.scorers=0", "answer.scorers=0"),
        ("answer.scorers=500", "answer.scorers=500 and sampler.replicas=1 need 501 CPU slots, and this machine has"),
        ("scorer_path=/none/scorer", "/none/scorer"),
        ("source.path=/none/rows.jsonl", "/none/rows.jsonl"),
    ],
)
def test_a_bad_setting_is_a_one_line_error_that_names_it(rows, tmp_path, setting, error):
    with pytest.raises(CappyError, match=error) as caught:
        run(config_for(rows, tmp_path / "answers", setting), load_llm=refuse_to_load)
    assert len(str(caught.value).splitlines()) == 1


FITTED = Selection(tuple(Variant(names, tuple(1.0 - 0.3 * n for n in range(len(names))), (0.3,) * len(names)) for names in VARIANTS))


class PoolBackend:
    """A backend of `serve` that gives a known pool for each prompt, and scores as `NumberScorer`."""

    def __init__(self, pools, selection):
        self.pools, self.selection = pools, selection

    async def sample(self, prompt, decodings, seeds, logprobs, on_finished=None):
        return {"candidates": self.pools[prompt[-1]["content"]], "prompt_tokens": 4}

    async def score(self, scorer, instructions, responses):
        scores = [score_of(*pair) for pair in zip(instructions, responses, strict=True)]
        return {"scores": scores, "tokens": [1] * len(scores), **({"selection": self.selection} if self.selection else {})}

    async def ready(self):
        return {"llm": True, "scorer": True}


@pytest.mark.parametrize(
    ("mode", "selection"), [("score", FITTED), ("scorer", FITTED), ("consensus", None)], ids=["score", "fitted", "consensus"]
)
def test_the_picks_are_those_of_serve_from_the_same_pools(mode, selection, rows, tmp_path):
    config = config_for(rows, tmp_path / "answers", f"serving.selection={mode}")
    run(config, load_scorer=functools.partial(load_number_scorer, selection=selection))
    found = [row for row in read(tmp_path / "answers") if not row["answer_choices"]]
    pools = {
        row["instruction"]: [Candidate(**{k: v for k, v in each.items() if k != "score"}) for each in row["candidates"]] for row in found
    }
    served = BoostedDecoding(config, PoolBackend(pools, selection), Metrics(), set())

    async def serve_all():
        return [await serve_one(row["instruction"]) for row in found]

    async def serve_one(prompt):
        asked = request(messages=[{"role": "user", "content": prompt}])
        done = await served.complete(asked, config.serving.scorer_name, select_decodings(asked, config), lambda _: None, early=False)
        return done.choices[0].message.content

    assert [row["response"] for row in found] == asyncio.run(serve_all())
    assert {row["selected_by"] for row in found} == {{"scorer": "fitted"}.get(mode, mode)}


ADAPTIVE = (
    "sampler.decodings=[{name: greedy, temperature: 0}, {name: sample, n: 9}]",
    "serving.adaptive={target_score: 0.8, round_size: 2}",
)


def test_with_early_stopping_each_row_has_the_candidates_that_serve_would_sample(rows, tmp_path):
    config = config_for(rows, tmp_path / "answers", *ADAPTIVE)
    summary = run(config)
    found = read(tmp_path / "answers")
    assert [row["key"] for row in found] == [*range(10), *range(3), *range(10, ROWS)]
    llm = FixedLLM(config.sampler)

    async def draw(row):
        round_ = -1

        async def sample(decodings, seeds, on_finished):
            nonlocal round_
            round_ += 1
            identity = f"{row['id']}.{round_}" if round_ else row["id"]
            drawn = [await llm.sample([], each, request_seed(config.seed, identity, each.name), "") for each in decodings]
            return {"candidates": [each for part in drawn for each in part], "prompt_tokens": 1}

        async def score(responses):
            return {"scores": [score_of(row["instruction"], each) for each in responses], "tokens": [1] * len(responses)}

        rule = config.serving.adaptive
        return await draw_pool(config.sampler.decodings, sample, score, seed=1, n=1, stopping=rule, scorer_timeout_s=9, early=False)

    sizes = set()
    for row in found:
        if row["answer_choices"]:
            continue
        pool = asyncio.run(draw(row))
        assert [each["response"] for each in row["candidates"]] == [each["response"] for each in pool.candidates]
        assert [each["score"] for each in row["candidates"]] == pytest.approx(pool.scores)
        assert (row["n_candidates"], row["tokens"]) == (len(pool.candidates), 3 * len(pool.candidates))
        sizes.add(row["n_candidates"])
    assert min(sizes) < max(sizes) <= 10 and sizes <= {1, 3, 5, 7, 9, 10}
    assert summary["candidates"] == sum(row["n_candidates"] for row in found if not row["answer_choices"])


DRIVER = """
import functools, sys
from cluster.config import load
from cluster.errors import CappyError
from serving import answer
from tests.generation.fixed_llm import FixedLLM
from tests.serving.number_scorer import load_number_scorer
*overrides, delay_s, log = sys.argv[1:]
try:
    llm = functools.partial(FixedLLM, delay_s=float(delay_s), log=log)
    answer.run_answer(load(None, overrides), load=llm, load_scorer=load_number_scorer)
except CappyError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def launch(rows, place, log, *overrides):
    """Start a driver in a separate process. A request to its LLM is slow, so that sampling takes longer than the first scores."""
    config = [f"source={{kind: files, path: '{rows}'}}", f"answers_path={place}", "generate.unit_rows=2", DECODINGS]
    command = [sys.executable, "-c", DRIVER, *config, "answer.keep_candidates=true", *overrides, "1" if overrides else "4", str(log)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True, stdout=subprocess.PIPE, text=True)


def wait_for_units(place, driver, count=3):
    deadline = time.monotonic() + 300
    while len(storage.list_files(f"{place}/_staging/units")) < count:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def sampled_requests(place):
    """Return (row id, round) of all rows of sampled units."""
    from generation import units

    names = storage.list_files(f"{place}/_staging/sampled")
    rows = [row for name in names for row in units.read_unit(f"{place}/_staging/sampled/{name}").to_pylist()]
    drawn = [row for row in rows if row["sampled"]]
    return {f"{row['id']}.{row['round']}" if row.get("round") else row["id"] for row in drawn}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [pytest.param((), marks=pytest.mark.full), ADAPTIVE], ids=["one round", "rounds"])
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_killed_driver_publishes_nothing_and_the_same_command_resumes_without_sampling_twice(place, overrides, rows, tmp_path):
    log = tmp_path / "sampled.log"
    driver = launch(rows, place, log, *overrides)
    wait_for_units(place, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    with pytest.raises(CappyError, match="did not finish"):
        read(place)
    done = sampled_requests(place)
    assert done
    log.write_text("")
    run(config_for(rows, place, "generate.unit_rows=2", *overrides), load_llm=functools.partial(FixedLLM, log=str(log)))
    again = {line.split()[0] for line in log.read_text().splitlines()}
    assert again and not again & done
    whole = tmp_path / "whole"
    run(config_for(rows, whole, "generate.unit_rows=2", *overrides))
    assert read(place) == read(whole)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ADAPTIVE], ids=["one round", "rounds"])
def test_on_sigterm_the_units_in_progress_are_finished_and_the_same_command_resumes(overrides, rows, tmp_path):
    place, log = str(tmp_path / "answers"), tmp_path / "sampled.log"
    driver = launch(rows, place, log, *overrides)
    wait_for_units(place, driver)
    driver.terminate()
    assert "stopped on SIGTERM; " in driver.communicate(timeout=120)[0] and driver.returncode == 143
    # Every started unit was saved, so no paid sample is sampled again.
    assert {line.split()[0] for line in log.read_text().splitlines()} == sampled_requests(place)
    run(config_for(rows, place, "generate.unit_rows=2", *overrides))
    run(config_for(rows, tmp_path / "whole", "generate.unit_rows=2", *overrides))
    assert read(place) == read(tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("overrides", [(), ADAPTIVE], ids=["one round", "rounds"])
def test_killed_scorers_and_engines_do_not_change_the_answers(overrides, rows, tmp_path):
    settings = ("generate.unit_rows=2", *overrides)
    run(config_for(rows, tmp_path / "whole", *settings))
    (tmp_path / "kills").mkdir()
    scorer = functools.partial(load_number_scorer, kill=str(tmp_path / "kills"), kills=10)
    llm = functools.partial(ProcessLLM, log=tmp_path / "log", plan=(9, 30, 41))
    run(config_for(rows, tmp_path / "answers", *settings), load_llm=llm, load_scorer=scorer)
    assert len(list((tmp_path / "kills").iterdir())) == 10
    assert read(tmp_path / "answers") == read(tmp_path / "whole")


class PricedLLM(FixedLLM):
    """An LLM with prices: a request costs 0.1 dollars, and at most 0.2."""

    def max_cost(self, prompt, decoding):
        return 0.2

    def pop_cost(self, request_id):
        return 0.1


@pytest.mark.parametrize("overrides", [(), ADAPTIVE], ids=["one round", "rounds"])
def test_max_cost_stops_the_run_and_the_cost_adds_up_over_resumed_runs(overrides, rows, tmp_path, monkeypatch):
    prices = "price_per_million_prompt: 1, price_per_million_sampled: 1"

    def config(limit):
        engine = f"sampler.engine={{kind: endpoint, base_url: 'http://127.0.0.1:9/v1', max_cost: {limit}, {prices}}}"
        return config_for(rows, tmp_path / "answers", "sampler.model=priced", engine, "generate.unit_rows=2", *overrides)

    with pytest.raises(CappyError, match=r"sampler\.engine\.max_cost=2: the next unit could exceed it, .* raise max_cost and run the same"):
        run(config(2), load_llm=PricedLLM)
    first = len(sampled_requests(f"{tmp_path}/answers"))
    assert first
    log = tmp_path / "log"
    summary = run(config(100), load_llm=functools.partial(PricedLLM, log=str(log)))
    found = read(tmp_path / "answers")
    assert summary["cost"] == pytest.approx(sum(row["cost"] for row in found))
    second = len({line.split()[0] for line in log.read_text().splitlines()})
    rounds = sum((row["n_candidates"] + 2) // 2 if overrides else 2 for row in found if not row["answer_choices"])
    assert second and summary["cost"] == pytest.approx(0.1 * rounds, abs=0.05 * len(found) if overrides else 1e-6)
