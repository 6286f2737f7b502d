"""`cappy evaluate` on published sets, with scorers of a few lines."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cappy.display import show_evaluation
from cappy.pipeline_plan import plan_steps
from cappy.pipeline_verbs import Step
from cluster import artifacts, lease, storage
from cluster import config as configs
from cluster.errors import CappyError, UsageError
from evaluation.comparison import NO_SCORER
from evaluation.evaluate import run_evaluate, score_rows
from tests.evaluation.conftest import TASKS, NoisyScorer, candidate, make_rows, publish_set
from training.selection import Selection, Variant


@pytest.fixture
def rows():
    return make_rows()


@pytest.fixture
def published(config, rows):
    publish_set(Path(config.dataset_uri), rows, config)
    return config


def test_evaluate_publishes_numbers_rows_report_and_config(published, rows):
    summary = run_evaluate(published, load=lambda _: NoisyScorer(rows))
    manifest = artifacts.read_manifest(published.evaluation_uri, "evaluation", "evaluate")
    assert set(manifest["files"]) == {"results.json", "rows.parquet", "report.html", "config.yaml"}
    assert artifacts.verify(published.evaluation_uri, manifest) == []
    assert manifest["summary"] == json.loads(json.dumps(summary))
    assert configs.load(Path(published.evaluation_uri) / "config.yaml") == published.model_copy(update={"scorer_path": "cappy-minilm"})
    assert Path(summary["report"]).is_absolute()
    assert Path(summary["report"]).is_file()


def test_without_a_scorer_the_scorer_of_the_package_is_evaluated_and_a_pipeline_keeps_the_result(published, rows):
    loaded = []
    run_evaluate(published, load=lambda config: loaded.append(config.scorer_uri) or NoisyScorer(rows))
    manifest = artifacts.read_manifest(published.evaluation_uri, "evaluation", "evaluate")
    assert loaded == [manifest["inputs"]["scorer"]] == ["cappy-minilm"]
    (planned,) = plan_steps([Step("evaluate", "evaluate", published)])
    assert planned.state == "kept"
    artifacts.publish_folder(published.scorer_uri, "scorer", files={}, summary={}, config=published)
    (planned,) = plan_steps([Step("evaluate", "evaluate", published)])
    assert (planned.state, planned.reasons) == ("changed", ("another version of scorer",))
    run_evaluate(published, overwrite=True, load=lambda config: loaded.append(config.scorer_uri) or NoisyScorer(rows))
    assert loaded[1] == published.scorer_uri


def test_summary_has_every_method_and_task_with_ordered_intervals(published, rows):
    summary = run_evaluate(published, load=lambda _: NoisyScorer(rows))
    assert list(summary["averages"]) == ["greedy", "sample", "self_sum", "self_mean", "consensus", "scorer", "oracle"]
    assert set(summary["per_task"]) == set(TASKS)
    assert summary["instructions"] == len(rows)
    for each in [*summary["averages"].values(), summary["gain"], summary["gap_closed"]]:
        assert each["low"] <= each["mean"] <= each["high"]
    assert summary["averages"]["scorer"]["mean"] > summary["averages"][summary["best_baseline"]]["mean"]


def test_a_perfect_scorer_closes_the_whole_gap_and_the_reverse_closes_none(published, rows):
    perfect = run_evaluate(published, load=lambda _: NoisyScorer(rows, noise=0))
    assert perfect["gap_closed"] == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert perfect["quality"]["pairwise_accuracy"] == pytest.approx(1)

    class Reversed(NoisyScorer):
        def score(self, instructions, responses):
            return -super().score(instructions, responses)

    assert run_evaluate(published, overwrite=True, load=lambda _: Reversed(rows, noise=0))["gap_closed"]["high"] < 0


def test_rows_parquet_holds_the_picks_and_every_candidate_with_its_score(published, rows):
    run_evaluate(published, load=lambda _: NoisyScorer(rows))
    for row in pq.read_table(Path(published.evaluation_uri) / "rows.parquet").to_pylist():
        assert all(each["label"] <= row["rouge_l_oracle"] for each in row["candidates"])
        chosen = [each for each in row["candidates"] if "scorer" in each["picked_by"]]
        assert [each["response"] for each in chosen] == [row["pick_scorer"]]
        assert chosen[0]["score"] == max(each["score"] for each in row["candidates"])
        assert row["references"] == ["right"]
        assert "right" not in [each["response"] for each in row["candidates"]]


def test_two_runs_give_the_same_numbers(published, rows):
    first = run_evaluate(published, load=lambda _: NoisyScorer(rows))
    assert run_evaluate(published, overwrite=True, load=lambda _: NoisyScorer(rows)) == first


def test_a_repeated_response_is_scored_once():
    twice = {
        "instruction": "?",
        "candidates": [candidate("a", 1, "greedy", -1), candidate("a", 1, "hot", -1), candidate("b", 0, "hot", -1)],
    }
    scorer = NoisyScorer([twice])
    scored = score_rows(scorer, [twice])
    assert scorer.calls == [[("?", "a"), ("?", "b")]]
    assert scored[0]["candidates"][0]["score"] == scored[0]["candidates"][1]["score"]


def test_a_score_that_is_not_a_number_stops_the_run_before_it_writes_a_file(published, rows):
    class Broken:
        def score(self, instructions, responses):
            return np.full(len(responses), math.nan)

    with pytest.raises(CappyError, match="scores that are not finite numbers"):
        run_evaluate(published, load=lambda _: Broken())
    assert not storage.exists(published.evaluation_uri)


def test_rows_without_samples_are_skipped_and_counted(config, rows):
    classification = {**rows[0], "id": "c", "candidates": [candidate("yes", 1.0, None, None, source="reference")]}
    publish_set(Path(config.dataset_uri), [*rows, classification], config)
    summary = run_evaluate(config, load=lambda _: NoisyScorer(rows))
    assert summary["skipped"] == {"without_samples": 1, "incomplete": 0}
    assert summary["instructions"] == len(rows)


def test_a_set_without_sampled_candidates_is_refused_with_the_fix(config, rows):
    publish_set(Path(config.dataset_uri), [{**row, "candidates": row["candidates"][:1]} for row in rows], config)
    with pytest.raises(CappyError, match="no sampled candidates in its 36 validation rows"):
        run_evaluate(config, load=lambda _: NoisyScorer(rows))


def test_a_finished_evaluation_is_refused_and_replaced_only_when_the_new_one_is_complete(published, rows):
    run_evaluate(published, load=lambda _: NoisyScorer(rows))
    with pytest.raises(UsageError, match="--overwrite"):
        run_evaluate(published, load=lambda _: NoisyScorer(rows))

    def fail(_):
        raise CappyError("no scorer")

    with pytest.raises(CappyError, match="no scorer"):
        run_evaluate(published, overwrite=True, load=fail)
    artifacts.read_manifest(published.evaluation_uri, "evaluation", "evaluate")


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_with_other_files_is_not_overwritten(published, rows, finished):
    if finished:
        run_evaluate(published, load=lambda _: NoisyScorer(rows))
    name = "thesis.txt" if finished else "config.yaml"
    storage.write_bytes(f"{published.evaluation_uri}/{name}", b"other data")
    before = storage.list_files(published.evaluation_uri)
    for overwrite in (True,) if finished else (False, True):
        with pytest.raises(UsageError, match=rf"evaluation_path=.* holds files that no `cappy evaluate` wrote, e\.g\. {name}"):
            run_evaluate(published, overwrite=overwrite, load=lambda _: NoisyScorer(rows))
    assert storage.list_files(published.evaluation_uri) == before


def test_an_interrupted_evaluation_is_completed_by_the_next_run(published, rows, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "publish_folder", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_evaluate(published, load=lambda _: NoisyScorer(rows))
    assert storage.exists(f"{published.evaluation_uri}/results.json")
    run_evaluate(published, load=lambda _: NoisyScorer(rows))
    assert not storage.exists(f"{published.evaluation_uri}/_staging")


def test_a_dataset_that_is_not_finished_is_refused(config):
    with pytest.raises(CappyError, match="cappy generate"):
        run_evaluate(config, load=lambda _: NoisyScorer([]))


def test_a_set_without_greedy_decoding_is_compared_without_it(config, rows):
    decodings = [each for each in config.sampler.decodings if each.temperature > 0]
    sampled = config.model_copy(update={"sampler": config.sampler.model_copy(update={"decodings": tuple(decodings)})})
    only = [{**row, "candidates": [each for each in row["candidates"] if each["decoding"] != "greedy"]} for row in rows]
    publish_set(Path(config.dataset_uri), only, sampled)
    summary = run_evaluate(config, load=lambda _: NoisyScorer(rows))
    assert list(summary["averages"]) == ["sample", "self_sum", "self_mean", "consensus", "scorer", "oracle"]
    assert "greedy" in printed(summary).split("left out:")[1]


def printed(summary, width=80):
    console = Console(file=io.StringIO(), width=width)
    show_evaluation(summary, console)
    return console.file.getvalue()


def test_the_table_fits_80_columns_and_marks_the_best_method_without_colour(published, rows):
    summary = run_evaluate(published, load=lambda _: NoisyScorer(rows))
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for task in TASKS:
        line = next(line for line in text.splitlines() if line.startswith(task))
        assert line.count("*") >= 1
    assert f"{summary['averages']['scorer']['mean']:.1f}*" in text
    assert "of the oracle gap closed" in " ".join(text.split())


def test_the_gains_of_the_fitted_selection_are_below_a_table_of_80_columns(published, rows):
    scorer = NoisyScorer(rows)
    scorer.selection = Selection((Variant(("score",), (1.0,), (1.0,)), Variant(("consensus",), (1.0,), (1.0,))))
    summary = run_evaluate(published, load=lambda _: scorer)
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 80 and "no_scorer" not in text
    for other, name in ((summary["best_baseline"], summary["best_baseline"].replace("_", " ")), (NO_SCORER, "fitted without scorer")):
        gain = summary["gains"]["fitted"][other]
        assert f"fitted - {name}: {gain['mean']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}] points" in text
    # Without the score it ranks by the consensus alone.
    assert summary["averages"][NO_SCORER] == summary["averages"]["consensus"] != summary["averages"]["fitted"]
    page = Path(summary["report"]).read_text()
    assert "Fitted selection, no scorer" in page and "--plot-fitted_no_scorer: #" in page


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_a_second_evaluation_at_one_destination_is_refused_and_its_files_stay(kind, published, rows, request, monkeypatch):
    place = f"{request.getfixturevalue('bucket')}/evaluation" if kind == "s3" else published.evaluation_uri
    config = published.model_copy(update={"evaluation_path": place})
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)

    class Second(NoisyScorer):
        def score(self, instructions, responses):
            with pytest.raises(CappyError, match=rf"evaluation_path={place}: a run on .* is working there"):
                run_evaluate(config, load=lambda _: NoisyScorer(rows, noise=0))
            return super().score(instructions, responses)

    run_evaluate(config, load=lambda _: Second(rows))
    manifest = artifacts.read_manifest(place, "evaluation", "evaluate")
    assert artifacts.verify(place, manifest) == []
    assert set(storage.list_files(place)) == {*manifest["files"], "_MANIFEST.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_evaluation_that_lost_its_lease_leaves_the_files_of_the_winner(overwrite, published, rows, monkeypatch):
    place = published.evaluation_uri
    if overwrite:
        run_evaluate(published, load=lambda _: NoisyScorer(rows))

    class Paused(NoisyScorer):
        """While it scores, its process is paused, and another run takes the lease and publishes."""

        def score(self, instructions, responses):
            if not self.over:
                self.over = True
                (held,) = storage.list_files(f"{place}/_lease")
                storage.delete(f"{place}/_lease/{held}")
                run_evaluate(published, overwrite=overwrite, load=lambda _: NoisyScorer(rows, noise=0))
                self.files = {name: storage.read_bytes(f"{place}/{name}") for name in storage.list_files(place)}
            return super().score(instructions, responses)

    late = Paused(rows, noise=2)
    late.over = False
    with pytest.raises(CappyError, match="lease lost: another run took over"):
        run_evaluate(published, overwrite=overwrite, load=lambda _: late)
    assert {name: storage.read_bytes(f"{place}/{name}") for name in storage.list_files(place)} == late.files


def test_without_a_set_no_folder_is_left(tmp_path):
    with pytest.raises(CappyError, match="is not there"):
        run_evaluate(configs.load(None, [f"workspace={tmp_path}/none"]))
    assert list(tmp_path.iterdir()) == []
