"""A verb as a Ray job on a running cluster: a `ray start` head on this machine, which gets only its address."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from cappy.jobs import VERBS, load_verb
from cluster import ports, storage
from cluster.config import load, paths
from generation.dataset import RegressionSet
from tests.conftest import cappy

RAY = str(Path(sys.executable).parent / "ray")


def test_the_function_of_every_verb_can_be_imported():
    assert all(callable(load_verb(verb)) for verb in VERBS)


@pytest.fixture(scope="module")
def head(tmp_path_factory, s3_server):
    """A separate head node. The credentials of the store are in its environment, like those of a role on a cluster."""
    port, dashboard, agent = ports.free_port(), ports.free_port(), ports.free_port()
    # Not below pytest's folders: a socket's path may have 107 characters, and Ray adds 70.
    folder = tempfile.mkdtemp(prefix="ray-")
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4"]
    # The job agent runs without a port if another Ray on this machine uses it.
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    command.append(f"--temp-dir={folder}")
    with (tmp_path_factory.mktemp("log") / "head.log").open("w") as log:
        node = subprocess.Popen(
            command,
            env={**os.environ, **s3_server, "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while not _answers(f"{address}/api/version"):
        assert node.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    yield address
    # Its own way to stop takes twenty seconds, for files that go with the folder.
    family = psutil.Process(node.pid).children(recursive=True)
    for each in [psutil.Process(node.pid), *family]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family, 10)
    shutil.rmtree(folder, ignore_errors=True)


def _answers(url):
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.full
@pytest.mark.slow
def test_generate_runs_as_a_job_and_returns_its_result_and_its_errors(head, bucket, tmp_path):
    # Classification rows need no LLM: no request goes to the endpoint, and the job is short.
    rows = [{"instruction": f"is {n} even?", "references": ["yes"], "answer_choices": ["yes", "no"], "dataset": "even"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "generate",
        "--address",
        head,
        "--set",
        f"workspace={bucket}/run",
        "--set",
        "sampler.engine={kind: endpoint, base_url: 'http://127.0.0.1:9/v1'}",
    ]
    arguments += ["--set", f"source={{kind: files, path: {tmp_path}/rows.jsonl}}", "--json"]
    done = cappy(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["uri"] == f"{bucket}/run/dataset" and summary["sources"] == {"choice": 12, "reference": 12}
    assert RegressionSet(f"{bucket}/run/dataset").rows("train") + RegressionSet(f"{bucket}/run/dataset").rows("validation") == 12
    places = [f"{bucket}/run/dataset", f"{bucket}/run/exact"]
    annotate = ["annotate", *places, "--address", head, "--set", "generate.label.metric=exact_match", "--json"]
    with ThreadPoolExecutor() as pool:  # two concurrent jobs
        again, labelled = pool.map(lambda each: cappy(*each), [arguments, annotate])
    assert again.returncode == 2 and "already holds a finished run" in again.stderr and "Traceback" not in again.stderr
    manifest = storage.read_bytes(f"{bucket}/run/dataset/_MANIFEST.json").decode()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in manifest + done.stderr
    assert labelled.returncode == 0, labelled.stderr
    assert RegressionSet(places[1]).manifest["relabelled_from"]["uri"] == places[0]


def test_a_job_gets_absolute_local_paths_and_unchanged_names_and_s3_uris(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    monkeypatch.chdir(tmp_path)
    parts = (
        "[{source: {kind: files, path: 's3://b/x', templates: t.yaml}}, {source: {kind: hub, name: hub}}, {source: {kind: hub, name: a/b}}]"
    )
    scorers = "serving.scorers=[{name: a, path: hub}, {name: b, path: a/b}]"
    config = paths.absolute(load(None, [f"source={{kind: mixture, parts: {parts}}}", "decontaminate.files=['e/*.jsonl']", scorers]))
    files, folder, named = (part.source for part in config.source.parts)
    assert (files.path, files.templates) == ("s3://b/x", f"{tmp_path}/t.yaml")
    assert (folder.name, named.name) == (f"{tmp_path}/hub", "a/b")
    assert config.decontaminate.files == (f"{tmp_path}/e/*.jsonl",)
    assert [each.path for each in config.serving.scorers] == [f"{tmp_path}/hub", "a/b"]
