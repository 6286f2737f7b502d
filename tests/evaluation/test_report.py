"""The HTML report: escaping, completeness, examples, and its layout in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster import storage
from evaluation import report
from evaluation.evaluate import run_evaluate
from tests.evaluation.conftest import TASKS, NoisyScorer, make_rows, publish_set
from tests.serving import browser
from training.selection import Selection, Variant

HOSTILE = "</td><script>alert('out')</script><img src=x onerror=alert(1)> & \"quotes\""


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Return results, rows and page of an evaluation in which the data and the model both contain HTML."""
    from cluster.config import Config

    config = Config.model_validate({"workspace": str(tmp_path_factory.mktemp("run")), "evaluation": {"resamples": 100, "examples": 100}})
    rows = make_rows()
    rows[0]["candidates"][1] |= {"response": HOSTILE}
    rows[1] |= {"instruction": f"What is {HOSTILE}?", "references": [HOSTILE]}
    rows = [{**row, "dataset": "<i>tense</i>" if row["dataset"] == "tense" else row["dataset"]} for row in rows]
    publish_set(Path(config.dataset_uri), rows, config)
    run_evaluate(config, load=lambda _: NoisyScorer(rows))
    folder = Path(config.evaluation_uri)
    return storage.read_json(str(folder / "results.json")), pq.read_table(folder / "rows.parquet"), (folder / "report.html").read_text()


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_loads_nothing_from_outside(evaluation):
    page = evaluation[2]
    for tag, attributes in Tags(page).found:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", page)


def test_text_of_a_model_or_a_data_set_is_not_markup_on_the_page(evaluation):
    page = evaluation[2]
    tags = Tags(page).found
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not any(tag in ("img", "i") and attributes.get("style") is None for tag, attributes in tags)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "&lt;script&gt;alert(" in page


def test_the_page_names_every_task_every_method_and_its_inputs(evaluation):
    results, _, page = evaluation
    text = re.sub(r"<[^>]+>", " ", page)
    for name in (*TASKS[1:], "&lt;i&gt;tense&lt;/i&gt;", "Greedy", "One sample", "Self-score, sum", "Self-score, mean", "Scorer", "Oracle"):
        assert name in text
    for name in ("dataset", "scorer", "command"):
        assert results["made"][name] in text
    assert f"{results['averages']['scorer']['mean']:.1f}" in text


def test_the_page_is_a_function_of_the_published_files(evaluation):
    results, rows, page = evaluation
    assert report.render_report(results, rows, 100) == page


def test_ids_are_unique_within_the_plots_and_every_reference_has_its_target(evaluation):
    page = evaluation[2]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) <= {pair for name in ids for pair in ((name, ""), ("", name))}


def test_examples_mix_wins_losses_and_ties_and_are_drawn_by_seed(evaluation):
    results, rows, _ = evaluation
    chosen = report.choose_examples(rows, results["best_baseline"], 6, seed=1)
    assert [each["outcome"] for each in chosen] == ["win", "loss", "tie"] * 2
    for each in chosen:
        sign = (each["scorer"] > each["baseline"]) - (each["scorer"] < each["baseline"])
        assert {"win": 1, "loss": -1, "tie": 0}[each["outcome"]] == sign
    assert report.choose_examples(rows, results["best_baseline"], 6, seed=1) == chosen
    assert report.choose_examples(rows, results["best_baseline"], 6, seed=2) != chosen


def test_more_examples_than_rows_show_each_row_once(evaluation):
    results, rows, _ = evaluation
    chosen = report.choose_examples(rows, results["best_baseline"], 1000, seed=1)
    assert len(chosen) == rows.num_rows
    assert len({each["instruction"] for each in chosen}) == rows.num_rows


def test_without_examples_the_section_is_left_out(evaluation):
    results, rows, _ = evaluation
    assert "<details" not in report.render_report(results, rows, 0)


def test_an_example_shows_a_repeated_response_once_with_every_method_that_picked_it(evaluation):
    results, rows, _ = evaluation
    for each in report.choose_examples(rows, results["best_baseline"], 1000, seed=1):
        texts = [candidate["response"] for candidate in each["candidates"]]
        assert len(texts) == len(set(texts))
        assert sum(candidate["times"] for candidate in each["candidates"]) == 9
        picks = sorted(pick for candidate in each["candidates"] for pick in candidate["picks"])
        assert picks == sorted(results["methods"])


class BlendedScorer(NoisyScorer):
    logprob_weight = 0.5
    selection = Selection((Variant(("score", "consensus"), (1.0, 1.0), (1.0, 1.0)),))


@pytest.mark.skipif(not browser.INSTALLED, reason="needs chromium and chromedriver")
def test_every_table_and_plot_fits_its_card_at_1200_pixels(tmp_path):
    from cluster.config import Config

    config = Config.model_validate({"workspace": str(tmp_path), "evaluation": {"resamples": 100, "examples": 3}})
    rows = make_rows(4, tasks=(*TASKS, "a_task_with_a_name_that_is_longer_than_most_names"))
    publish_set(Path(config.dataset_uri), rows, config)
    summary = run_evaluate(config, load=lambda _: BlendedScorer(rows))
    assert len(summary["averages"]) == 9
    with browser.chromium() as driver:
        driver.set_window_size(1200, 900)
        driver.get(Path(summary["report"]).as_uri())
        widths = driver.execute_script(
            "return [...document.querySelectorAll('.panel, .inside')].map(each => [each.scrollWidth, each.clientWidth])"
        )
    assert len(widths) >= 8
    assert all(content <= card for content, card in widths), widths
