"""The Grafana dashboard in docs/ asks for what /metrics tells, and for nothing else."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.best_of_n import Pool
from serving.prometheus import Metrics

BOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
# What Prometheus itself adds to each metric.
OF_THE_SCRAPE = {"job", "instance"}


@pytest.fixture(scope="module")
def told():
    """The labels of each metric at /metrics, once everything there is to count has happened."""
    metrics = Metrics()
    metrics.count_request("/v1/chat/completions", 200)
    metrics.observe_seconds("total", 1.0)
    metrics.observe_pool(Pool(stop_reason="candidates"))
    metrics.count_fallback("first")
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_metric_and_label_of_the_dashboard_is_told_by_the_gateway(expression, told):
    metrics = re.findall(r"cappy_\w+", expression)
    labels = set(re.findall(r"(\w+)=~?\"", expression))
    labels |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
    assert metrics and set(metrics) <= set(told)
    assert all(labels - OF_THE_SCRAPE <= told[metric] for metric in metrics)


def test_the_dashboard_shows_all_that_is_told(told):
    shown = {name for expression in EXPRESSIONS for name in re.findall(r"cappy_\w+", expression)}
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in told}
    assert families == {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown}


def test_the_dashboard_can_be_imported_with_any_prometheus():
    assert [each["name"] for each in BOARD["templating"]["list"]] == ["datasource", "job"]
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"]} == {"${datasource}"}
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert BOARD["title"] and BOARD["schemaVersion"] and len(set(numbers)) == len(numbers)
    # None lies on another.
    cells = [
        (place["x"] + across, place["y"] + down)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for across in range(place["w"])
        for down in range(place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(across for across, _ in cells) < 24
