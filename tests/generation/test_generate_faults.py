"""`cappy generate` with a faulty connection to S3: the set is the same, or it is not published."""

import json
import os

import pytest

from cluster import artifacts, storage
from cluster.config import load
from cluster.runtime import find_cappy_error, ray_session
from generation import generate
from generation.dataset import RegressionSet
from tests.faults import KINDS, FaultyProxy
from tests.generation.fixed_llm import FixedLLM

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_ray")]
ROWS = 60


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"say {n}", "references": [f"number {n}"], "dataset": "ab"[n % 2]} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"source={{kind: files, path: '{path}'}}"


def rows_by_split(uri):
    opened = RegressionSet(uri)
    assert artifacts.verify(uri, opened.manifest) == []
    return repr({split: opened.to_pandas(split).to_dict("records") for split in ("train", "validation")})


@pytest.mark.full
def test_with_a_faulty_connection_to_s3_the_set_is_the_same_or_is_not_published(source, bucket, tmp_path, monkeypatch):
    sound = os.environ["AWS_ENDPOINT_URL"]
    with FaultyProxy(sound, KINDS, rate=0.25) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with ray_session():
            generate_through(proxy, sound, f"{bucket}/all", source, monkeypatch)
            proxy.kinds, proxy.rate = ("unavailable",), 0.3
            generate_through(proxy, sound, f"{bucket}/storm", source, monkeypatch)
            generate.run_generate(load(None, [source, f"dataset={tmp_path}/unbroken"]), load=FixedLLM)
    monkeypatch.setenv("AWS_ENDPOINT_URL", sound)
    assert rows_by_split(f"{bucket}/all") == rows_by_split(f"{bucket}/storm") == rows_by_split(f"{tmp_path}/unbroken")


def generate_through(proxy, sound, place, source, monkeypatch):
    """Publish a set through the proxy; repeat the command after each error. Only the last attempt publishes the set."""
    before = proxy.spoiled.total()
    config = load(None, [source, f"dataset={place}", "generate.unit_rows=5"])
    for _ in range(10):
        try:
            generate.run_generate(config, load=FixedLLM)
            break
        except Exception as error:
            print(find_cappy_error(error))
            assert find_cappy_error(error)  # `cappy` prints it as one line, without a traceback
            monkeypatch.setenv("AWS_ENDPOINT_URL", sound)
            assert not storage.exists(f"{place}/{artifacts.MANIFEST}")
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    assert proxy.spoiled.total() - before > 10
