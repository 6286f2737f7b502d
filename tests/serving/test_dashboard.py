"""The Grafana dashboard in docs/ shows exactly the metrics of a gateway."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.best_of_n import Pool
from serving.prometheus import Metrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
# Labels that Prometheus adds to each metric.
SCRAPE_LABELS = {"job", "instance"}


@pytest.fixture(scope="module")
def exposed():
    """Return the labels of each metric at /metrics, after one event of each kind."""
    metrics = Metrics()
    metrics.count_request("/v1/chat/completions", 200)
    metrics.observe_seconds("total", 1.0)
    metrics.observe_pool(Pool(stop_reason="candidates"))
    metrics.count_fallback("first")
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_metric_and_label_of_the_dashboard_is_exposed_by_the_gateway(expression, exposed):
    metrics = re.findall(r"cappy_\w+", expression)
    labels = set(re.findall(r"(\w+)=~?\"", expression))
    labels |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
    assert metrics and set(metrics) <= set(exposed)
    assert all(labels - SCRAPE_LABELS <= exposed[metric] for metric in metrics)


def test_the_dashboard_shows_every_exposed_metric(exposed):
    shown = {name for expression in EXPRESSIONS for name in re.findall(r"cappy_\w+", expression)}
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in exposed}
    assert families == {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown}


def test_the_dashboard_can_be_imported_with_any_prometheus():
    assert [each["name"] for each in DASHBOARD["templating"]["list"]] == ["datasource", "job"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${datasource}"}
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert DASHBOARD["title"] and DASHBOARD["schemaVersion"] and len(set(numbers)) == len(numbers)
    # Panels do not overlap.
    cells = [
        (position["x"] + across, position["y"] + down)
        for position in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for across in range(position["w"])
        for down in range(position["h"])
    ]
    assert len(set(cells)) == len(cells) and max(across for across, _ in cells) < 24
