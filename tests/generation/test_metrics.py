import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import GenerateConfig
from cluster.errors import UsageError
from generation import metrics
from tests.conftest import free_port

UNIT = {"unit": "train-000000", "rows": 7, "candidates": 119, "tokens": 357, "cost": 0.25, "dead_letters": 1}


def test_prometheus_reads_how_far_the_run_is_and_the_port_is_free_afterwards():
    config = GenerateConfig(metrics_port=free_port())
    for _ in range(2):
        with metrics.exposed(config, total=60, done=14) as told:
            told.add(UNIT)
            told.add(UNIT)
            text = httpx.get(f"http://127.0.0.1:{config.metrics_port}/metrics").text
            with pytest.raises(UsageError, match=rf"generate.metrics_port={config.metrics_port} is in use on 127.0.0.1; choose another"):
                metrics.exposed(config, total=1, done=0).__enter__()
        values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
        assert {name.removeprefix("cappy_generate_"): value for name, value in values.items() if not name.endswith("_created")} == {
            **{"instructions": 60, "instructions_done": 28, "candidates_total": 238, "tokens_total": 714},
            **{"dollars_total": 0.5, "dead_letters_total": 2},
        }


def test_an_address_that_is_not_this_machines_is_refused():
    config = GenerateConfig(metrics_port=free_port(), metrics_host="192.0.2.1")
    with pytest.raises(UsageError, match=r"generate.metrics_host=192\.0\.2\.1: "):
        metrics.exposed(config, total=1, done=0).__enter__()
