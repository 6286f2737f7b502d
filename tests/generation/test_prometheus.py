import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import ports
from cluster.config import GenerateConfig, load
from cluster.errors import CappyError
from generation import generate, prometheus

UNIT = {"unit": "train-000000", "rows": 7, "candidates": 119, "tokens": 357, "cost": 0.25, "dead_letters": 1}


def read_metrics(port):
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    return {name.removeprefix("cappy_generate_"): value for name, value in values.items() if not name.endswith("_created")}


def test_the_endpoint_serves_the_progress_and_frees_its_port():
    config = GenerateConfig(metrics_port=ports.free_port())
    for _ in range(2):
        with prometheus.serve_metrics(config) as progress:
            assert set(read_metrics(config.metrics_port).values()) == {0}
            progress.start(total=60, done=14)
            progress.add(UNIT)
            progress.add(UNIT)
            assert read_metrics(config.metrics_port) == {
                **{"instructions": 60, "instructions_done": 28, "candidates_total": 238, "tokens_total": 714},
                **{"dollars_total": 0.5, "dead_letters_total": 2},
            }


def test_a_port_in_use_is_an_error_before_the_source_is_read(tmp_path):
    config = load(
        None, [f"dataset={tmp_path}/set", "source={kind: files, path: /none.jsonl}", f"generate.metrics_port={ports.free_port()}"]
    )
    with (
        prometheus.serve_metrics(config.generate),
        pytest.raises(CappyError, match=rf"generate\.metrics_port={config.generate.metrics_port} is in use"),
    ):
        generate.run_generate(config)
    assert not (tmp_path / "set").exists()
